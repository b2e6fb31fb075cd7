/* The values of --mps and its sisters: what a user may write. */
#ifndef SLURM_MPS_OPTIONS_H
#define SLURM_MPS_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define THREADS_EXPECTED "a percentage above 0 and up to 100 with at most one decimal, such as 25 or 12.5, or auto"
#define MEM_EXPECTED \
	"a whole number above 0 with M, G or T, such as 8G, or auto, or with --mps=per-gpu a list such as 0:8G,1:4G"
#define PRIORITY_EXPECTED "normal or low"
#define DAEMONS_EXPECTED "per-node, per-gpu or off"

/* Longest value of each option; anything longer is wrong whatever it says. A size for each of 64 GPUs is longest. */
#define OPTION_MAX 12
#define MEM_OPTION_MAX 1024

/* All of a GPU's threads, in tenths of a percent. */
#define WHOLE_GPU 1000

#define GPUS_MAX 64 /* of one job on one node */

enum daemons { DAEMONS_UNSAID, DAEMONS_PER_NODE, DAEMONS_PER_GPU };

/* What --mps-mem asks for. */
struct mem_option {
	bool automatic;          /* divide by the tasks that share a GPU */
	bool by_gpu;             /* only for some GPUs; 0 in `mib` for the others */
	uint64_t mib[GPUS_MAX];  /* by the job's own count of its GPUs; all 0: nothing was asked */
};

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

/* Whether a value of --mps-threads or --mps-mem is "auto". */
bool is_auto(const char *text);

/*
 * Read a value of --mps-mem; empty: nothing was asked.
 * Returns: NULL with `option` filled, or what is wrong with the value, in words that follow it and a colon.
 */
const char *mem_option(const char *text, struct mem_option *option);

/*
 * Read a value of --mps; none, which is --mps alone, leaves it open. Slurm hands that on to the sruns in a job as "",
 * and 22.05 as "(null)".
 * Returns: false when it is neither.
 */
bool daemons_option(const char *text, enum daemons *daemons);

/* Read a client priority: "normal" or "low". Returns: 0 or 1, as CUDA_MPS_CLIENT_PRIORITY counts; -1 for neither. */
int client_priority(const char *text);

/* Write why something is refused. Returns: false. */
bool refuse_with(char *message, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Copy `text` for a message: cut to fit, anything but printable ASCII as '?'. */
void printable(char *out, size_t size, const char *text);

#endif
