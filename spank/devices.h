/* Which of the job's GPUs a task has, whatever Slurm's variables say. */
#ifndef SLURM_MPS_DEVICES_H
#define SLURM_MPS_DEVICES_H

#include <stdbool.h>
#include <stddef.h>

#include "verdict.h"

/*
 * Name a task's GPUs by UUID, comma separated as CUDA_VISIBLE_DEVICES takes them.
 *
 * `visible` is the task's own CUDA_VISIBLE_DEVICES (NULL: not set). Slurm writes indices there that count all GPUs
 * of the node, or with ConstrainDevices=yes only those that the task may open, so that two tasks bound to different
 * GPUs both read "0". The kernel knows: a GPU outside the task's device cgroup gives EPERM.
 *
 * Returns: true with `out` filled, empty when the task has no GPU; false when `visible` names a GPU that the job
 * does not have.
 */
bool task_gpus(const struct verdict *verdict, const char *visible, char *out, size_t size);

#endif
