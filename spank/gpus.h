/* Which of the job's GPUs a task has, whatever Slurm's variables say. */
#ifndef SLURM_MPS_GPUS_H
#define SLURM_MPS_GPUS_H

#include <stdbool.h>
#include <stddef.h>

#include "verdict.h"

struct task_gpus {
	unsigned int count;
	const struct verdict_gpu *gpus[GPUS_MAX];
	unsigned int ordinals[GPUS_MAX]; /* as a client counts them that may open just these */
};

/* What Slurm, and the plugin, write into CUDA_VISIBLE_DEVICES of a task that has no GPU. */
#define NO_DEVICES "NoDevFiles"

/* Whether it is a MIG slice of a GPU, of which CUDA shows a process no more than one. */
bool device_is_slice(const struct verdict_gpu *gpu);

/* Whether the device cgroup lets this process open a GPU. */
bool device_may_open(const struct verdict_gpu *gpu);

/*
 * Find a task's GPUs.
 *
 * `visible` is the task's own CUDA_VISIBLE_DEVICES (NULL: not set), `has_gpus` whether Slurm says that its step has GPUs
 * here: with --gpu-bind=none it does, and the variable is not set. Slurm writes indices there that count all GPUs
 * of the node, or with ConstrainDevices=yes only those that the task may open, so that two tasks bound to different
 * GPUs both read "0". The kernel knows: a GPU outside the task's device cgroup gives EPERM.
 *
 * Returns: true with `task` filled, of count 0 when the task has no GPU; false when `visible` names a GPU that the
 * job does not have.
 */
bool task_gpus(const struct verdict *verdict, const char *visible, bool has_gpus, struct task_gpus *task);

/* How many GPUs a CUDA_VISIBLE_DEVICES names. */
unsigned int gpus_named(const char *list);

/* Write the GPUs as CUDA_VISIBLE_DEVICES takes them, comma separated: UUIDs, or the client's ordinals. */
void task_gpus_list(const struct task_gpus *task, bool ordinals, char *out, size_t size);

#endif
