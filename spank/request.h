/* What is asked for here: in srun, sbatch and salloc for the job, and once more in slurmstepd for a step of its own. */
#ifndef SLURM_MPS_REQUEST_H
#define SLURM_MPS_REQUEST_H

#include <stdbool.h>
#include <stdint.h> /* for spank.h, which forgets it */

#include <slurm/spank.h>

#include "options.h"

/* The options as they were given, each of them valid; empty where none was. */
struct request {
	bool given; /* any of them */
	bool off;   /* --mps=off, which takes back what else is given, such as a script's #SBATCH --mps-threads */
	char daemons[OPTION_MAX];
	char threads[OPTION_MAX];
	char mem[MEM_OPTION_MAX];
	char priority[OPTION_MAX];
};

extern struct request request;

/* Whether MPS is asked for. */
bool request_asks(void);

/* Register the options with Slurm. */
void request_register(spank_t sp);

#endif
