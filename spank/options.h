/* The values of --mps-threads and --mps-mem: what a user may write. */
#ifndef SLURM_MPS_OPTIONS_H
#define SLURM_MPS_OPTIONS_H

#include <stddef.h>
#include <stdint.h>

#define THREADS_EXPECTED "a percentage above 0 and up to 100 with at most one decimal, such as 25 or 12.5"
#define MEM_EXPECTED "a whole number above 0 with M, G or T (binary units), such as 512M or 8G"

#define PRIORITY_EXPECTED "normal or low"

/* Longest value either option can have; anything longer is wrong whatever it says. */
#define OPTION_MAX 12

/*
 * Read an active thread percentage.
 * Returns: tenths of a percent (1 to 1000), or 0 when the text is no such percentage.
 */
unsigned int threads_tenths(const char *text);

/*
 * Read a device memory limit: an integer above 0 followed by M, G or T.
 * Returns: MiB, or 0 when the text is no such size.
 */
uint64_t mem_mib(const char *text);

/* Read a client priority: "normal" or "low". Returns: 0 or 1, as CUDA_MPS_CLIENT_PRIORITY counts; -1 for neither. */
int client_priority(const char *text);

/* Copy `text` for a message: cut to fit, anything but printable ASCII as '?'. */
void printable(char *out, size_t size, const char *text);

#endif
