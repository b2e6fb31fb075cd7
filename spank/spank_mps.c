/*
 * spank_mps - the options --mps, --mps-threads, --mps-mem and --mps-priority, carried to the prolog and brought into
 * the task.
 *
 * Runs in srun, sbatch and salloc as the user, and in slurmstepd for each task. It carries and refuses, it decides
 * nothing: whether the job has MPS and under which limits was decided by the prolog, and stands in its verdict.
 *
 * Promises:
 *  - A value that does not parse is refused where the user typed it; no job is queued.
 *  - A task of a job that asked for MPS starts with its control daemon's address and limits, or does not start; or,
 *    where the site wants it so when the node cannot do its part, without MPS, which is said.
 *  - Nothing here fails in a hook that drains a node (init, init_post_opt and user_init in slurmstepd do).
 *  - A job that did not ask costs two failed open(2) per step.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <slurm/slurm.h>
#include <slurm/spank.h>

#include "devices.h"
#include "limits.h"
#include "options.h"
#include "rollcall.h"
#include "suspect.h"
#include "verdict.h"

SPANK_PLUGIN(mps, 1)

enum { OPTION_MPS, OPTION_THREADS, OPTION_MEM, OPTION_PRIORITY };

static struct {
	bool asked;
	char daemons[OPTION_MAX];
	char threads[OPTION_MAX];
	char mem[MEM_OPTION_MAX];
	char priority[OPTION_MAX];
} request;

/* What slurmstepd found for this step, before it forked the tasks. */
static struct {
	bool known;
	bool failed;
	uint32_t job_id;
	bool suspect;           /* a task of an earlier step ended badly, at this time */
	struct timespec since;
	struct verdict verdict;
	struct limits limits;
	struct rollcall *rollcall;
} step;

/* As many UUIDs as a verdict holds, with commas; no other variable that is read or set here is as long. */
#define VALUE_MAX (GPUS_MAX * sizeof(((struct verdict_gpu *)0)->uuid))

/* In a task that runs without MPS: why. Programs and `slurm-mps verify` may look. */
#define NODE_FAULT "SLURM_MPS_NODE_FAULT"

/* No control daemon can be there; where the variable is not set the driver looks in /tmp/nvidia-mps (O61). */
#define NO_PIPE_DIRECTORY "/dev/null"

/* More clients than these on a GPU must be content with two connections each. */
#define CLIENTS_OF_ANY_KIND 48

static int refuse_value(const char *option, const char *value, const char *problem)
{
	char shown[48];

	printable(shown, sizeof(shown), value ? value : "");
	slurm_error("mps: --%s=%s: %s", option, shown, problem);
	return ESPANK_BAD_ARG;
}

/* Keep a value that was read; what the parsers accept fits, but for a list with more zeros than anybody needs. */
static int keep(char *out, size_t size, const char *option, const char *value)
{
	if (value && strlen(value) >= size)
		return refuse_value(option, value, "it is too long");
	(void)snprintf(out, size, "%s", value ? value : "");
	return ESPANK_SUCCESS;
}

static int on_mem(const char *value)
{
	struct mem_option mem;
	const char *problem = value && *value ? mem_option(value, &mem) : "expected " MEM_EXPECTED;

	if (problem)
		return refuse_value("mps-mem", value, problem);
	return keep(request.mem, sizeof(request.mem), "mps-mem", value);
}

/* May run several times: Slurm calls it for an option in the environment, then for the same on the command line. */
static int on_option(int which, const char *value, int remote)
{
	enum daemons daemons;

	(void)remote;
	request.asked = true;
	switch (which) {
	case OPTION_MPS:
		if (!daemons_option(value, &daemons))
			return refuse_value("mps", value, "expected " DAEMONS_EXPECTED);
		return daemons == DAEMONS_UNSAID ? ESPANK_SUCCESS :
						   keep(request.daemons, sizeof(request.daemons), "mps", value);
	case OPTION_THREADS:
		if (!threads_tenths(value) && !is_auto(value))
			return refuse_value("mps-threads", value, "expected " THREADS_EXPECTED);
		return keep(request.threads, sizeof(request.threads), "mps-threads", value);
	case OPTION_MEM:
		return on_mem(value);
	case OPTION_PRIORITY:
		if (client_priority(value) < 0)
			return refuse_value("mps-priority", value, "expected " PRIORITY_EXPECTED);
		return keep(request.priority, sizeof(request.priority), "mps-priority", value);
	default:
		return ESPANK_SUCCESS;
	}
}

static struct spank_option options[] = {
	{ "mps", "per-node|per-gpu",
	  "share this job's GPUs between its processes through CUDA MPS, with one control daemon on each node "
	  "(so does --mps alone) or on each GPU",
	  2, OPTION_MPS, on_option },
	{ "mps-threads", "PCT|auto",
	  "with MPS, each process gets at most PCT percent of a GPU's threads, or as much as is left when all ranks "
	  "that share it get the same (implies --mps)",
	  1, OPTION_THREADS, on_option },
	{ "mps-mem", "SIZE|auto",
	  "with MPS, each process gets at most SIZE (M, G or T) of a GPU's memory, or an even part of it; with "
	  "--mps=per-gpu also GPU:SIZE,... (implies --mps)",
	  1, OPTION_MEM, on_option },
	{ "mps-priority", "normal|low", "with MPS, how each process's work is ranked on the GPU (implies --mps)", 1,
	  OPTION_PRIORITY, on_option },
};

static void unset(const char *prefix, const char *const names[], size_t count)
{
	char name[96];

	for (size_t i = 0; i < count; i++) {
		(void)snprintf(name, sizeof(name), "%s%s", prefix, names[i]);
		(void)unsetenv(name);
	}
}

/*
 * Inside a job the request of its submission stands in the environment, for the sruns that make its steps. Whoever
 * makes a new job from there (sbatch, salloc, or srun where the variables have outlived their job) is to have MPS when
 * it asks, not because another job did.
 */
static void forget_another_jobs_request(void)
{
	static const char *const carried[] = { "", "_THREADS", "_MEM", "_PRIORITY" };
	static const char *const given[] = { "", "_threads", "_mem", "_priority" };
	bool in_a_job = getenv("SLURM_JOB_ID") != NULL;
	bool allocates = spank_context() == S_CTX_ALLOCATOR;

	if (!allocates && (spank_context() != S_CTX_LOCAL || in_a_job))
		return;
	unset("SLURM_SPANK_MPS", carried, sizeof(carried) / sizeof(carried[0]));
	(void)unsetenv(NODE_FAULT);
	if (in_a_job)
		unset("SLURM_SPANK__SLURM_SPANK_OPTION_mps_mps", given, sizeof(given) / sizeof(given[0]));
}

/* Slurm gives the job's tasks what was carried to the prolog under SLURM_SPANK_. */
static bool job_asked(spank_t sp)
{
	char value[8];

	return request.asked || spank_getenv(sp, "SLURM_SPANK_MPS", value, sizeof(value)) == ESPANK_SUCCESS;
}

int slurm_spank_init(spank_t sp, int ac, char **av)
{
	(void)ac;
	(void)av;
	forget_another_jobs_request();
	for (size_t i = 0; i < sizeof(options) / sizeof(options[0]); i++)
		if (spank_option_register(sp, &options[i]) != ESPANK_SUCCESS)
			slurm_error("mps: the option --%s cannot be registered", options[i].name);
	return ESPANK_SUCCESS;
}

/* The prolog sees SPANK_MPS, SPANK_MPS_THREADS and so on; it reads them as hostile text all the same. */
int slurm_spank_init_post_opt(spank_t sp, int ac, char **av)
{
	bool submitting = spank_context() == S_CTX_LOCAL || spank_context() == S_CTX_ALLOCATOR;
	int rc;

	(void)ac;
	(void)av;
	if (!submitting || !request.asked)
		return ESPANK_SUCCESS;
	if (strchr(request.mem, ':') && strcmp(request.daemons, "per-gpu") && !getenv("SLURM_JOB_ID")) {
		slurm_error("mps: --mps-mem=%s: one control daemon cannot tell its GPUs apart; ask for --mps=per-gpu, or for one "
			    "size", request.mem);
		return -1; /* Slurm goes on after a positive value */
	}
	rc = spank_job_control_setenv(sp, "MPS", request.daemons[0] ? request.daemons : "1", 1);
	if (rc == ESPANK_SUCCESS && request.threads[0])
		rc = spank_job_control_setenv(sp, "MPS_THREADS", request.threads, 1);
	if (rc == ESPANK_SUCCESS && request.mem[0])
		rc = spank_job_control_setenv(sp, "MPS_MEM", request.mem, 1);
	if (rc == ESPANK_SUCCESS && request.priority[0])
		rc = spank_job_control_setenv(sp, "MPS_PRIORITY", request.priority, 1);
	if (rc != ESPANK_SUCCESS)
		slurm_error("mps: the request cannot be passed on: %s", spank_strerror(rc));
	return rc == ESPANK_SUCCESS ? ESPANK_SUCCESS : -1;
}

static void fail_step(uint32_t job_id, const char *message)
{
	step.failed = true;
	slurm_error("mps: job %u: %s", job_id, message);
}

/* After a task that ended badly the server may look well and fail the next program, which is not to be the user's. */
static bool is_well(uint32_t job_id)
{
	step.suspect = suspect_marked(job_id, &step.since);
	return !step.suspect || suspect_is_well(&step.verdict);
}

/* Find out where this step stands, and if it cannot run say so, once for all its tasks on this node. */
static void judge_step(spank_t sp)
{
	const struct step_options options_given = { request.daemons, request.threads, request.mem, request.priority };
	char message[VERDICT_MESSAGE_MAX];
	uint32_t job_id = 0;

	if (step.known)
		return;
	step.known = true;
	if (spank_get_item(sp, S_JOB_ID, &job_id) != ESPANK_SUCCESS) {
		if (job_asked(sp))
			fail_step(job_id, "slurmstepd does not tell the job's id");
		return;
	}
	step.job_id = job_id;
	verdict_read(job_id, &step.verdict);
	if (step.verdict.status == VERDICT_READY &&
	    !limits_of_step(&step.verdict, &options_given, &step.limits, message, sizeof(message)))
		fail_step(job_id, message);
	else if (step.verdict.status == VERDICT_REFUSED)
		fail_step(job_id, step.verdict.message);
	else if (step.verdict.status == VERDICT_WITHOUT)
		slurm_error("mps: job %u: RUNS WITHOUT MPS on this node, with no limits, as this site wants it: %s", job_id,
			    step.verdict.message);
	else if (step.verdict.status == VERDICT_READY && !verdict_daemons_answer(&step.verdict))
		fail_step(job_id, "its MPS control daemon on this node does not answer");
	else if (step.verdict.status == VERDICT_READY && !is_well(job_id))
		fail_step(job_id, "its MPS server on this node takes no programs: one that an earlier step's fault has hit, or "
				  "that hangs, is still there; end it, or the job");
	else if (step.verdict.status == VERDICT_NONE && job_asked(sp))
		fail_step(job_id, "MPS was asked for, but no prolog set it up on this node: give --mps to sbatch, salloc "
				  "or the srun that makes the job; if you did, tell your admin that slurm-mps is not "
				  "in the Prolog of this node");
}

/* Runs once per step on each node, as the user; failing here would drain the node, so the tasks do it. */
int slurm_spank_user_init(spank_t sp, int ac, char **av)
{
	(void)ac;
	(void)av;
	if (spank_context() != S_CTX_REMOTE)
		return ESPANK_SUCCESS;
	judge_step(sp);
	if (!step.failed && step.verdict.status == VERDICT_READY)
		step.rollcall = rollcall_new();
	return ESPANK_SUCCESS;
}

/* A variable of the task; NULL when it is not set, or longer than any value of it that makes sense. */
static const char *task_variable(spank_t sp, const char *name, char *value, size_t size)
{
	return spank_getenv(sp, name, value, (int)size) == ESPANK_SUCCESS ? value : NULL;
}

static bool set_variable(spank_t sp, const char *name, const char *value)
{
	return spank_setenv(sp, name, value, 1) == ESPANK_SUCCESS;
}

/* Whether this is the job's script or an interactive shell: one task, which starts the programs that count. */
static bool is_script(spank_t sp)
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

static bool count_ranks(spank_t sp, const struct task_gpus *task, unsigned int tasks, unsigned int ranks[GPUS_MAX],
			char *problem, size_t size)
{
	if (!is_script(sp)) {
		if (rollcall_answer(step.rollcall, &step.verdict, task, tasks, ranks))
			return true;
		(void)snprintf(problem, size, "the tasks of this step did not all come as far as to say which GPUs they have");
		return false;
	}
	tasks = tasks_of_job(sp);
	if (!tasks) {
		(void)snprintf(problem, size, "--mps-%s=auto divides by the tasks that share a GPU, and the job does not say how "
					      "many it has on this node; give -n or --ntasks-per-node",
			       step.limits.divide_threads ? "threads" : "mem");
		return false;
	}
	for (unsigned int i = 0; i < task->count; i++)
		ranks[task->gpus[i] - step.verdict.gpus] = (tasks + task->count - 1) / task->count;
	return true;
}

/* Find the task's GPUs, and its part of those that it shares. Returns: false with `problem` filled. */
static bool find_gpus(spank_t sp, struct task_gpus *task, char *problem, size_t size)
{
	static char visible[VALUE_MAX];
	unsigned int ranks[GPUS_MAX] = { 0 };
	uint32_t tasks = 1;

	if (!task_gpus(&step.verdict, task_variable(sp, "CUDA_VISIBLE_DEVICES", visible, sizeof(visible)), task)) {
		(void)snprintf(problem, size, "its CUDA_VISIBLE_DEVICES names a GPU that the job does not have");
		return false;
	}
	if (step.verdict.per_gpu && task->count > 1 && is_script(sp)) {
		slurm_spank_log("mps: with --mps=per-gpu this script itself sees no GPU, only what it starts with srun, one for "
				"each task (--gpus-per-task=1, --ntasks-per-gpu)");
		task->count = 0;
		return true;
	}
	if (step.verdict.per_gpu && task->count > 1) {
		(void)snprintf(problem, size, "with --mps=per-gpu a task can use one GPU, and it has %u; bind each to its own "
					      "(--gpus-per-task=1, --ntasks-per-gpu, --gpu-bind=single:1), or ask for "
					      "--mps=per-node", task->count);
		return false;
	}
	if (spank_get_item(sp, S_JOB_LOCAL_TASK_COUNT, &tasks) != ESPANK_SUCCESS) {
		(void)snprintf(problem, size, "slurmstepd does not tell how many tasks it has");
		return false;
	}
	if (!limits_need_ranks(&step.verdict, &step.limits, tasks))
		return true;
	return count_ranks(sp, task, tasks, ranks, problem, size) &&
	       limits_divide(&step.verdict, task, ranks, &step.limits, problem, size);
}

/* Which GPUs the program sees. */
static bool set_visible(spank_t sp, const struct task_gpus *task, bool hidden)
{
	static char value[VALUE_MAX];

	if (hidden)
		return set_variable(sp, "CUDA_VISIBLE_DEVICES", NO_DEVICES);
	if (!task->count)
		return true;
	task_gpus_list(task, step.verdict.ordinals, value, sizeof(value));
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

static bool set_limit(spank_t sp, const struct limit_variable *variable, const char *value)
{
	return set_variable(sp, variable->name, value) && set_variable(sp, variable->mark, value);
}

/* What the program may have of them. A value of the user's own that is valid and lower is kept. */
static bool set_limits(spank_t sp, const struct task_gpus *task)
{
	static char own[VALUE_MAX], value[VALUE_MAX];
	const char *given = users_own(sp, &threads_variable, own, sizeof(own));

	limits_threads_value(&step.limits, given, value, sizeof(value));
	if (!set_limit(sp, &threads_variable, value))
		return false;
	given = users_own(sp, &memory_variable, own, sizeof(own));
	if (limits_memory_value(&step.verdict, &step.limits, task, given, value, sizeof(value)) &&
	    !set_limit(sp, &memory_variable, value))
		return false;
	/* So many clients fit only with few connections each (M5). */
	given = task_variable(sp, "CUDA_DEVICE_MAX_CONNECTIONS", own, sizeof(own));
	if (step.limits.ranks > CLIENTS_OF_ANY_KIND && !(given && (!strcmp(given, "1") || !strcmp(given, "2"))) &&
	    !set_variable(sp, "CUDA_DEVICE_MAX_CONNECTIONS", "2"))
		return false;
	/* Numbered the wrong way round for a limit: 1 is lower than 0. A user's own low priority is kept. */
	given = task_variable(sp, "CUDA_MPS_CLIENT_PRIORITY", own, sizeof(own));
	return !(step.limits.priority || (given && strcmp(given, "1"))) ||
	       set_variable(sp, "CUDA_MPS_CLIENT_PRIORITY", step.limits.priority ? "1" : "0");
}

/* Where the program finds its control daemon. */
static bool set_daemon(spank_t sp, const struct task_gpus *task)
{
	const struct verdict_gpu *gpu = task->count ? task->gpus[0] : &step.verdict.gpus[0];
	const struct verdict_daemon *daemon = verdict_daemon_of(&step.verdict, gpu);

	return set_variable(sp, "CUDA_MPS_PIPE_DIRECTORY", daemon->pipe_directory) &&
	       set_variable(sp, "CUDA_MPS_LOG_DIRECTORY", daemon->log_directory);
}

static bool prepare_task(spank_t sp, char *problem, size_t size)
{
	static struct task_gpus task;
	bool hidden;

	if (!find_gpus(sp, &task, problem, size))
		return false;
	hidden = step.verdict.per_gpu && !task.count && is_script(sp);
	(void)spank_unsetenv(sp, NODE_FAULT); /* of a script on another node */
	if (set_visible(sp, &task, hidden) && set_limits(sp, &task) && set_daemon(sp, &task))
		return true;
	(void)snprintf(problem, size, "the environment cannot be set");
	return false;
}

/* The program runs without MPS: no daemon of anybody's is to be found, and no variable promises what does not hold. */
static bool prepare_task_without(spank_t sp, char *problem, size_t size)
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
	    set_variable(sp, NODE_FAULT, step.verdict.message))
		return true;
	(void)snprintf(problem, size, "the environment cannot be set");
	return false;
}

/* Returns: false with `problem` filled when the task cannot start. */
static bool prepare(spank_t sp, char *problem, size_t size)
{
	switch (step.verdict.status) {
	case VERDICT_READY:
		return prepare_task(sp, problem, size);
	case VERDICT_WITHOUT:
		return prepare_task_without(sp, problem, size);
	default:
		return true;
	}
}

/*
 * In the task's own process, before the program starts. A task that may not run ends here rather than through the
 * return value, which an admin's `optional` in plugstack.conf would turn into a program that runs without MPS.
 */
int slurm_spank_task_init(spank_t sp, int ac, char **av)
{
	char problem[VERDICT_MESSAGE_MAX];

	(void)ac;
	(void)av;
	judge_step(sp);
	if (!step.failed && prepare(sp, problem, sizeof(problem)))
		return ESPANK_SUCCESS;
	if (!step.failed && rollcall_first(step.rollcall))
		slurm_error("mps: this task cannot start: %s", problem);
	_exit(EXIT_FAILURE);
}

/* As root, when the tasks are forked: the server was found well, and the next step need not look again. */
int slurm_spank_task_post_fork(spank_t sp, int ac, char **av)
{
	(void)sp;
	(void)ac;
	(void)av;
	if (step.suspect && !step.failed)
		suspect_clear(step.job_id, &step.since);
	step.suspect = false;
	return ESPANK_SUCCESS;
}

/* As root, before srun learns that a task has ended. */
int slurm_spank_task_exit(spank_t sp, int ac, char **av)
{
	int status = 0;

	(void)ac;
	(void)av;
	if (spank_context() != S_CTX_REMOTE || step.failed || step.verdict.status != VERDICT_READY)
		return ESPANK_SUCCESS;
	if (spank_get_item(sp, S_TASK_EXIT_STATUS, &status) == ESPANK_SUCCESS && status)
		suspect_mark(step.job_id);
	return ESPANK_SUCCESS;
}
