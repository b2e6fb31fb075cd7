#include "limits.h"

#include <stdio.h>
#include <string.h>

#include "options.h"

/* A context costs 22 of 514 parts of its whole cost at 0 % of the threads, and the rest in proportion (O15). */
static uint64_t context_mib(const struct verdict *verdict, unsigned int tenths)
{
	return verdict->context_mib * (22 * 1000 + 492 * (uint64_t)tenths) / (514 * 1000);
}

bool limits_of_step(const struct verdict *verdict, const char *threads, const char *mem, const char *priority,
		    struct limits *limits, char *message, size_t size)
{
	unsigned int tenths = threads_tenths(threads);
	uint64_t mib = mem_mib(mem);

	limits->threads_tenths = threads_tenths(verdict->thread_percentage);
	limits->memory_mib = limits->daemon_mib = mem_mib(verdict->memory_limit);
	limits->priority = verdict->priority;
	if (limits->priority && client_priority(priority) == 0) {
		(void)snprintf(message, size, "--mps-priority=normal is more than the job has (low); a step can only lower it");
		return false;
	}
	if (client_priority(priority) == 1)
		limits->priority = 1;
	if (tenths > limits->threads_tenths) {
		(void)snprintf(message, size, "--mps-threads=%s is more than the job has (%s); a step can only lower it",
			       threads, verdict->thread_percentage);
		return false;
	}
	if (limits->memory_mib && mib > limits->memory_mib) {
		(void)snprintf(message, size, "--mps-mem=%s is more than the job has (%s); a step can only lower it", mem,
			       verdict->memory_limit);
		return false;
	}
	if (tenths)
		limits->threads_tenths = tenths;
	if (mib)
		limits->memory_mib = mib;
	if (mib && mib <= context_mib(verdict, limits->threads_tenths)) {
		(void)snprintf(message, size,
			       "--mps-mem=%s is less than a CUDA context costs with %u.%u %% of the threads (about %llu MiB)",
			       mem, limits->threads_tenths / 10, limits->threads_tenths % 10,
			       (unsigned long long)context_mib(verdict, limits->threads_tenths));
		return false;
	}
	return true;
}

void limits_threads_value(const struct limits *limits, const char *own, char *out, size_t size)
{
	unsigned int tenths = threads_tenths(own);

	if (!tenths || tenths > limits->threads_tenths)
		tenths = limits->threads_tenths;
	if (tenths % 10)
		(void)snprintf(out, size, "%u.%u", tenths / 10, tenths % 10);
	else
		(void)snprintf(out, size, "%u", tenths / 10);
}

static unsigned int device_count(const char *uuids)
{
	unsigned int count = 1;

	for (; *uuids; uuids++)
		count += *uuids == ',';
	return count < VERDICT_GPUS_MAX ? count : VERDICT_GPUS_MAX;
}

/* The position of `name` among the UUIDs, or the ordinal that it is; -1 when the task has no such device. */
static int find_device(const char *uuids, const char *name, size_t length)
{
	int position = 0;
	char ordinal[12];

	while (*uuids) {
		size_t uuid_length = strcspn(uuids, ",");

		if (uuid_length == length && !memcmp(uuids, name, length))
			return position;
		position++;
		uuids += uuid_length + (uuids[uuid_length] == ',');
	}
	for (int device = 0; device < position; device++) {
		(void)snprintf(ordinal, sizeof(ordinal), "%d", device);
		if (strlen(ordinal) == length && !memcmp(ordinal, name, length))
			return device;
	}
	return -1;
}

/* Take one "device=size" of the user's list; false when the driver could not use it. */
static bool lower_one(const char *entry, size_t length, const char *uuids, uint64_t mib[])
{
	const char *equals = memchr(entry, '=', length);
	char size[OPTION_MAX];
	size_t size_length;
	uint64_t own;
	int device;

	if (!equals)
		return false;
	size_length = length - (size_t)(equals + 1 - entry);
	if (size_length >= sizeof(size))
		return false;
	memcpy(size, equals + 1, size_length);
	size[size_length] = '\0';
	own = mem_mib(size);
	device = find_device(uuids, entry, (size_t)(equals - entry));
	if (!own || device < 0)
		return false;
	if (own < mib[device])
		mib[device] = own;
	return true;
}

static bool lower_all(const char *own, const char *uuids, uint64_t mib[])
{
	while (*own) {
		size_t length = strcspn(own, ",");

		if (!lower_one(own, length, uuids, mib))
			return false;
		own += length + (own[length] == ',');
	}
	return true;
}

static void fill(uint64_t mib[VERDICT_GPUS_MAX], uint64_t value)
{
	for (unsigned int i = 0; i < VERDICT_GPUS_MAX; i++)
		mib[i] = value;
}

bool limits_memory_value(const struct limits *limits, const char *uuids, const char *own, char *out, size_t size)
{
	unsigned int count = device_count(uuids);
	uint64_t mib[VERDICT_GPUS_MAX];
	size_t used = 0;

	if (!limits->memory_mib)
		return false;
	fill(mib, limits->memory_mib);
	if (own && !lower_all(own, uuids, mib))
		fill(mib, limits->memory_mib);
	while (count > 1 && mib[count - 1] == limits->daemon_mib)
		count--;
	for (unsigned int i = 0; i < count && used < size; i++)
		used += (size_t)snprintf(out + used, size - used, "%s%u=%lluM", i ? "," : "", i,
					 (unsigned long long)mib[i]);
	return true;
}
