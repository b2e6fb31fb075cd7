/* What the clients of one step get: the job's limits, lowered by what the step and the user's environment ask. */
#ifndef SLURM_MPS_LIMITS_H
#define SLURM_MPS_LIMITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "gpus.h"
#include "options.h"
#include "verdict.h"

/* The options of a step as it gave them; empty where it gave none. */
struct step_options {
	const char *daemons;
	const char *threads;
	const char *mem;
	const char *priority;
};

/* More clients than these on a GPU must be content with two connections each (M5). */
#define CLIENTS_OF_ANY_KIND 48

struct limits {
	unsigned int threads_tenths;               /* of a percent */
	bool divide_threads;                       /* limits_divide() is still to come */
	bool divide_memory[GPUS_MAX];              /* the same, by the verdict's GPU */
	unsigned int share_tenths;                 /* the job's part of each GPU; limits_of_share() finds it */
	bool says_memory;                          /* the step gave a memory limit, or auto */
	bool share_divides;                        /* nothing is divided but the job's part of the memory */
	int priority;                              /* 0 normal, 1 low */
	unsigned int tasks_on_gpu;                 /* that share the task's GPU, where limits_divide() was needed */
	uint64_t mib[GPUS_MAX];                    /* by the verdict's GPU; 0: no limit */
};

/*
 * Lower the job's limits (the verdict's) to those of a step; in a job's own batch step and in steps that say nothing
 * they are the job's.
 * Returns: true; false with `message` filled when the step asks for more than the job has, for less memory than a CUDA
 * context costs, or for what only a job can have.
 */
bool limits_of_step(const struct verdict *verdict, const struct step_options *options, struct limits *limits,
		    char *message, size_t size);

/*
 * Lower the limits to the job's part of each GPU: what the verdict says, or its `shards` on this node (0: it has none).
 * Where the site wants it so, the same part of the memory is to be divided by those that share a GPU.
 */
void limits_of_share(const struct verdict *verdict, unsigned int shards, struct limits *limits);

/* Whether the number of tasks on each GPU must be known for a step with so many tasks on this node. */
bool limits_need_task_counts(const struct verdict *verdict, const struct limits *limits, unsigned int tasks);

/*
 * Divide what is to be divided by the tasks that share a GPU; `tasks_on` counts them by the verdict's GPU.
 * Returns: true; false with `message` filled, the same for all tasks of the step, when a server does not take so many
 * clients, or too little would be left for each.
 */
bool limits_divide(const struct verdict *verdict, const struct task_gpus *task, const unsigned int tasks_on[GPUS_MAX],
		   struct limits *limits, char *message, size_t size);

/*
 * The value of CUDA_MPS_ACTIVE_THREAD_PERCENTAGE for a task: its step's, or the user's own (NULL: none) if that is
 * valid and lower.
 */
void limits_threads_value(const struct limits *limits, const char *own, char *out, size_t size);

/*
 * The value of CUDA_MPS_PINNED_DEVICE_MEM_LIMIT for a task with these GPUs, such as "0=8192M". It names no more devices
 * than have less than their daemon gives them: a program that then narrows its CUDA_VISIBLE_DEVICES would lose every
 * limit over a device that it does not see (O12). A limit of the user's own (NULL: none) counts where it is lower; one
 * that the driver could not read, and which would lift the limit altogether (O12), is left out whole, and so is a part
 * that names a device which the task does not have.
 * Returns: false when there is none to set: no limit, where the user's own stays, or the daemon's alone.
 */
bool limits_memory_value(const struct verdict *verdict, const struct limits *limits, const struct task_gpus *task,
			 const char *own, char *out, size_t size);

#endif
