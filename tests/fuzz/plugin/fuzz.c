/*
 * libFuzzer on all that the plugin parses: a verdict, a step's options, a task's variables.
 *
 * An input is parts with a NUL between them: the verdict; --mps-threads, --mps-mem, --mps-priority; the task's
 * CUDA_VISIBLE_DEVICES, CUDA_MPS_ACTIVE_THREAD_PERCENTAGE and CUDA_MPS_PINNED_DEVICE_MEM_LIMIT. Each part is an
 * allocation of its very size, so that one byte read past it is seen.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "verdict.c" /* for parse(), which the plugin reaches through a file alone */

#include "devices.h"
#include "limits.h"
#include "options.h"

enum { VERDICT, THREADS, MEM, PRIORITY, VISIBLE, OWN_THREADS, OWN_MEM, PARTS };

#define CHECK(truth) ((truth) ? (void)0 : broken(#truth))

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static _Noreturn void broken(const char *promise)
{
	fprintf(stderr, "broken promise: %s\n", promise);
	abort();
}

static void split(const uint8_t *data, size_t size, char *parts[PARTS])
{
	for (int i = 0; i < PARTS; i++) {
		const uint8_t *end = size ? memchr(data, 0, size) : NULL;
		size_t length = end ? (size_t)(end - data) : size;

		parts[i] = malloc(length + 1);
		if (!parts[i])
			abort();
		if (length)
			memcpy(parts[i], data, length);
		parts[i][length] = '\0';
		data += length + (end ? 1 : 0);
		size -= length + (end ? 1 : 0);
	}
}

#define IS_TEXT(field) (memchr((field), 0, sizeof(field)) != NULL)

static void check_verdict(const struct verdict *verdict)
{
	CHECK(IS_TEXT(verdict->message) && IS_TEXT(verdict->pipe_directory) && IS_TEXT(verdict->log_directory));
	CHECK(IS_TEXT(verdict->thread_percentage) && IS_TEXT(verdict->memory_limit));
	CHECK(verdict->gpu_count <= VERDICT_GPUS_MAX);
	for (unsigned int i = 0; i < verdict->gpu_count; i++)
		CHECK(IS_TEXT(verdict->gpus[i].uuid));
}

/* Every entry is "<ordinal>=<MiB>M" of a device that the task has, and none is above the step's limit. */
static void check_memory_value(const char *value, const struct limits *limits, unsigned int devices)
{
	while (*value) {
		unsigned int device;
		unsigned long long mib;
		int used = 0;

		CHECK(sscanf(value, "%u=%lluM%n", &device, &mib, &used) == 2 && used > 0);
		CHECK(mib > 0 && mib <= limits->memory_mib);
		CHECK(device == 0 || device < devices);
		value += used;
		CHECK(!*value || (*value == ',' && value[1]));
		value += *value == ',';
	}
}

static void run_task(const struct verdict *verdict, const struct limits *limits, char *parts[PARTS])
{
	static char uuids[VERDICT_GPUS_MAX * 48], value[VERDICT_GPUS_MAX * 48];
	static struct task_gpus task;

	limits_threads_value(limits, *parts[OWN_THREADS] ? parts[OWN_THREADS] : NULL, value, sizeof(value));
	CHECK(!limits->threads_tenths || threads_tenths(value) <= limits->threads_tenths);
	if (!task_gpus(verdict, parts[VISIBLE], &task))
		return;
	CHECK(task.count <= VERDICT_GPUS_MAX);
	task_gpus_list(&task, true, value, sizeof(value));
	task_gpus_list(&task, false, uuids, sizeof(uuids));
	if (limits_memory_value(limits, uuids, parts[OWN_MEM], value, sizeof(value)))
		check_memory_value(value, limits, task.count);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	char *parts[PARTS], message[VERDICT_MESSAGE_MAX], shown[48];
	struct verdict *verdict = calloc(1, sizeof(*verdict));
	struct limits limits;

	split(data, size, parts);
	if (verdict && parse(verdict, parts[VERDICT])) {
		check_verdict(verdict);
		if (verdict->status == VERDICT_READY &&
		    limits_of_step(verdict, parts[THREADS], parts[MEM], parts[PRIORITY], &limits, message,
				   sizeof(message)))
			run_task(verdict, &limits, parts);
	}
	printable(shown, sizeof(shown), parts[THREADS]);
	CHECK(strlen(shown) < sizeof(shown));
	for (int i = 0; i < PARTS; i++)
		free(parts[i]);
	free(verdict);
	return 0;
}
