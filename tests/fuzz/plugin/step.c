/*
 * What the plugin does for a step, with Slurm, the job's directory and the programs that it starts made up: it looks at
 * the servers' health, prepares a task's environment, and says why tasks ended badly.
 *
 * The parts of an input: the verdict; --mps, --mps-threads, --mps-mem, --mps-priority; the variables that the task comes
 * with, in the order of `names`; what the program that explains prints; bytes by which all else is chosen.
 */
#include "fuzz.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "explain.c" /* what they keep is put back between inputs */
#include "health.c"
#include "rollcall.c"
#include "variables.c"

#include "task.h"

#include <slurm/slurm.h>

#define NAMES 14
enum { VERDICT, DAEMONS, THREADS, MEM, PRIORITY, ENVIRONMENT, SAID = ENVIRONMENT + NAMES, BYTES, PARTS };
enum { JOB_ID = 4711, UID = 20001, PID = 1000 };

static const char *const names_of_task[NAMES] = {
	"CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
	"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "CUDA_MPS_CLIENT_PRIORITY", "CUDA_DEVICE_MAX_CONNECTIONS", SET_BY_US, NODE_FAULT,
	"SLURM_GPUS_ON_NODE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE",
	"SLURM_SHARDS_ON_NODE",
};

static char *environment[NAMES]; /* NULL: not set */
static const uint8_t *choices;
static size_t choices_left;
static const struct step *at_work;
static const char *said;
static bool script;
static uint32_t local_tasks;

/* The next byte of the input's last part; 0 when there are no more. */
static uint8_t choose(void)
{
	if (!choices_left)
		return 0;
	choices_left--;
	return *choices++;
}

/* ---- Slurm ---- */

static char **find_variable(const char *name)
{
	for (int i = 0; i < NAMES; i++)
		if (!strcmp(name, names_of_task[i]))
			return &environment[i];
	broken("only these variables are read or set");
}

/* As Slurm's: what does not fit is cut, and the caller is told. */
spank_err_t spank_getenv(spank_t sp, const char *name, char *value, int size)
{
	const char *found = *find_variable(name);

	CHECK(sp && size > 0);
	if (!found)
		return ESPANK_ENV_NOEXIST;
	return snprintf(value, (size_t)size, "%s", found) >= size ? ESPANK_NOSPACE : ESPANK_SUCCESS;
}

spank_err_t spank_setenv(spank_t sp, const char *name, const char *value, int overwrite)
{
	char **variable = find_variable(name);

	CHECK(sp && overwrite);
	free(*variable);
	*variable = strdup(value);
	return ESPANK_SUCCESS;
}

spank_err_t spank_unsetenv(spank_t sp, const char *name)
{
	char **variable = find_variable(name);

	CHECK(sp);
	free(*variable);
	*variable = NULL;
	return ESPANK_SUCCESS;
}

spank_err_t spank_get_item(spank_t sp, spank_item_t item, ...)
{
	va_list arguments;
	uint32_t *number;

	CHECK(sp && (item == S_JOB_STEPID || item == S_JOB_LOCAL_TASK_COUNT || item == S_TASK_ID));
	va_start(arguments, item);
	number = va_arg(arguments, uint32_t *);
	va_end(arguments);
	if (item == S_JOB_STEPID)
		*number = script ? SLURM_BATCH_SCRIPT : 0;
	else
		*number = local_tasks - (item == S_TASK_ID); /* the last of them */
	return ESPANK_SUCCESS;
}

/* What goes into a job's output and slurmd's log: one line, of printable characters. */
static void check_line(const char *format, va_list arguments)
{
	char line[2 * LINE_MAX_BYTES];
	int length = vsnprintf(line, sizeof(line), format, arguments);

	CHECK(length > 0 && (size_t)length < sizeof(line));
	for (const char *c = line; *c; c++)
		CHECK(*c >= ' ' && *c <= '~');
}

void slurm_error(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	check_line(format, arguments);
	va_end(arguments);
}

void slurm_spank_log(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	check_line(format, arguments);
	va_end(arguments);
}

/* ---- The job's directory, and the programs ---- */

int jobdir_open(uint32_t job_id)
{
	CHECK(job_id == JOB_ID);
	return choose() == 1 ? -1 : dup(2);
}

bool jobdir_read_mark(int directory, const char *name, struct timespec *when)
{
	CHECK(directory >= 0 && *name);
	*when = (struct timespec){ .tv_sec = choose(), .tv_nsec = choose() };
	if (choose() & 1)
		when->tv_sec += time(NULL);
	return choose() & 1;
}

void jobdir_write_mark(int directory, const char *name)
{
	CHECK(directory >= 0 && !strcmp(name, EXPLAINED));
}

/* Each name in a list of GPUs is whole. */
static void check_gpus(const char *list)
{
	while (*list) {
		size_t length = strcspn(list, ",");
		bool known = false;

		for (unsigned int i = 0; i < at_work->verdict.gpu_count; i++)
			known |= strlen(at_work->verdict.gpus[i].uuid) == length &&
				 !memcmp(at_work->verdict.gpus[i].uuid, list, length);
		CHECK(known);
		list += length + (list[length] == ',');
	}
}

static const char *variable_of(char *const given[], const char *name)
{
	for (; *given; given++)
		if (!strncmp(*given, name, strlen(name)) && (*given)[strlen(name)] == '=')
			return *given + strlen(name) + 1;
	broken("the probe is told its daemon and its GPUs");
}

static const struct verdict_daemon *daemon_of(const char *pipe_directory)
{
	for (unsigned int i = 0; i < at_work->verdict.daemon_count; i++)
		if (!strcmp(at_work->verdict.daemons[i].pipe_directory, pipe_directory))
			return &at_work->verdict.daemons[i];
	broken("a daemon of the verdict's");
}

static bool all_of(const char *text, const char *characters)
{
	return *text && strspn(text, characters) == strlen(text);
}

/* job, since, script or step, memory, tasks and at times explained, as slurm_mps/task/explain.py reads them */
static void check_question(char *const argv[])
{
	const char *tasks = argv[8];

	CHECK(!strcmp(argv[4], "4711") && all_of(argv[5], "0123456789.,") && !strcmp(argv[6], script ? "script" : "step"));
	CHECK(!strcmp(argv[7], "auto") || !strcmp(argv[7], "-") || all_of(argv[7], "0123456789"));
	CHECK(!argv[9] || (!strcmp(argv[9], EXPLAINED) && script && !argv[10]));
	for (unsigned int i = 0; i < seen.count; i++) {
		unsigned int rank;
		int pid, used = 0;

		CHECK(sscanf(tasks, "%u:%d:%n", &rank, &pid, &used) == 2 && used > 0 && pid == PID + (int)i);
		tasks += used + strspn(tasks + used, "-0123456789");
		CHECK(*tasks == (i + 1 < seen.count ? ',' : '\0'));
		tasks += *tasks == ',';
	}
}

pid_t helper_start(uid_t uid, char *const argv[], char *const given[], int output)
{
	const char *pipe_directory;

	CHECK(!strcmp(argv[0], at_work->verdict.python) && !strcmp(argv[1], "-I") && !strcmp(argv[2], "-S"));
	if (output >= 0) {
		CHECK(uid == UID && !strcmp(argv[3], at_work->verdict.explain));
		check_question(argv);
		(void)!write(output, said, strlen(said));
		return choose() == 1 ? -1 : PID;
	}
	CHECK(!strcmp(argv[3], at_work->verdict.probe) && argv[4][strspn(argv[4], "0123456789.")] == 0 && !argv[5]);
	pipe_directory = variable_of(given, "CUDA_MPS_PIPE_DIRECTORY");
	CHECK(strlen(daemon_of(pipe_directory)->log_directory) == strlen(variable_of(given, "CUDA_MPS_LOG_DIRECTORY")) ||
	      at_work->verdict.per_gpu);
	check_gpus(variable_of(given, "CUDA_VISIBLE_DEVICES"));
	return choose() == 1 ? -1 : PID;
}

const char *stepd_trouble(const struct step *step, const struct verdict_gpu *gpu)
{
	unsigned int number = (unsigned int)(gpu - step->verdict.gpus);

	return health_wait(&step->verdict, &step->health, number) == HEALTH_GOOD ? NULL : "it is in trouble";
}

bool helper_beside(void (*work)(const void *argument), const void *argument)
{
	if (choose() == 1)
		return false;
	work(argument);
	return true;
}

int helper_end(pid_t pid, atomic_int *tries_left)
{
	static const int ends[] = { 0, 3, HELPER_LATE, HELPER_DIED, 1, 126, 255 };

	CHECK(*tries_left > 0);
	return pid < 0 ? HELPER_DIED : ends[choose() % (sizeof(ends) / sizeof(ends[0]))];
}

/* ---- What is promised of a task ---- */

static const char *value_of(const char *name)
{
	return *find_variable(name);
}

/* The task's devices, by what it sees: its daemon where each GPU has one, else the names or ordinals of its GPUs. */
static void find_devices(const struct step *step, struct task_gpus *task)
{
	const struct verdict *verdict = &step->verdict;
	const char *list = value_of("CUDA_VISIBLE_DEVICES");

	task->count = 0;
	for (size_t length; list && *list; list += length + (list[length] == ',')) {
		length = strcspn(list, ",");
		for (unsigned int i = 0; i < verdict->gpu_count; i++) {
			char ordinal[12];
			const char *name = verdict->ordinals ? ordinal : verdict->gpus[i].uuid;
			bool own = !verdict->per_gpu || verdict_daemon_of(verdict, &verdict->gpus[i]) ==
							       daemon_of(value_of("CUDA_MPS_PIPE_DIRECTORY"));

			(void)snprintf(ordinal, sizeof(ordinal), "%u", verdict->per_gpu ? 0 : i);
			if (own && strlen(name) == length && !memcmp(name, list, length)) {
				task->gpus[task->count++] = &verdict->gpus[i];
				break;
			}
		}
	}
}

static void check_ready_task(const struct step *step)
{
	static struct task_gpus task;
	const struct limits *limits = &step->limits;
	const char *threads = value_of("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE");
	const char *memory = value_of("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT");
	const char *priority = value_of("CUDA_MPS_CLIENT_PRIORITY");
	const char *connections = value_of("CUDA_DEVICE_MAX_CONNECTIONS");
	bool limited = false;

	CHECK(!strcmp(daemon_of(value_of("CUDA_MPS_PIPE_DIRECTORY"))->log_directory, value_of("CUDA_MPS_LOG_DIRECTORY")) ||
	      step->verdict.per_gpu);
	CHECK(threads ? threads_tenths(threads) > 0 && threads_tenths(threads) <= limits->threads_tenths
		      : limits->threads_tenths == step->verdict.threads_tenths);
	find_devices(step, &task);
	for (unsigned int i = 0; i < task.count; i++)
		limited |= limits->mib[task.gpus[i] - step->verdict.gpus] != 0;
	limited |= !task.count && limits->mib[0];
	if (limited && (task.count || !step->verdict.per_gpu))
		check_memory_value(memory ? memory : "", &step->verdict, limits, &task);
	CHECK(!priority || !strcmp(priority, "1") || (!strcmp(priority, "0") && !limits->priority));
	CHECK(priority || limits->priority == step->verdict.priority);
	CHECK(limits->tasks_on_gpu <= CLIENTS_OF_ANY_KIND || !strcmp(connections, "1") || !strcmp(connections, "2"));
	CHECK(!value_of(NODE_FAULT));
}

static void check_task_without(const struct step *step)
{
	CHECK(!strcmp(value_of("CUDA_MPS_PIPE_DIRECTORY"), "/dev/null"));
	CHECK(!strcmp(value_of(NODE_FAULT), step->verdict.message));
	CHECK(!value_of("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT") && !value_of("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"));
}

static void run_task(struct step *step)
{
	char problem[VERDICT_MESSAGE_MAX] = "";

	note[0] = '\0';
	step->rollcall = rollcall_new();
	local_tasks = choose();
	script = choose() & 1;
	for (unsigned int gpu = 0; gpu < step->verdict.gpu_count; gpu++)
		step->rollcall->parts[gpu] = WHOLE * (choose() % 64);
	step->rollcall->answered = local_tasks; /* all the others; who waits for more waits two seconds */
	if (!task_prepare((spank_t)step, step, problem, sizeof(problem)))
		CHECK(IS_TEXT(problem) && problem[0]);
	else if (step->verdict.status == VERDICT_READY)
		check_ready_task(step);
	else
		check_task_without(step);
	(void)munmap(step->rollcall, sizeof(*step->rollcall));
}

/* ---- What is promised of a step ---- */

static void check_health(const struct step *step)
{
	for (unsigned int gpu = 0; gpu < GPUS_MAX; gpu++) {
		enum server_health found = gpu < step->verdict.gpu_count ? health_wait(&step->verdict, &step->health, gpu)
									 : HEALTH_GOOD;

		CHECK(found == HEALTH_GOOD || (step->health.probed[gpu] && found > HEALTH_GOOD && found <= HEALTH_SILENT));
	}
}

static void run_explain(const struct step *step)
{
	unsigned int tasks = choose() * 4U;

	memset(&seen, 0, sizeof(seen));
	for (unsigned int i = 0; i < tasks; i++)
		explain_task(choose() % 3 ? i : UINT32_MAX - i, PID + (pid_t)i);
	for (unsigned int i = 0; i < tasks && choices_left; i++) {
		int status = choose();

		explain_exit(step, UID, script, choose() & 1 ? "" : " on n1", i, choose() & 1 ? status : status << 8);
	}
}

/* Root writes no GPU twice, and by its UUID the promises know it again. */
static bool has_a_gpu_twice(const struct verdict *verdict)
{
	for (unsigned int i = 0; i < verdict->gpu_count; i++)
		for (unsigned int j = 0; j < i; j++)
			if (!strcmp(verdict->gpus[i].uuid, verdict->gpus[j].uuid))
				return true;
	return false;
}

static bool fill_step(struct step *step, char *parts[PARTS])
{
	const struct step_options options = kept_options(&parts[DAEMONS]);
	char message[VERDICT_MESSAGE_MAX];

	step->known = true;
	step->job_id = JOB_ID;
	if (!parsers_parse(&step->verdict, parts[VERDICT]) || has_a_gpu_twice(&step->verdict))
		return false;
	if (step->verdict.status == VERDICT_WITHOUT)
		return true;
	return step->verdict.status == VERDICT_READY &&
	       limits_of_step(&step->verdict, &options, &step->limits, message, sizeof(message));
}

void fuzz_step(const uint8_t *data, size_t size)
{
	char *parts[PARTS];
	struct step *step = calloc(1, sizeof(*step));

	choices_left = split(data, size, parts, PARTS);
	choices = (const uint8_t *)parts[BYTES];
	said = parts[SAID];
	at_work = step;
	for (int i = 0; i < NAMES; i++)
		environment[i] = *parts[ENVIRONMENT + i] ? strdup(parts[ENVIRONMENT + i]) : NULL;
	if (step && fill_step(step, parts)) {
		if (step->verdict.status == VERDICT_READY) {
			health_try(JOB_ID, &step->verdict, &step->health);
			check_health(step);
		}
		run_task(step);
		if (step->verdict.status == VERDICT_READY)
			run_explain(step);
	}
	if (step && step->health.probes)
		(void)munmap(step->health.probes, sizeof(*step->health.probes));
	for (int i = 0; i < NAMES; i++)
		free(environment[i]);
	free_parts(parts, PARTS);
	free(step);
}
