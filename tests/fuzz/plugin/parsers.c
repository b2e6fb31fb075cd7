/*
 * All that the plugin parses: a verdict, a step's options, a task's variables; and the limits that come of them. What
 * the headers promise is checked.
 *
 * The parts of an input: the verdict; --mps, --mps-threads, --mps-mem, --mps-priority; the task's CUDA_VISIBLE_DEVICES,
 * CUDA_MPS_ACTIVE_THREAD_PERCENTAGE and CUDA_MPS_PINNED_DEVICE_MEM_LIMIT; how many tasks each GPU has, a byte for each.
 */
#include "fuzz.h"

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "verdict.c" /* for parse(), which the plugin reaches through a file alone */

enum { VERDICT, DAEMONS, THREADS, MEM, PRIORITY, VISIBLE, OWN_THREADS, OWN_MEM, TASKS_ON, PARTS };

static bool is_one_of(const char *text, const char *const words[], size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (!strcmp(text, words[i]))
			return true;
	return false;
}

static void check_daemons_option(const char *text)
{
	static const char *const right[] = { "", "(null)", "per-node", "per-gpu" };
	enum daemons daemons;

	CHECK(daemons_option(text, &daemons) == is_one_of(text, right, sizeof(right) / sizeof(right[0])));
	CHECK((daemons == DAEMONS_PER_NODE) == !strcmp(text, "per-node"));
	CHECK((daemons == DAEMONS_PER_GPU) == !strcmp(text, "per-gpu"));
}

/* Nothing, auto, one size for all GPUs, or sizes for some; whatever else it is, it is wrong. */
static void check_mem_option(const char *text)
{
	struct mem_option option;
	const char *problem = mem_option(text, &option);
	unsigned int given = 0, equal = 0;

	CHECK(!problem || (*problem && strlen(problem) < 200));
	if (problem)
		return;
	for (unsigned int gpu = 0; gpu < GPUS_MAX; gpu++) {
		given += option.mib[gpu] != 0;
		equal += option.mib[gpu] == option.mib[0];
		CHECK(option.mib[gpu] <= 999999999ULL << 20);
	}
	CHECK(option.automatic == !strcmp(text, "auto"));
	CHECK(option.by_gpu == (strchr(text, ':') != NULL));
	CHECK(option.by_gpu ? given > 0 : equal == GPUS_MAX);
	CHECK((given == 0) == (!*text || option.automatic));
}

static void check_options(char *parts[PARTS])
{
	char shown[48];

	check_daemons_option(parts[DAEMONS]);
	check_mem_option(parts[MEM]);
	CHECK(threads_tenths(parts[THREADS]) <= 1000);
	CHECK(client_priority(parts[PRIORITY]) >= -1 && client_priority(parts[PRIORITY]) <= 1);
	printable(shown, sizeof(shown), parts[THREADS]);
	CHECK(strlen(shown) < sizeof(shown));
}

static void check_ready(const struct verdict *verdict)
{
	CHECK(verdict->gpu_count > 0 && verdict->threads_tenths > 0 && verdict->threads_tenths <= 1000);
	CHECK(verdict->clients_per_gpu > 0);
	CHECK(verdict->daemon_count == (verdict->per_gpu ? verdict->gpu_count : 1));
	CHECK(IS_WORD(verdict->python) && IS_WORD(verdict->probe) && verdict->explain[0]);
	for (unsigned int i = 0; i < verdict->gpu_count; i++)
		CHECK(verdict_daemon_of(verdict, &verdict->gpus[i]) == &verdict->daemons[verdict->per_gpu ? i : 0]);
}

void check_verdict(const struct verdict *verdict)
{
	CHECK(verdict->status != VERDICT_NONE);
	CHECK(IS_TEXT(verdict->message) && IS_TEXT(verdict->python) && IS_TEXT(verdict->probe));
	CHECK(verdict->gpu_count <= GPUS_MAX && verdict->daemon_count <= GPUS_MAX);
	for (unsigned int i = 0; i < verdict->gpu_count; i++)
		CHECK(IS_WORD(verdict->gpus[i].uuid) && !strchr(verdict->gpus[i].uuid, ','));
	for (unsigned int i = 0; i < verdict->daemon_count && verdict->status == VERDICT_READY; i++)
		CHECK(IS_WORD(verdict->daemons[i].pipe_directory) && IS_WORD(verdict->daemons[i].log_directory));
	if (verdict->status == VERDICT_READY)
		check_ready(verdict);
	else
		CHECK(verdict->message[0]);
}

/* A step has what its job has, or less. */
void check_limits(const struct verdict *verdict, const struct limits *limits)
{
	CHECK(limits->threads_tenths > 0 && limits->threads_tenths <= verdict->threads_tenths);
	CHECK(limits->priority == 1 || limits->priority == verdict->priority);
	for (unsigned int gpu = 0; gpu < verdict->gpu_count; gpu++) {
		uint64_t job = verdict_daemon_of(verdict, &verdict->gpus[gpu])->mib;

		CHECK(!job || (limits->mib[gpu] && limits->mib[gpu] <= job));
		CHECK(limits->mib[gpu] == job || limits->mib[gpu] >= verdict->mib_min);
		CHECK(limits->mib[gpu] == job || limits->mib[gpu] <= verdict->gpus[gpu].mib);
	}
}

/* What the tasks on a GPU have together is there, and nobody has more than before. */
static void check_divided(const struct verdict *verdict, const struct task_gpus *task,
			  const unsigned int tasks_on[GPUS_MAX], const struct limits *before, const struct limits *after)
{
	CHECK(after->tasks_on_gpu > 0 && after->threads_tenths <= before->threads_tenths);
	CHECK(!verdict->threads_tenths_min || after->threads_tenths > 0);
	for (unsigned int gpu = 0; gpu < verdict->gpu_count; gpu++) {
		CHECK(tasks_on[gpu] <= verdict->clients_per_gpu);
		CHECK(!before->mib[gpu] || (after->mib[gpu] && after->mib[gpu] <= before->mib[gpu]));
	}
	for (unsigned int i = 0; i < task->count; i++) {
		size_t gpu = (size_t)(task->gpus[i] - verdict->gpus);

		CHECK(after->tasks_on_gpu >= tasks_on[gpu]);
		CHECK(!before->divide_threads || tasks_on[gpu] * after->threads_tenths <= 1000);
		CHECK(!before->divide_memory[gpu] || (after->mib[gpu] > 0 && after->mib[gpu] * tasks_on[gpu] <=
						 verdict->gpus[gpu].mib_for_clients));
	}
}

/* Divide by the tasks. Returns: whether the step can go on, on which all its tasks must be of one opinion. */
static bool divide(const struct verdict *verdict, const struct task_gpus *task, const uint8_t *bytes,
		   struct limits *limits)
{
	static const struct task_gpus none;
	unsigned int tasks_on[GPUS_MAX] = { 0 };
	const struct limits before = *limits;
	struct limits others = *limits;
	char message[VERDICT_MESSAGE_MAX] = "", to_others[VERDICT_MESSAGE_MAX] = "";
	bool divided;

	for (unsigned int gpu = 0; gpu < GPUS_MAX && bytes[gpu]; gpu++)
		tasks_on[gpu] = bytes[gpu];
	for (unsigned int i = 0; i < task->count; i++)
		if (!tasks_on[task->gpus[i] - verdict->gpus])
			tasks_on[task->gpus[i] - verdict->gpus] = 1; /* the task itself */
	divided = limits_divide(verdict, task, tasks_on, limits, message, sizeof(message));
	CHECK(limits_divide(verdict, &none, tasks_on, &others, to_others, sizeof(to_others)) == divided);
	CHECK(!strcmp(message, to_others) && divided == !message[0]);
	if (divided)
		check_divided(verdict, task, tasks_on, &before, limits);
	return divided;
}

/* The entry of a device in a list such as "0=1024M,2=512M", which has it at most once; 0: none. */
static unsigned long long entry_of(const char *value, unsigned int wanted)
{
	unsigned long long found = 0;

	while (*value) {
		unsigned int device;
		unsigned long long mib;
		int used = 0;

		CHECK(sscanf(value, "%u=%lluM%n", &device, &mib, &used) == 2 && used > 0 && mib > 0);
		CHECK(device < GPUS_MAX && !(device == wanted && found));
		if (device == wanted)
			found = mib;
		value += used;
		CHECK(!*value || (*value == ',' && value[1]));
		value += *value == ',';
	}
	return found;
}

/* No device of the task's is above the step's limit, which is named where the daemon does not give it anyway. */
void check_memory_value(const char *value, const struct verdict *verdict, const struct limits *limits,
			const struct task_gpus *task)
{
	unsigned int count = task->count ? task->count : 1;

	for (unsigned int device = 0; device < GPUS_MAX; device++) {
		unsigned long long mib = entry_of(value, device);
		size_t gpu = task->count && device < count ? (size_t)(task->gpus[device] - verdict->gpus) : 0;
		uint64_t given = verdict_daemon_of(verdict, &verdict->gpus[gpu])->mib;

		CHECK(device < count || !mib);
		if (device >= count || !limits->mib[gpu])
			continue;
		CHECK(mib <= limits->mib[gpu]);
		CHECK(mib || limits->mib[gpu] == given);
	}
}

static void run_task(const struct verdict *verdict, struct limits *limits, char *parts[PARTS])
{
	static char value[GPUS_MAX * sizeof(verdict->gpus[0].uuid)];
	static struct task_gpus task;
	uint8_t tasks_on[GPUS_MAX] = { 0 };

	memcpy(tasks_on, parts[TASKS_ON], strnlen(parts[TASKS_ON], sizeof(tasks_on)));
	if (!task_gpus(verdict, *parts[VISIBLE] ? parts[VISIBLE] : NULL, *parts[TASKS_ON], &task))
		return;
	CHECK(task.count <= verdict->gpu_count);
	for (unsigned int i = 0; i < task.count; i++)
		CHECK(task.ordinals[i] < (verdict->per_gpu ? 1 : verdict->gpu_count));
	task_gpus_list(&task, true, value, sizeof(value));
	task_gpus_list(&task, false, value, sizeof(value));
	if (!divide(verdict, &task, tasks_on, limits) || !limits->threads_tenths)
		return;
	limits_threads_value(limits, *parts[OWN_THREADS] ? parts[OWN_THREADS] : NULL, value, sizeof(value));
	CHECK(threads_tenths(value) > 0 && threads_tenths(value) <= limits->threads_tenths);
	if (limits_memory_value(verdict, limits, &task, parts[OWN_MEM], value, sizeof(value)))
		check_memory_value(value, verdict, limits, &task);
}

/* An option's value as spank_mps.c keeps it: what is wrong was refused. */
static const char *kept(const char *text, bool right, size_t size)
{
	return right && strlen(text) < size ? text : "";
}

/* --mps, --mps-threads, --mps-mem, --mps-priority. */
struct step_options kept_options(char *const four[])
{
	struct mem_option mem;
	enum daemons daemons;

	return (struct step_options){
		.daemons = kept(four[0], daemons_option(four[0], &daemons), OPTION_MAX),
		.threads = kept(four[1], threads_tenths(four[1]) || is_auto(four[1]), OPTION_MAX),
		.mem = kept(four[2], !mem_option(four[2], &mem), MEM_OPTION_MAX),
		.priority = kept(four[3], client_priority(four[3]) >= 0, OPTION_MAX),
	};
}

bool parsers_parse(struct verdict *verdict, char *text)
{
	return parse(verdict, text);
}

void parsers_read(const char *path, struct verdict *verdict)
{
	read_verdict(path, verdict);
}

static void run_step(const struct verdict *verdict, char *parts[PARTS])
{
	const struct step_options options = kept_options(&parts[DAEMONS]);
	char message[VERDICT_MESSAGE_MAX] = "";
	struct limits limits;

	if (!limits_of_step(verdict, &options, &limits, message, sizeof(message))) {
		CHECK(IS_TEXT(message) && message[0]);
		return;
	}
	check_limits(verdict, &limits);
	CHECK(limits_need_task_counts(verdict, &limits, verdict->clients_per_gpu + 1));
	run_task(verdict, &limits, parts);
}

void fuzz_parsers(const uint8_t *data, size_t size)
{
	char *parts[PARTS];
	struct verdict *verdict = calloc(1, sizeof(*verdict));

	(void)split(data, size, parts, PARTS);
	check_options(parts);
	if (verdict && parse(verdict, parts[VERDICT])) {
		check_verdict(verdict);
		if (verdict->status == VERDICT_READY)
			run_step(verdict, parts);
	}
	free_parts(parts, PARTS);
	free(verdict);
}
