/* What slurmstepd found out about a step before it forked the step's tasks, who inherit it. */
#ifndef SLURM_MPS_STEP_H
#define SLURM_MPS_STEP_H

#include <stdbool.h>
#include <stdint.h>

#include "health.h"
#include "limits.h"
#include "rollcall.h"
#include "verdict.h"

struct step {
	bool known;
	bool failed;                          /* and the message is printed */
	uint32_t job_id;
	struct verdict verdict;
	struct limits limits;
	struct rollcall *rollcall;
	struct health health;
	bool answers[GPUS_MAX];               /* by control daemon */
};

#endif
