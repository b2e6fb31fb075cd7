/* What the clients of one step get: the job's limits, lowered by what the step and the user's environment ask. */
#ifndef SLURM_MPS_LIMITS_H
#define SLURM_MPS_LIMITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "verdict.h"

struct limits {
	unsigned int threads_tenths; /* of a percent */
	uint64_t memory_mib;         /* on each device; 0: no limit */
	uint64_t daemon_mib;         /* what the control daemon applies by itself; 0: no limit */
	int priority;                /* 0 normal, 1 low */
};

/*
 * Lower the job's limits (the verdict's) to those of a step. `threads`, `mem` and `priority` are the step's option values, empty
 * where it gave none; in a job's own batch step and in steps that say nothing they are the job's.
 * Returns: true; false with `message` filled when the step asks for more than the job has, or for less memory than a
 * CUDA context costs.
 */
bool limits_of_step(const struct verdict *verdict, const char *threads, const char *mem, const char *priority,
		    struct limits *limits, char *message, size_t size);

/*
 * The value of CUDA_MPS_ACTIVE_THREAD_PERCENTAGE for a task: its step's, or the user's own (NULL: none) if that is
 * valid and lower.
 */
void limits_threads_value(const struct limits *limits, const char *own, char *out, size_t size);

/*
 * The value of CUDA_MPS_PINNED_DEVICE_MEM_LIMIT for a task with these GPUs (UUIDs, comma separated; empty: one
 * device), such as "0=8192M". It names no more devices than have less than the daemon gives them: a program that then
 * narrows its CUDA_VISIBLE_DEVICES would lose every limit over a device that it does not see (O12). A limit of the user's own (NULL: none) counts where it is lower; one that the
 * driver could not use, and which would lift the limit altogether (O12), is left out whole.
 * Returns: false when there is no limit to state and the user's own is left as it is.
 */
bool limits_memory_value(const struct limits *limits, const char *uuids, const char *own, char *out, size_t size);

#endif
