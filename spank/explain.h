/* What a user is told when tasks of a step ended badly and MPS explains it (docs/decisions/0012). */
#ifndef SLURM_MPS_EXPLAIN_H
#define SLURM_MPS_EXPLAIN_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "step.h"

/* Note a task that was forked. */
void explain_task(uint32_t rank, pid_t pid);

/*
 * Note that a task has ended, as root, with the status of wait(2). After the first of a step that ended badly, and once
 * more after the last if nothing was found then, a program looks into the logs of the job's control daemons, as the
 * job's user, and what it finds is said in the job's output, with `on_node` behind the job's number. Takes two seconds at
 * most, and nothing where all is well.
 */
void explain_exit(const struct step *step, uid_t uid, bool job_script, const char *on_node, uint32_t rank, int status);

#endif
