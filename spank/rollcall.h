/* How many tasks of a step share each GPU of this node: each says which it has, and all read the sum. */
#ifndef SLURM_MPS_ROLLCALL_H
#define SLURM_MPS_ROLLCALL_H

#include <stdbool.h>

#include "gpus.h"
#include "verdict.h"

struct rollcall;

/* Make one, to be called before the tasks are forked, who share it. Returns NULL when there is no memory. */
struct rollcall *rollcall_new(void);

/*
 * Answer for this task and wait, two seconds at most, until all `tasks` of the step on this node have.
 *
 * A task that has several GPUs counts as a part on each of them, as if such tasks spread evenly; what a GPU's tasks
 * come to is rounded up. `tasks_on` is filled by the verdict's GPU.
 * Returns: false when not all of them answered.
 */
bool rollcall_answer(struct rollcall *rollcall, const struct verdict *verdict, const struct task_gpus *task,
		     unsigned int tasks, unsigned int tasks_on[GPUS_MAX]);

/* Whether this task is the first to ask: of tasks that fail for the same reason one prints it. NULL: each is the first. */
bool rollcall_first(struct rollcall *rollcall);

/* Whether some task reported that it could not start. Its exit status then says nothing about the program. */
bool rollcall_failed(struct rollcall *rollcall);

#endif
