/* A job's directory on this node, and the marks in it: empty files of root's, whose time says when. */
#ifndef SLURM_MPS_JOBDIR_H
#define SLURM_MPS_JOBDIR_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

/* Returns: a descriptor; -1 when there is no such directory. Only root can write there, so what is in it is root's. */
int jobdir_open(uint32_t job_id);

/* Returns: false when there is no such mark. */
bool jobdir_read_mark(int directory, const char *name, struct timespec *when);

/* Leave a mark, or renew its time. */
void jobdir_write_mark(int directory, const char *name);

#endif
