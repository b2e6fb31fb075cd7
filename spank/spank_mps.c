/*
 * spank_mps - the options --mps, --mps-threads, --mps-mem and --mps-priority, carried to the prolog and brought into the task.
 *
 * Runs in srun, sbatch and salloc as the user, and in slurmstepd for each task. It carries and refuses, it decides
 * nothing: whether the job has MPS and under which limits was decided by the prolog, and stands in its verdict.
 *
 * Promises:
 *  - A value that does not parse is refused where the user typed it; no job is queued.
 *  - A task of a job that asked for MPS starts with its control daemon's address and limits, or does not start.
 *  - Nothing here fails in a hook that drains a node (init, init_post_opt and user_init in slurmstepd do).
 *  - A job that did not ask costs one failed open(2) per step.
 */
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <slurm/spank.h>

#include "devices.h"
#include "limits.h"
#include "options.h"
#include "verdict.h"

SPANK_PLUGIN(mps, 1)

enum { OPTION_MPS, OPTION_THREADS, OPTION_MEM, OPTION_PRIORITY };

static struct {
	bool asked;
	char threads[OPTION_MAX];
	char mem[OPTION_MAX];
	char priority[OPTION_MAX];
} request;

/* What slurmstepd found for this step, before it forked the tasks. */
static struct {
	bool known;
	bool failed;
	struct verdict verdict;
	struct limits limits;
} step;

/* As many UUIDs as a verdict holds, with commas; no other variable that is read or set here is as long. */
#define VALUE_MAX (VERDICT_GPUS_MAX * sizeof(((struct verdict_gpu *)0)->uuid))

static int refuse_value(const char *option, const char *value, const char *expected)
{
	char shown[48];

	printable(shown, sizeof(shown), value);
	slurm_error("mps: --%s=%s: expected %s", option, shown, expected);
	return ESPANK_BAD_ARG;
}

/* Both parsers bound the length of what they accept well below OPTION_MAX. */
static void keep(char out[OPTION_MAX], const char *value)
{
	(void)snprintf(out, OPTION_MAX, "%s", value);
}

/* May run several times: Slurm calls it for an option in the environment, then for the same on the command line. */
static int on_option(int which, const char *value, int remote)
{
	(void)remote;
	request.asked = true;
	switch (which) {
	case OPTION_THREADS:
		if (!threads_tenths(value))
			return refuse_value("mps-threads", value ? value : "", THREADS_EXPECTED);
		keep(request.threads, value);
		break;
	case OPTION_MEM:
		if (!mem_mib(value))
			return refuse_value("mps-mem", value ? value : "", MEM_EXPECTED);
		keep(request.mem, value);
		break;
	case OPTION_PRIORITY:
		if (client_priority(value) < 0)
			return refuse_value("mps-priority", value ? value : "", PRIORITY_EXPECTED);
		keep(request.priority, value);
		break;
	default:
		break;
	}
	return ESPANK_SUCCESS;
}

static struct spank_option options[] = {
	{ "mps", NULL, "share this job's GPUs between its processes through CUDA MPS", 0, OPTION_MPS, on_option },
	{ "mps-threads", "PCT", "with MPS, each process gets at most PCT percent of a GPU's threads (implies --mps)",
	  1, OPTION_THREADS, on_option },
	{ "mps-mem", "SIZE", "with MPS, each process gets at most SIZE (M, G or T) of a GPU's memory (implies --mps)",
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
	rc = spank_job_control_setenv(sp, "MPS", "1", 1);
	if (rc == ESPANK_SUCCESS && request.threads[0])
		rc = spank_job_control_setenv(sp, "MPS_THREADS", request.threads, 1);
	if (rc == ESPANK_SUCCESS && request.mem[0])
		rc = spank_job_control_setenv(sp, "MPS_MEM", request.mem, 1);
	if (rc == ESPANK_SUCCESS && request.priority[0])
		rc = spank_job_control_setenv(sp, "MPS_PRIORITY", request.priority, 1);
	if (rc != ESPANK_SUCCESS)
		slurm_error("mps: the request cannot be passed on: %s", spank_strerror(rc));
	return rc;
}

static void fail_step(uint32_t job_id, const char *message)
{
	step.failed = true;
	slurm_error("mps: job %u: %s", job_id, message);
}

/* Find out where this step stands, and if it cannot run say so, once for all its tasks on this node. */
static void judge_step(spank_t sp)
{
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
	verdict_read(job_id, &step.verdict);
	if (step.verdict.status == VERDICT_READY &&
	    !limits_of_step(&step.verdict, request.threads, request.mem, request.priority, &step.limits, message,
			    sizeof(message)))
		fail_step(job_id, message);
	else if (step.verdict.status == VERDICT_REFUSED)
		fail_step(job_id, step.verdict.message);
	else if (step.verdict.status == VERDICT_READY && !verdict_daemon_answers(&step.verdict))
		fail_step(job_id, "its MPS control daemon on this node does not answer");
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
	if (spank_context() == S_CTX_REMOTE)
		judge_step(sp);
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

/* Returns NULL, or why the task cannot start. */
static const char *set_environment(spank_t sp)
{
	static char own[VALUE_MAX], value[VALUE_MAX], uuids[VALUE_MAX];
	static struct task_gpus task;
	const char *visible = task_variable(sp, "CUDA_VISIBLE_DEVICES", own, sizeof(own));

	if (!task_gpus(&step.verdict, visible, &task))
		return "its CUDA_VISIBLE_DEVICES names a GPU that the job does not have";
	task_gpus_list(&task, false, uuids, sizeof(uuids));
	task_gpus_list(&task, step.verdict.ordinals, value, sizeof(value));
	if (task.count && !set_variable(sp, "CUDA_VISIBLE_DEVICES", value))
		return "the environment cannot be set";
	visible = task_variable(sp, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", own, sizeof(own));
	limits_threads_value(&step.limits, visible, value, sizeof(value));
	if (!set_variable(sp, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", value))
		return "the environment cannot be set";
	visible = task_variable(sp, "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", own, sizeof(own));
	if (limits_memory_value(&step.limits, uuids, visible, value, sizeof(value)) &&
	    !set_variable(sp, "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", value))
		return "the environment cannot be set";
	/* Numbered the wrong way round for a limit: 1 is lower than 0. A user's own low priority is kept. */
	visible = task_variable(sp, "CUDA_MPS_CLIENT_PRIORITY", own, sizeof(own));
	if ((step.limits.priority || (visible && strcmp(visible, "1"))) &&
	    !set_variable(sp, "CUDA_MPS_CLIENT_PRIORITY", step.limits.priority ? "1" : "0"))
		return "the environment cannot be set";
	if (!set_variable(sp, "CUDA_MPS_PIPE_DIRECTORY", step.verdict.pipe_directory) ||
	    !set_variable(sp, "CUDA_MPS_LOG_DIRECTORY", step.verdict.log_directory))
		return "the environment cannot be set";
	return NULL;
}

/*
 * In the task's own process, before the program starts. A task that may not run ends here rather than through the
 * return value, which an admin's `optional` in plugstack.conf would turn into a program that runs without MPS.
 */
int slurm_spank_task_init(spank_t sp, int ac, char **av)
{
	const char *problem = NULL;

	(void)ac;
	(void)av;
	judge_step(sp);
	if (!step.failed && step.verdict.status == VERDICT_READY)
		problem = set_environment(sp);
	if (problem)
		slurm_error("mps: this task cannot start: %s", problem);
	if (problem || step.failed)
		_exit(EXIT_FAILURE);
	return ESPANK_SUCCESS;
}
