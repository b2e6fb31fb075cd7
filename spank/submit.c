#include "submit.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "request.h"
#include "variables.h"

/* How each option's value travels: Slurm keeps it under the option's name, and takes the variable to the prolog. */
static const struct {
	const char *option;
	const char *variable;
	const char *value;
} carried[] = {
	{ "mps", "MPS", request.daemons },
	{ "mps_threads", "MPS_THREADS", request.threads },
	{ "mps_mem", "MPS_MEM", request.mem },
	{ "mps_priority", "MPS_PRIORITY", request.priority },
};

/* --mps=off, for a partition that gives MPS to jobs that do not ask. */
#define NO_MPS "NO_MPS"

static void unset(const char *prefix, const char *name)
{
	char whole[96];

	(void)snprintf(whole, sizeof(whole), "%s%s", prefix, name);
	(void)unsetenv(whole);
}

void submit_forget_other_job(void)
{
	if (spank_context() != S_CTX_ALLOCATOR && (spank_context() != S_CTX_LOCAL || getenv("SLURM_JOB_ID")))
		return;
	for (size_t i = 0; i < sizeof(carried) / sizeof(carried[0]); i++) {
		unset("SLURM_SPANK_", carried[i].variable);
		unset("SLURM_SPANK__SLURM_SPANK_OPTION_mps_", carried[i].option);
		unset("_SLURM_SPANK_OPTION_mps_", carried[i].option); /* what salloc starts has both */
	}
	unset("SLURM_SPANK_", NO_MPS);
	variables_forget(NULL);
}

int submit_carry(spank_t sp)
{
	bool submitting = spank_context() == S_CTX_LOCAL || spank_context() == S_CTX_ALLOCATOR;
	int rc;

	if (!submitting || !request.given)
		return 0;
	if (request.off)
		return spank_job_control_setenv(sp, NO_MPS, "1", 1) == ESPANK_SUCCESS ? 0 : -1;
	if (strchr(request.mem, ':') && strcmp(request.daemons, "per-gpu") && !getenv("SLURM_JOB_ID")) {
		slurm_error("mps: --mps-mem=%s: one control daemon cannot tell its GPUs apart; ask for --mps=per-gpu, or for one "
			    "size", request.mem);
		return -1;
	}
	rc = spank_job_control_setenv(sp, "MPS", "1", 1); /* --mps without a value, which each of them implies */
	for (size_t i = 0; i < sizeof(carried) / sizeof(carried[0]) && rc == ESPANK_SUCCESS; i++)
		if (carried[i].value[0])
			rc = spank_job_control_setenv(sp, carried[i].variable, carried[i].value, 1);
	if (rc != ESPANK_SUCCESS)
		slurm_error("mps: the request cannot be passed on: %s", spank_strerror(rc));
	return rc == ESPANK_SUCCESS ? 0 : -1;
}
