/* How this driver reads and rounds what people write: percentages, memory sizes, lists of devices. Pure, but for
 * units_visible, which looks at /dev. */
#ifndef SIM_UNITS_H
#define SIM_UNITS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "sim_state.h"

/* A memory size in bytes as the control daemon reads it, silly forms included (O3). 0 stands for none. */
uint64_t units_read_limit(const char *text);
/* "8G", "1M"; from 1G on rounded down to G (O95); nothing for 0. */
void units_write_limit(char *text, size_t size, uint64_t bytes);
/* True and *percentage for a number in (0, 100]. */
bool units_read_percentage(const char *text, double *percentage);
/* SMs of a card that has all of them, under a percentage (O10). */
int units_sms(int all, double percentage);
/* MiB that a client's context counts against its limit (O15). */
uint64_t units_context_mib(int sms);

/* A list of GPU indices. */
struct units_gpus {
	int count;
	int index[SIM_MAX_GPUS];
};

/* What CUDA can show: a GPU in MIG mode is there by its slices alone. */
struct units_gpus units_all(const struct sim_state *state);
/* Those whose device nodes this process may open: what a device cgroup leaves. */
struct units_gpus units_openable(const struct sim_state *state, struct units_gpus all);
/* Apply CUDA_VISIBLE_DEVICES, or NULL, to a list: ordinals into it or UUIDs; the first bad entry ends it.
 * Where there is a slice, the first is all that a process sees (NVIDIA's MIG guide). */
struct units_gpus units_visible(const struct sim_state *state, struct units_gpus from, const char *variable);
/* A device as a limit names it, ordinal or UUID: its place in the list, or -1. */
int units_place(const struct sim_state *state, const struct units_gpus *list, const char *device);

#endif
