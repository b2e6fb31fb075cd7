/* The variables that the plugin gives a task, and how it knows its own values again in a job that is made from there. */
#ifndef SLURM_MPS_VARIABLES_H
#define SLURM_MPS_VARIABLES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h> /* for spank.h, which forgets it */

#include <slurm/spank.h>

#include "verdict.h"

/* As many UUIDs as a verdict holds, with commas; no other variable that is read or set here is as long. */
#define VALUE_MAX (GPUS_MAX * sizeof(((struct verdict_gpu *)0)->uuid))

enum variable {
	VISIBLE_DEVICES,
	PIPE_DIRECTORY,
	LOG_DIRECTORY,
	THREAD_PERCENTAGE,
	MEMORY_LIMIT,
	CLIENT_PRIORITY,
	MAX_CONNECTIONS,
	VARIABLES,
};

/* A variable of the task; NULL when it is not set. One that is longer than any value that makes sense is taken away. */
const char *variable_get(spank_t sp, enum variable variable, char *value, size_t size);

/*
 * Give a task a variable, and note name and value in one more, CUDA_MPS_SET_BY_SLURM, which stays with them when a
 * script takes all SLURM_* away. A task has at most one value of each from here.
 */
bool variable_set(spank_t sp, enum variable variable, const char *value);

/* The same of a value that is the user's own, as far as the driver can use it: it travels on. */
bool variable_keep(spank_t sp, enum variable variable, const char *value);

/* Take a variable away, whoever set it. */
void variable_unset(spank_t sp, enum variable variable);

/*
 * Take away what the plugin gave the task that this one was started from, and nobody has changed since: in a task
 * (where Slurm has set CUDA_VISIBLE_DEVICES anew, which stays), or in this process, which submits a job (NULL).
 */
void variables_forget(spank_t sp);

/* In a task that runs without MPS: why. Programs and `slurm-mps verify` may look. */
bool variables_set_node_fault(spank_t sp, const char *message);

#endif
