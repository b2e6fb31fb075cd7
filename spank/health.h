/* Whether a job's MPS servers take programs after a task ended badly, and the repair (docs/decisions/0007). */
#ifndef SLURM_MPS_HEALTH_H
#define SLURM_MPS_HEALTH_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "verdict.h"

/* How the server of a GPU is, as far as this step knows. */
enum server_health {
	HEALTH_UNKNOWN, /* the probe is not done */
	HEALTH_GOOD,    /* it takes programs, or nothing speaks against it */
	HEALTH_REFUSES, /* it takes no programs */
	HEALTH_UNTRIED, /* not known: the probe did not run */
	HEALTH_SILENT,  /* not known: the probe may have run, and gave no answer */
};

/* By the verdict's GPU. */
struct health {
	bool probed[GPUS_MAX]; /* a task that could use it ended badly, so its server is probed */
	struct timespec since[GPUS_MAX]; /* when that task ended */
	struct probes *probes; /* what is found; NULL: nothing is probed, or there is no memory */
};

/* Note, as root, that a task of the job ended badly which could use the GPUs that this process may open. */
void health_mark(uint32_t job_id, const struct verdict *verdict);

/*
 * Begin to find out about the GPUs that this process may open and that were noted, before the tasks are forked: for
 * each control daemon a probe, run as the job's user (which this process is in effect), makes a context on them. That
 * repairs a server which a killed client left unfit. The note of a GPU whose server is good is taken away, unless it
 * was renewed meanwhile. Nothing is waited for: the step may have no task on those GPUs.
 */
void health_try(uint32_t job_id, const struct verdict *verdict, struct health *health);

/*
 * How the server of a GPU is; for a task with that GPU, which waits for the probe of its control daemon: six seconds at
 * most, and half a second more for each GPU of the job.
 */
enum server_health health_wait(const struct verdict *verdict, const struct health *health, unsigned int gpu);

/*
 * When a control daemon's probe ended, or now where it has not: the tasks with the daemon's GPUs start after that.
 * Returns: false where there was none.
 */
bool health_probed_until(const struct health *health, unsigned int daemon, struct timespec *when);

/* End the probes that no task waits for any more, when the step has ended; a good one may finish. Half a second. */
void health_stop(const struct health *health);

#endif
