/* A job's control daemon, as far as a step asks: whether it is there. */
#ifndef SLURM_MPS_DAEMON_H
#define SLURM_MPS_DAEMON_H

#include <stdbool.h>

#include "verdict.h"

/* Whether root's control daemon takes connections in its pipe directory; waits a second at most. */
bool daemon_answers(const struct verdict_daemon *daemon);

#endif
