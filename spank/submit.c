#include "submit.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "request.h"
#include "variables.h"

static void unset(const char *prefix, const char *const names[], size_t count)
{
	char name[96];

	for (size_t i = 0; i < count; i++) {
		(void)snprintf(name, sizeof(name), "%s%s", prefix, names[i]);
		(void)unsetenv(name);
	}
}

void submit_forget_other_job(void)
{
	static const char *const carried[] = { "", "_THREADS", "_MEM", "_PRIORITY" };
	static const char *const given[] = { "", "_threads", "_mem", "_priority" };
	bool in_a_job = variables_of_a_job();
	bool allocates = spank_context() == S_CTX_ALLOCATOR;

	if (!allocates && (spank_context() != S_CTX_LOCAL || in_a_job))
		return;
	unset("SLURM_SPANK_MPS", carried, sizeof(carried) / sizeof(carried[0]));
	if (in_a_job)
		unset("SLURM_SPANK__SLURM_SPANK_OPTION_mps_mps", given, sizeof(given) / sizeof(given[0]));
	variables_forget(NULL);
}

int submit_carry(spank_t sp)
{
	bool submitting = spank_context() == S_CTX_LOCAL || spank_context() == S_CTX_ALLOCATOR;
	int rc;

	if (!submitting || !request.asked)
		return 0;
	if (strchr(request.mem, ':') && strcmp(request.daemons, "per-gpu") && !getenv("SLURM_JOB_ID")) {
		slurm_error("mps: --mps-mem=%s: one control daemon cannot tell its GPUs apart; ask for --mps=per-gpu, or for one "
			    "size", request.mem);
		return -1;
	}
	rc = spank_job_control_setenv(sp, "MPS", request.daemons[0] ? request.daemons : "1", 1);
	if (rc == ESPANK_SUCCESS && request.threads[0])
		rc = spank_job_control_setenv(sp, "MPS_THREADS", request.threads, 1);
	if (rc == ESPANK_SUCCESS && request.mem[0])
		rc = spank_job_control_setenv(sp, "MPS_MEM", request.mem, 1);
	if (rc == ESPANK_SUCCESS && request.priority[0])
		rc = spank_job_control_setenv(sp, "MPS_PRIORITY", request.priority, 1);
	if (rc != ESPANK_SUCCESS)
		slurm_error("mps: the request cannot be passed on: %s", spank_strerror(rc));
	return rc == ESPANK_SUCCESS ? 0 : -1;
}
