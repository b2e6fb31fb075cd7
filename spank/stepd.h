/* What runs in slurmstepd for a step as a whole, before its tasks are forked: where the step stands. */
#ifndef SLURM_MPS_STEPD_H
#define SLURM_MPS_STEPD_H

#include <stdint.h> /* for spank.h, which forgets it */

#include <slurm/spank.h>

#include "step.h"

/*
 * Find out where a step stands: the job's verdict, the step's limits, whether its control daemons answer; and begin to
 * find out whether its servers take programs. A step that cannot run is marked as failed, and says why, once for all
 * its tasks on this node; failing here would drain the node, so the tasks do it. Does nothing when it is called again.
 */
void stepd_judge(spank_t sp, struct step *step);

/*
 * Why no task can use a GPU; NULL where its control daemon answers, and its server takes programs. Waits until that is
 * known, as health_wait() does.
 */
const char *stepd_trouble(const struct step *step, const struct verdict_gpu *gpu);

/*
 * " on n1", for the end of a message's first words. Up to 24.11 slurmstepd begins each line with its own and the
 * node's name, since 25.05 with the time: a user of several nodes could not tell which node it is about.
 */
const char *stepd_on_node(void);

#endif
