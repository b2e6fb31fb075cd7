#include "task.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <slurm/slurm.h>

#include "stepd.h"
#include "variables.h"

/* No control daemon can be there; where the variable is not set the driver looks in /tmp/nvidia-mps (O61). */
#define NO_PIPE_DIRECTORY "/dev/null"

static const char *slurms_variable(spank_t sp, const char *name, char *value, size_t size)
{
	return spank_getenv(sp, name, value, (int)size) == ESPANK_SUCCESS ? value : NULL;
}

bool task_is_job_script(spank_t sp)
{
	uint32_t step_id = 0;

	return spank_get_item(sp, S_JOB_STEPID, &step_id) == ESPANK_SUCCESS &&
	       (step_id == SLURM_BATCH_SCRIPT || step_id == SLURM_INTERACTIVE_STEP);
}

/* How many tasks the job gave this node, the first of its own; 0 when it did not say. */
static unsigned int tasks_of_job(spank_t sp)
{
	char value[VALUE_MAX];

	if (!slurms_variable(sp, "SLURM_NTASKS", value, sizeof(value)) &&
	    !slurms_variable(sp, "SLURM_NTASKS_PER_NODE", value, sizeof(value)))
		return 0;
	if (!slurms_variable(sp, "SLURM_TASKS_PER_NODE", value, sizeof(value)))
		return 0;
	return (unsigned int)strtoul(value, NULL, 10); /* "4(x2),1": the script runs on the first */
}

static bool count_tasks(spank_t sp, const struct step *step, const struct task_gpus *task, unsigned int tasks,
			unsigned int tasks_on[GPUS_MAX], char *problem, size_t size)
{
	if (!task_is_job_script(sp)) {
		return rollcall_answer(step->rollcall, &step->verdict, task, tasks, tasks_on) ||
		       refuse_with(problem, size, "some tasks of this step never reported their GPUs");
	}
	tasks = tasks_of_job(sp);
	if (!tasks && step->limits.share_divides)
		tasks = 1;
	if (!tasks)
		return refuse_with(problem, size, "--mps-%s=auto divides by the tasks that share a GPU, and the job does not say "
						  "how many it has on this node; give -n or --ntasks-per-node",
				   step->limits.divide_threads ? "threads" : "mem");
	for (unsigned int i = 0; i < task->count; i++)
		tasks_on[task->gpus[i] - step->verdict.gpus] = (tasks + task->count - 1) / task->count;
	return true;
}

/* A task without a GPU is given the first one's daemon, should it find a way to one (set_daemon). */
static bool is_in_trouble(struct step *step, const struct task_gpus *task, char *problem, size_t size)
{
	for (unsigned int i = 0; i < (task->count ? task->count : 1); i++) {
		const struct verdict_gpu *gpu = task->count ? task->gpus[i] : &step->verdict.gpus[0];
		const char *trouble = task->count || !step->verdict.per_gpu ? stepd_trouble(step, gpu) : NULL;

		if (trouble) {
			(void)snprintf(problem, size, "%s (%s)", trouble, gpu->uuid);
			step->verdict.exit_status = EXIT_NO_SERVER;
			return true;
		}
	}
	return false;
}

/* How many shards Slurm gave the task's step on this node; 0 where it gave none. */
static unsigned int shards_of_step(spank_t sp)
{
	char value[VALUE_MAX];

	if (!slurms_variable(sp, "SLURM_SHARDS_ON_NODE", value, sizeof(value)) || strlen(value) > 4)
		return 0;
	return (unsigned int)strtoul(value, NULL, 10);
}

/* Unbound tasks have all slices of their step; CUDA would show the first to each of them. */
static void take_one(struct task_gpus *task, unsigned int which)
{
	task->gpus[0] = task->gpus[which];
	task->ordinals[0] = task->ordinals[which];
	task->count = 1;
}

/* Find the task's GPUs, and its part of those that it shares. Returns: false with `problem` filled. */
static bool find_gpus(spank_t sp, struct step *step, struct task_gpus *task, char *problem, size_t size)
{
	static char value[VALUE_MAX];
	unsigned int tasks_on[GPUS_MAX] = { 0 };
	bool has_gpus = slurms_variable(sp, "SLURM_GPUS_ON_NODE", value, sizeof(value)) != NULL;
	const char *visible;
	uint32_t tasks = 1;
	int local_id = 0;

	visible = variable_get(sp, VISIBLE_DEVICES, value, sizeof(value));
	if (visible && gpus_named(visible) > step->verdict.gpu_count) /* S26 */
		return refuse_with(problem, size, "it has %u GPUs here, and Slurm named %u to the prolog; ask for GPUs of one type",
				   gpus_named(visible), step->verdict.gpu_count);
	if (!task_gpus(&step->verdict, visible, has_gpus, task))
		return refuse_with(problem, size, "its CUDA_VISIBLE_DEVICES names a GPU that the job does not have");
	if (step->verdict.per_gpu && task->count > 1 && task_is_job_script(sp)) {
		slurm_spank_log("mps: each GPU of this job has a control daemon of its own, so this script sees none; each task that "
				"it starts with srun sees one (--gpus-per-task=1, --ntasks-per-gpu)");
		task->count = 0;
		return true;
	}
	if (task->count > 1 && device_is_slice(task->gpus[0]) && spank_get_item(sp, S_TASK_ID, &local_id) == ESPANK_SUCCESS)
		take_one(task, (unsigned int)local_id % task->count);
	if (step->verdict.per_gpu && task->count > 1)
		return refuse_with(problem, size, "with --mps=per-gpu a task can use one GPU, and it has %u; bind each to its own "
						  "(--gpus-per-task=1, --ntasks-per-gpu, --gpu-bind=single:1), or ask for "
						  "--mps=per-node", task->count);
	if (spank_get_item(sp, S_JOB_LOCAL_TASK_COUNT, &tasks) != ESPANK_SUCCESS)
		return refuse_with(problem, size, "slurmstepd does not tell how many tasks it has");
	limits_of_share(&step->verdict, shards_of_step(sp), &step->limits);
	if (limits_need_task_counts(&step->verdict, &step->limits, tasks) &&
	    (!count_tasks(sp, step, task, tasks, tasks_on, problem, size) ||
	     !limits_divide(&step->verdict, task, tasks_on, &step->limits, problem, size)))
		return false;
	/* Last: it may wait, and until this task is counted the others wait for it. */
	return !is_in_trouble(step, task, problem, size);
}

/* Which GPUs the program sees. */
static bool set_visible(spank_t sp, const struct step *step, const struct task_gpus *task, bool hidden)
{
	static char value[VALUE_MAX];

	if (hidden)
		return variable_set(sp, VISIBLE_DEVICES, NO_DEVICES);
	if (!task->count)
		return true;
	task_gpus_list(task, step->verdict.ordinals, value, sizeof(value));
	return variable_set(sp, VISIBLE_DEVICES, value);
}

/*
 * The daemon's own limit is each client's. A variable is set where the step's is another, and where the user has set
 * one: what of it is lower and valid is kept, and one that the driver cannot use would lift the limit (O12).
 */
static bool set_limit(spank_t sp, enum variable variable, const char *value, const char *plain)
{
	return strcmp(value, plain) ? variable_keep(sp, variable, value) : variable_set(sp, variable, value);
}

static bool set_threads(spank_t sp, const struct step *step)
{
	static char own[VALUE_MAX], value[VALUE_MAX], plain[VALUE_MAX];
	const char *given = variable_get(sp, THREAD_PERCENTAGE, own, sizeof(own));

	if (!given && !step->verdict.joined && step->limits.threads_tenths == step->verdict.threads_tenths)
		return true;
	limits_threads_value(&step->limits, given, value, sizeof(value));
	limits_threads_value(&step->limits, NULL, plain, sizeof(plain));
	return set_limit(sp, THREAD_PERCENTAGE, value, plain);
}

static bool set_memory(spank_t sp, const struct step *step, const struct task_gpus *task)
{
	static char own[VALUE_MAX], value[VALUE_MAX], plain[VALUE_MAX];
	const char *given = variable_get(sp, MEMORY_LIMIT, own, sizeof(own));

	if (!limits_memory_value(&step->verdict, &step->limits, task, given, value, sizeof(value)))
		return true; /* none; the user's own stays */
	if (!limits_memory_value(&step->verdict, &step->limits, task, NULL, plain, sizeof(plain)))
		plain[0] = '\0';
	return set_limit(sp, MEMORY_LIMIT, value, plain);
}

/* Numbered the wrong way round for a limit: 1 is lower than 0. A user's own low priority is kept. */
static bool set_priority(spank_t sp, const struct step *step)
{
	static char own[VALUE_MAX];
	const char *given = variable_get(sp, CLIENT_PRIORITY, own, sizeof(own));

	if (given ? !strcmp(given, "1") : !step->verdict.joined && step->limits.priority == step->verdict.priority)
		return true;
	return variable_set(sp, CLIENT_PRIORITY, step->limits.priority ? "1" : "0");
}

/* So many clients fit only with few connections each (M5). */
static bool set_connections(spank_t sp, const struct step *step)
{
	static char own[VALUE_MAX];
	const char *given = variable_get(sp, MAX_CONNECTIONS, own, sizeof(own));

	if (step->limits.tasks_on_gpu <= CLIENTS_OF_ANY_KIND || (given && (!strcmp(given, "1") || !strcmp(given, "2"))))
		return true;
	return variable_set(sp, MAX_CONNECTIONS, "2");
}

/* Where the program finds its control daemon. */
static bool set_daemon(spank_t sp, const struct step *step, const struct task_gpus *task)
{
	const struct verdict_gpu *gpu = task->count ? task->gpus[0] : &step->verdict.gpus[0];
	const struct verdict_daemon *daemon = verdict_daemon_of(&step->verdict, gpu);

	return variable_set(sp, PIPE_DIRECTORY, daemon->pipe_directory) &&
	       variable_set(sp, LOG_DIRECTORY, daemon->log_directory);
}

static bool prepare_ready(spank_t sp, struct step *step, char *problem, size_t size)
{
	static struct task_gpus task;
	bool hidden;

	if (!find_gpus(sp, step, &task, problem, size))
		return false;
	hidden = step->verdict.per_gpu && !task.count && task_is_job_script(sp);
	if (set_visible(sp, step, &task, hidden) && set_threads(sp, step) && set_memory(sp, step, &task) &&
	    set_priority(sp, step) && set_connections(sp, step) && set_daemon(sp, step, &task))
		return true;
	return refuse_with(problem, size, "the environment cannot be set");
}

/* The program runs without MPS: no daemon of anybody's is to be found, and no variable promises what does not hold. */
static bool prepare_without(spank_t sp, const struct step *step, char *problem, size_t size)
{
	static const enum variable promises[] = { LOG_DIRECTORY, THREAD_PERCENTAGE, MEMORY_LIMIT, CLIENT_PRIORITY };

	for (size_t i = 0; i < sizeof(promises) / sizeof(promises[0]); i++)
		variable_unset(sp, promises[i]);
	if (variable_set(sp, PIPE_DIRECTORY, NO_PIPE_DIRECTORY) && variables_set_node_fault(sp, step->verdict.message))
		return true;
	return refuse_with(problem, size, "the environment cannot be set");
}

bool task_prepare(spank_t sp, struct step *step, char *problem, size_t size)
{
	variables_forget(sp);
	switch (step->verdict.status) {
	case VERDICT_READY:
		return prepare_ready(sp, step, problem, size);
	case VERDICT_WITHOUT:
		return prepare_without(sp, step, problem, size);
	default:
		return true;
	}
}
