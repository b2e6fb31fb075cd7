/* The short Python programs of slurm-mps that slurmstepd runs for a step; the verdict names them. */
#ifndef SLURM_MPS_HELPER_H
#define SLURM_MPS_HELPER_H

#include <stdbool.h>
#include <sys/types.h>

#define HELPER_PAUSE_MS 10

/* Close all descriptors but the standard ones. */
void helper_close_descriptors(void);

/*
 * Start a program as user `uid` and nobody's group, in a process group of its own, with nothing of slurmstepd's: no
 * descriptor, no signal mask, only this environment. Its standard output is `output`, or /dev/null where that is -1.
 * Returns: its pid; -1 when there can be none.
 */
pid_t helper_start(uid_t uid, char *const argv[], char *const environment[], int output);

/* How a program ended that has no exit status. What could not be executed has 126 or 127. */
enum { HELPER_LATE = -1, HELPER_DIED = -2 };

/*
 * Wait until a program has ended, as long as there are tries left (of HELPER_PAUSE_MS each), then kill its process
 * group: itself, where it has not ended, and in any case all that it started.
 * Returns: its exit status; HELPER_LATE where it had to be killed; HELPER_DIED where a signal ended it, it was never
 * started, or somebody else in slurmstepd (another plugin) has waited for it, so that nobody knows how it ended.
 */
int helper_end(pid_t pid, int *tries_left);

#endif
