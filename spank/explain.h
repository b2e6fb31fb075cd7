/* Explains in the job's output why tasks of a step ended badly, where MPS explains it (docs/decisions/0012). */
#ifndef SLURM_MPS_EXPLAIN_H
#define SLURM_MPS_EXPLAIN_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "step.h"

/* Note a task that was forked. */
void explain_task(uint32_t rank, pid_t pid);

/*
 * Note that a task has ended, as root, with the status of wait(2). After the first task of a step that ended badly, and
 * once more after the last if nothing was found then, a program reads the logs of the job's control daemons as the job's
 * user. What the program prints goes into the job's output, with `on_node` behind the job's number. It takes two seconds
 * at most. A step without a failed task costs no time, except where programs can run without MPS: there the program is
 * also run after the last task.
 */
void explain_exit(const struct step *step, uid_t uid, bool job_script, const char *on_node, uint32_t rank, int status);

#endif
