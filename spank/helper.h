/* The short Python programs of slurm-mps that slurmstepd runs for a step; the verdict names them. */
#ifndef SLURM_MPS_HELPER_H
#define SLURM_MPS_HELPER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <sys/types.h>

#define HELPER_PAUSE_MS 10

/*
 * Do some work in a process beside slurmstepd, with its rights and none of its descriptors: a step is over when nobody
 * has its pipes. The process is init's child, since slurmstepd pauses for each child of its own that is not a task.
 * Returns: false when there is no such process.
 */
bool helper_beside(void (*work)(const void *argument), const void *argument);

/*
 * Start a program as user `uid` and nobody's group, in a process group of its own, with nothing of slurmstepd's: no
 * descriptor, no signal mask, only this environment. Its standard output is `output`, or /dev/null where that is -1.
 * Returns: its pid; -1 when there can be none.
 */
pid_t helper_start(uid_t uid, char *const argv[], char *const environment[], int output);

/* How a program ended that has no exit status. What could not be executed has 126 or 127. */
enum { HELPER_LATE = -1, HELPER_DIED = -2 };

/*
 * Wait until a program has ended, as long as there are tries left (of HELPER_PAUSE_MS each; another process may change
 * their number), then kill its process group: itself, where it has not ended, and in any case all that it started.
 * Returns: its exit status; HELPER_LATE where it had to be killed; HELPER_DIED where a signal ended it, it was never
 * started, or somebody else in slurmstepd (another plugin) has waited for it, so that nobody knows how it ended.
 */
int helper_end(pid_t pid, atomic_int *tries_left);

#endif
