/* A task's environment: which GPUs its program sees, under which limits, and where its control daemon is. */
#ifndef SLURM_MPS_TASK_H
#define SLURM_MPS_TASK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h> /* for spank.h, which forgets it */

#include <slurm/spank.h>

#include "step.h"

/*
 * Put a task's environment in place, as the job's verdict wants it; waits two seconds at most for the step's other
 * tasks, where they share a GPU whose parts are to be reckoned.
 * Returns: false with `problem` filled when the task cannot start.
 */
bool task_prepare(spank_t sp, struct step *step, char *problem, size_t size);

/* Whether this is the job's script or an interactive shell: one task, which starts the programs that count. */
bool task_is_job_script(spank_t sp);

#endif
