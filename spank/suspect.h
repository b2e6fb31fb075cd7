/* Whether a job's MPS server can be trusted after a task ended badly, and how it is made good (docs/decisions/0007). */
#ifndef SLURM_MPS_SUSPECT_H
#define SLURM_MPS_SUSPECT_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "verdict.h"

/* What is known of each of the verdict's GPUs. */
struct suspicion {
	bool probed[GPUS_MAX]; /* a task that could use it ended badly, so it was tried */
	bool unwell[GPUS_MAX]; /* and its server takes no programs */
	bool untried[GPUS_MAX]; /* or that is not known: the program that tries it did not run */
	bool unsaid[GPUS_MAX];  /* or it may have, and gave no answer; such a GPU is untried, too */
	struct timespec since[GPUS_MAX];
};

/*
 * Note, as root, that a task of the job ended badly which could use the GPUs that this process may open.
 */
void suspect_mark(uint32_t job_id, const struct verdict *verdict);

/*
 * Find out about the GPUs that this process may open and that were noted: for each control daemon a program, run as the
 * job's user (which this process is in effect), makes a context on them, which cures what can be cured. Takes five
 * seconds at most.
 */
void suspect_look(uint32_t job_id, const struct verdict *verdict, struct suspicion *suspicion);

/* Take away, as root, the notes of GPUs that were found well, unless they were renewed meanwhile. */
void suspect_clear(uint32_t job_id, const struct verdict *verdict, const struct suspicion *suspicion);

#endif
