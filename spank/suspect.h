/* Whether a job's MPS server can be trusted after a task ended badly, and how it is made good (docs/decisions/0007). */
#ifndef SLURM_MPS_SUSPECT_H
#define SLURM_MPS_SUSPECT_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "verdict.h"

/* Note, as root, that a task of the job ended badly. */
void suspect_mark(uint32_t job_id);

/* Whether one did since the mark was last taken away. Returns: true with the mark's time. */
bool suspect_marked(uint32_t job_id, struct timespec *when);

/* Take the mark away, as root, unless it was renewed since `when`. */
void suspect_clear(uint32_t job_id, const struct timespec *when);

/*
 * Have a program of each control daemon, as the job's user (which this process is in effect), make a context on each
 * of its GPUs, which cures what can be cured; takes five seconds at most.
 * Returns: whether all of them could.
 */
bool suspect_is_well(const struct verdict *verdict);

#endif
