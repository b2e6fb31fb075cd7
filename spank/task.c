#include "task.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <slurm/slurm.h>

/* As many UUIDs as a verdict holds, with commas; no other variable that is read or set here is as long. */
#define VALUE_MAX (GPUS_MAX * sizeof(((struct verdict_gpu *)0)->uuid))

/* In a task that runs without MPS: why. Programs and `slurm-mps verify` may look. */
#define NODE_FAULT "SLURM_MPS_NODE_FAULT"

/* No control daemon can be there; where the variable is not set the driver looks in /tmp/nvidia-mps (O61). */
#define NO_PIPE_DIRECTORY "/dev/null"

/* A variable of the task; NULL when it is not set, or longer than any value of it that makes sense. */
static const char *task_variable(spank_t sp, const char *name, char *value, size_t size)
{
	return spank_getenv(sp, name, value, (int)size) == ESPANK_SUCCESS ? value : NULL;
}

static bool set_variable(spank_t sp, const char *name, const char *value)
{
	return spank_setenv(sp, name, value, 1) == ESPANK_SUCCESS;
}

bool task_is_script(spank_t sp)
{
	uint32_t step_id = 0;

	return spank_get_item(sp, S_JOB_STEPID, &step_id) == ESPANK_SUCCESS &&
	       (step_id == SLURM_BATCH_SCRIPT || step_id == SLURM_INTERACTIVE_STEP);
}

/* How many tasks the job gave this node, the first of its own; 0 when it did not say. */
static unsigned int tasks_of_job(spank_t sp)
{
	char value[VALUE_MAX];

	if (!task_variable(sp, "SLURM_NTASKS", value, sizeof(value)) &&
	    !task_variable(sp, "SLURM_NTASKS_PER_NODE", value, sizeof(value)))
		return 0;
	if (!task_variable(sp, "SLURM_TASKS_PER_NODE", value, sizeof(value)))
		return 0;
	return (unsigned int)strtoul(value, NULL, 10); /* "4(x2),1": the script runs on the first */
}

static bool count_ranks(spank_t sp, const struct step *step, const struct task_gpus *task, unsigned int tasks,
			unsigned int ranks[GPUS_MAX], char *problem, size_t size)
{
	if (!task_is_script(sp)) {
		if (rollcall_answer(step->rollcall, &step->verdict, task, tasks, ranks))
			return true;
		(void)snprintf(problem, size, "the tasks of this step did not all come as far as to say which GPUs they have");
		return false;
	}
	tasks = tasks_of_job(sp);
	if (!tasks) {
		(void)snprintf(problem, size, "--mps-%s=auto divides by the tasks that share a GPU, and the job does not say how "
					      "many it has on this node; give -n or --ntasks-per-node",
			       step->limits.divide_threads ? "threads" : "mem");
		return false;
	}
	for (unsigned int i = 0; i < task->count; i++)
		ranks[task->gpus[i] - step->verdict.gpus] = (tasks + task->count - 1) / task->count;
	return true;
}

/* A task without a GPU is given the first one's daemon, should it find a way to one (set_daemon). */
static bool is_in_trouble(const struct step *step, const struct task_gpus *task, char *problem, size_t size)
{
	for (unsigned int i = 0; i < (task->count ? task->count : 1); i++) {
		const struct verdict_gpu *gpu = task->count ? task->gpus[i] : &step->verdict.gpus[0];
		const char *trouble = step->trouble[gpu - step->verdict.gpus];

		if (trouble && (task->count || !step->verdict.per_gpu)) {
			(void)snprintf(problem, size, "%s (%s)", trouble, gpu->uuid);
			return true;
		}
	}
	return false;
}

/* Find the task's GPUs, and its part of those that it shares. Returns: false with `problem` filled. */
static bool find_gpus(spank_t sp, struct step *step, struct task_gpus *task, char *problem, size_t size)
{
	static char value[VALUE_MAX];
	unsigned int ranks[GPUS_MAX] = { 0 };
	bool has_gpus = task_variable(sp, "SLURM_GPUS_ON_NODE", value, sizeof(value)) != NULL;
	uint32_t tasks = 1;

	if (!task_gpus(&step->verdict, task_variable(sp, "CUDA_VISIBLE_DEVICES", value, sizeof(value)), has_gpus, task)) {
		(void)snprintf(problem, size, "its CUDA_VISIBLE_DEVICES names a GPU that the job does not have");
		return false;
	}
	if (step->verdict.per_gpu && task->count > 1 && task_is_script(sp)) {
		slurm_spank_log("mps: with --mps=per-gpu this script itself sees no GPU, only what it starts with srun, one for "
				"each task (--gpus-per-task=1, --ntasks-per-gpu)");
		task->count = 0;
		return true;
	}
	if (step->verdict.per_gpu && task->count > 1) {
		(void)snprintf(problem, size, "with --mps=per-gpu a task can use one GPU, and it has %u; bind each to its own "
					      "(--gpus-per-task=1, --ntasks-per-gpu, --gpu-bind=single:1), or ask for "
					      "--mps=per-node", task->count);
		return false;
	}
	if (is_in_trouble(step, task, problem, size))
		return false;
	if (spank_get_item(sp, S_JOB_LOCAL_TASK_COUNT, &tasks) != ESPANK_SUCCESS) {
		(void)snprintf(problem, size, "slurmstepd does not tell how many tasks it has");
		return false;
	}
	if (!limits_need_ranks(&step->verdict, &step->limits, tasks))
		return true;
	return count_ranks(sp, step, task, tasks, ranks, problem, size) &&
	       limits_divide(&step->verdict, task, ranks, &step->limits, problem, size);
}

/* Which GPUs the program sees. */
static bool set_visible(spank_t sp, const struct step *step, const struct task_gpus *task, bool hidden)
{
	static char value[VALUE_MAX];

	if (hidden)
		return set_variable(sp, "CUDA_VISIBLE_DEVICES", NO_DEVICES);
	if (!task->count)
		return true;
	task_gpus_list(task, step->verdict.ordinals, value, sizeof(value));
	return set_variable(sp, "CUDA_VISIBLE_DEVICES", value);
}

/* A limit as the driver reads it, and beside it what the plugin set, by which it knows its own again. */
struct limit_variable {
	const char *name;
	const char *mark;
};

static const struct limit_variable threads_variable = { "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
							 "SLURM_MPS_ACTIVE_THREAD_PERCENTAGE" };
static const struct limit_variable memory_variable = { "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
						       "SLURM_MPS_PINNED_DEVICE_MEM_LIMIT" };

/*
 * The user's own value of a limit; NULL when there is none. What a script got from the plugin its sruns inherit, and
 * that is no wish of the user's: with auto it would be the script's part of the GPU, not the step's.
 */
static const char *users_own(spank_t sp, const struct limit_variable *variable, char *value, size_t size)
{
	static char mark[VALUE_MAX];

	if (!task_variable(sp, variable->name, value, size))
		return NULL;
	if (task_variable(sp, variable->mark, mark, sizeof(mark)) && !strcmp(mark, value))
		return NULL;
	return value;
}

static bool is_the_plugins(spank_t sp, const struct limit_variable *variable)
{
	static char value[VALUE_MAX], mark[VALUE_MAX];

	return task_variable(sp, variable->name, value, sizeof(value)) &&
	       task_variable(sp, variable->mark, mark, sizeof(mark)) && !strcmp(mark, value);
}

static void forget_limit(spank_t sp, const struct limit_variable *variable)
{
	if (is_the_plugins(sp, variable))
		(void)spank_unsetenv(sp, variable->name);
	(void)spank_unsetenv(sp, variable->mark);
}

/* Set a limit; `plain` is what it would be without the user's own value, and what else it is stays the user's. */
static bool set_limit(spank_t sp, const struct limit_variable *variable, const char *value, const char *plain)
{
	if (strcmp(value, plain))
		(void)spank_unsetenv(sp, variable->mark);
	else if (!set_variable(sp, variable->mark, value))
		return false;
	return set_variable(sp, variable->name, value);
}

static bool set_threads(spank_t sp, const struct step *step)
{
	static char own[VALUE_MAX], value[VALUE_MAX], plain[VALUE_MAX];

	limits_threads_value(&step->limits, users_own(sp, &threads_variable, own, sizeof(own)), value, sizeof(value));
	limits_threads_value(&step->limits, NULL, plain, sizeof(plain));
	return set_limit(sp, &threads_variable, value, plain);
}

static bool set_memory(spank_t sp, const struct step *step, const struct task_gpus *task)
{
	static char own[VALUE_MAX], value[VALUE_MAX], plain[VALUE_MAX];
	const char *given = users_own(sp, &memory_variable, own, sizeof(own));

	if (!limits_memory_value(&step->verdict, &step->limits, task, NULL, plain, sizeof(plain))) {
		forget_limit(sp, &memory_variable); /* of a script that had one; the user's own stays */
		return true;
	}
	(void)limits_memory_value(&step->verdict, &step->limits, task, given, value, sizeof(value));
	return set_limit(sp, &memory_variable, value, plain);
}

/* What the program may have of them. A value of the user's own that is valid and lower is kept. */
static bool set_limits(spank_t sp, const struct step *step, const struct task_gpus *task)
{
	static char own[VALUE_MAX];
	const char *given;

	if (!set_threads(sp, step) || !set_memory(sp, step, task))
		return false;
	/* So many clients fit only with few connections each (M5). */
	given = task_variable(sp, "CUDA_DEVICE_MAX_CONNECTIONS", own, sizeof(own));
	if (step->limits.ranks > CLIENTS_OF_ANY_KIND && !(given && (!strcmp(given, "1") || !strcmp(given, "2"))) &&
	    !set_variable(sp, "CUDA_DEVICE_MAX_CONNECTIONS", "2"))
		return false;
	/* Numbered the wrong way round for a limit: 1 is lower than 0. A user's own low priority is kept. */
	given = task_variable(sp, "CUDA_MPS_CLIENT_PRIORITY", own, sizeof(own));
	return !(step->limits.priority || (given && strcmp(given, "1"))) ||
	       set_variable(sp, "CUDA_MPS_CLIENT_PRIORITY", step->limits.priority ? "1" : "0");
}

/* Where the program finds its control daemon. */
static bool set_daemon(spank_t sp, const struct step *step, const struct task_gpus *task)
{
	const struct verdict_gpu *gpu = task->count ? task->gpus[0] : &step->verdict.gpus[0];
	const struct verdict_daemon *daemon = verdict_daemon_of(&step->verdict, gpu);

	return set_variable(sp, "CUDA_MPS_PIPE_DIRECTORY", daemon->pipe_directory) &&
	       set_variable(sp, "CUDA_MPS_LOG_DIRECTORY", daemon->log_directory);
}

static bool prepare_ready(spank_t sp, struct step *step, char *problem, size_t size)
{
	static struct task_gpus task;
	bool hidden;

	if (!find_gpus(sp, step, &task, problem, size))
		return false;
	hidden = step->verdict.per_gpu && !task.count && task_is_script(sp);
	(void)spank_unsetenv(sp, NODE_FAULT); /* of a script on another node */
	if (set_visible(sp, step, &task, hidden) && set_limits(sp, step, &task) && set_daemon(sp, step, &task))
		return true;
	(void)snprintf(problem, size, "the environment cannot be set");
	return false;
}

/* The program runs without MPS: no daemon of anybody's is to be found, and no variable promises what does not hold. */
static bool prepare_without(spank_t sp, const struct step *step, char *problem, size_t size)
{
	static const char *const names[] = { "CUDA_MPS_LOG_DIRECTORY", "CUDA_MPS_CLIENT_PRIORITY" };
	const struct limit_variable *const limits[] = { &threads_variable, &memory_variable };

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		(void)spank_unsetenv(sp, names[i]);
	for (size_t i = 0; i < sizeof(limits) / sizeof(limits[0]); i++) {
		(void)spank_unsetenv(sp, limits[i]->name);
		(void)spank_unsetenv(sp, limits[i]->mark);
	}
	if (set_variable(sp, "CUDA_MPS_PIPE_DIRECTORY", NO_PIPE_DIRECTORY) &&
	    set_variable(sp, NODE_FAULT, step->verdict.message))
		return true;
	(void)snprintf(problem, size, "the environment cannot be set");
	return false;
}

bool task_prepare(spank_t sp, struct step *step, char *problem, size_t size)
{
	switch (step->verdict.status) {
	case VERDICT_READY:
		return prepare_ready(sp, step, problem, size);
	case VERDICT_WITHOUT:
		return prepare_without(sp, step, problem, size);
	default:
		task_forget_other_job(sp);
		return true;
	}
}

static const char *const daemon_variables[] = { "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY" };

static bool is_a_jobs(const char *pipe_directory)
{
	return pipe_directory && !strncmp(pipe_directory, STATE_DIRECTORY "/jobs/", strlen(STATE_DIRECTORY "/jobs/"));
}

void task_forget_other_job(spank_t sp)
{
	static char value[VALUE_MAX];

	if (!is_a_jobs(task_variable(sp, daemon_variables[0], value, sizeof(value))))
		return;
	for (size_t i = 0; i < sizeof(daemon_variables) / sizeof(daemon_variables[0]); i++)
		(void)spank_unsetenv(sp, daemon_variables[i]);
	forget_limit(sp, &threads_variable);
	forget_limit(sp, &memory_variable);
}

void task_forget_this_job(void)
{
	const struct limit_variable *const limits[] = { &threads_variable, &memory_variable };

	if (getenv(NODE_FAULT))
		(void)unsetenv(daemon_variables[0]);
	(void)unsetenv(NODE_FAULT);
	if (!is_a_jobs(getenv(daemon_variables[0])))
		return;
	for (size_t i = 0; i < sizeof(daemon_variables) / sizeof(daemon_variables[0]); i++)
		(void)unsetenv(daemon_variables[i]);
	for (size_t i = 0; i < sizeof(limits) / sizeof(limits[0]); i++) {
		const char *value = getenv(limits[i]->name), *mark = getenv(limits[i]->mark);

		if (value && mark && !strcmp(value, mark))
			(void)unsetenv(limits[i]->name);
		(void)unsetenv(limits[i]->mark);
	}
}
