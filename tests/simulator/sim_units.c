#include "sim_units.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

uint64_t units_read_limit(const char *text)
{
	char *end;
	if (*text == '\0')
		return ~(uint64_t)0 << 30; /* as "-1G": 17179869183G (O3) */
	uint64_t number = strtoull(text, &end, 10);
	return number << (*end == 'g' || *end == 'G' ? 30 : 20); /* K, bytes and fractions all count as MiB */
}

void units_write_limit(char *text, size_t size, uint64_t bytes)
{
	unsigned long long mib = bytes >> 20;
	text[0] = '\0';
	if (bytes == 0)
		return;
	if (mib >= 1024) /* rounded down (O95) */
		snprintf(text, size, "%lluG", mib / 1024);
	else
		snprintf(text, size, "%lluM", mib);
}

bool units_read_percentage(const char *text, double *percentage)
{
	char *end;
	double number = strtod(text, &end);
	if (end == text || !(number > 0.0 && number <= 100.0)) /* not a number compares false */
		return false;
	*percentage = number;
	return true;
}

int units_sms(int all, double percentage)
{
	if (percentage >= 100.0)
		return all;
	int sms = (int)floor(percentage * all / 100.0) & ~1;
	if (sms < 8)
		sms = 8;
	return sms < all ? sms : all;
}

uint64_t units_context_mib(int sms)
{
	return (uint64_t)llround(56.4 + 3.69 * (sms > 8 ? sms - 8 : 0));
}

struct units_gpus units_all(const struct sim_state *state)
{
	struct units_gpus all = {0};
	for (int i = 0; i < SIM_MAX_GPUS; i++)
		if (sim_is_there(state, i) && !state->gpus[i].mig)
			all.index[all.count++] = i;
	return all;
}

static bool can_open(const char *format, int minor, int how)
{
	char path[64];
	snprintf(path, sizeof path, format, minor);
	int fd = open(path, how | O_CLOEXEC | O_NONBLOCK);
	if (fd >= 0)
		close(fd);
	/* Only a refusal counts: the node of a simulated card has no driver behind it, or is not there. */
	return fd >= 0 || (errno != EPERM && errno != EACCES);
}

static bool openable(const struct sim_state *state, int gpu)
{
	const struct sim_gpu *slice = &state->gpus[gpu];
	if (!slice->parts)
		return can_open("/dev/nvidia%d", gpu, O_RDWR);
	return can_open("/dev/nvidia%d", slice->parent, O_RDWR) &&
	       can_open("/dev/nvidia-caps/nvidia-cap%d", sim_cap_minor(slice, false), O_RDONLY) &&
	       can_open("/dev/nvidia-caps/nvidia-cap%d", sim_cap_minor(slice, true), O_RDONLY);
}

struct units_gpus units_openable(const struct sim_state *state, struct units_gpus all)
{
	struct units_gpus open_ones = {0};
	for (int i = 0; i < all.count; i++)
		if (openable(state, all.index[i]))
			open_ones.index[open_ones.count++] = all.index[i];
	return open_ones;
}

static int place_of_uuid(const struct sim_state *state, const struct units_gpus *list, const char *prefix)
{
	int found = -1;
	if (strncmp(prefix, "GPU-", 4) != 0 && strncmp(prefix, "MIG-", 4) != 0)
		return -1;
	for (int i = 0; i < list->count; i++) {
		if (strncmp(state->gpus[list->index[i]].uuid, prefix, strlen(prefix)) != 0)
			continue;
		if (found >= 0)
			return -1; /* a prefix of two names neither */
		found = i;
	}
	return found;
}

int units_place(const struct sim_state *state, const struct units_gpus *list, const char *device)
{
	char *end;
	if (*device < '0' || *device > '9')
		return place_of_uuid(state, list, device);
	long ordinal = strtol(device, &end, 10);
	return *end == '\0' && ordinal < list->count ? (int)ordinal : -1;
}

static bool holds(const struct units_gpus *list, int gpu)
{
	for (int i = 0; i < list->count; i++)
		if (list->index[i] == gpu)
			return true;
	return false;
}

static struct units_gpus one_slice(const struct sim_state *state, struct units_gpus from)
{
	for (int i = 0; i < from.count; i++)
		if (state->gpus[from.index[i]].parts)
			return (struct units_gpus){.count = 1, .index = {from.index[i]}};
	return from;
}

struct units_gpus units_visible(const struct sim_state *state, struct units_gpus from, const char *variable)
{
	struct units_gpus visible = {0}, counted = one_slice(state, from);
	if (!variable)
		return counted;
	while (visible.count < SIM_MAX_GPUS) {
		char word[SIM_UUID_SIZE + 8];
		while (*variable == ' ')
			variable++;
		size_t length = strcspn(variable, ",");
		if (length >= sizeof word)
			break;
		memcpy(word, variable, length);
		word[length] = '\0';
		word[strcspn(word, " ")] = '\0';
		const struct units_gpus *list = *word >= '0' && *word <= '9' ? &counted : &from;
		int place = units_place(state, list, word);
		if (place < 0 || holds(&visible, list->index[place]))
			break;
		visible.index[visible.count++] = list->index[place];
		if (variable[length] == '\0')
			break;
		variable += length + 1;
	}
	return one_slice(state, visible);
}
