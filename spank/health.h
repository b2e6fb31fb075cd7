/* Whether a job's MPS servers take programs after a task ended badly, and the repair (docs/decisions/0007). */
#ifndef SLURM_MPS_HEALTH_H
#define SLURM_MPS_HEALTH_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "verdict.h"

/* How the server of a GPU is, as far as this step knows. */
enum server_health {
	HEALTH_GOOD,    /* it takes programs, or nothing speaks against it */
	HEALTH_REFUSES, /* it takes no programs */
	HEALTH_UNTRIED, /* not known: the probe did not run */
	HEALTH_SILENT,  /* not known: the probe may have run, and gave no answer */
};

/* By the verdict's GPU. */
struct health {
	bool probed[GPUS_MAX]; /* a task that could use it ended badly, so its server was probed */
	enum server_health of[GPUS_MAX];
	struct timespec since[GPUS_MAX]; /* when that task ended */
};

/* Note, as root, that a task of the job ended badly which could use the GPUs that this process may open. */
void health_mark(uint32_t job_id, const struct verdict *verdict);

/*
 * Find out about the GPUs that this process may open and that were noted: for each control daemon a probe, run as the
 * job's user (which this process is in effect), makes a context on them. That repairs a server which a killed client
 * left unfit. Takes six seconds at most, and half a second more for each GPU of the job.
 */
void health_look(uint32_t job_id, const struct verdict *verdict, struct health *health);

/* Take away, as root, the notes of GPUs whose servers were found good, unless they were renewed meanwhile. */
void health_clear(uint32_t job_id, const struct verdict *verdict, const struct health *health);

#endif
