/* What runs in srun, sbatch and salloc, as the user who submits. */
#ifndef SLURM_MPS_SUBMIT_H
#define SLURM_MPS_SUBMIT_H

#include <stdint.h> /* for spank.h, which forgets it */

#include <slurm/spank.h>

/*
 * Inside a job the request of its submission stands in the environment, for the sruns that make its steps. A new job
 * that is made from there (by sbatch, salloc, or srun where the variables have outlived their job) is to have MPS when
 * it asks, not because another job did: forget that request here.
 */
void submit_forget_other_job(void);

/*
 * Carry the request to the prolog, which sees SPANK_MPS, SPANK_MPS_THREADS and so on, and reads them as hostile text
 * all the same.
 * Returns: as a callback, 0 or -1 (Slurm goes on after a positive value).
 */
int submit_carry(spank_t sp);

#endif
