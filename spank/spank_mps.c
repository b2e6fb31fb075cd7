/*
 * spank_mps - the options --mps, --mps-threads and --mps-mem, carried to the prolog and brought into the task.
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
#include "options.h"
#include "verdict.h"

SPANK_PLUGIN(mps, 1)

enum { OPTION_MPS, OPTION_THREADS, OPTION_MEM };

static struct {
	bool asked;
	char threads[OPTION_MAX];
	char mem[OPTION_MAX];
} request;

/* What slurmstepd found for this step, before it forked the tasks. */
static struct {
	bool known;
	bool failed;
	struct verdict verdict;
} step;

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
		if (!mem_is_valid(value))
			return refuse_value("mps-mem", value ? value : "", MEM_EXPECTED);
		keep(request.mem, value);
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
};

int slurm_spank_init(spank_t sp, int ac, char **av)
{
	(void)ac;
	(void)av;
	for (size_t i = 0; i < sizeof(options) / sizeof(options[0]); i++)
		if (spank_option_register(sp, &options[i]) != ESPANK_SUCCESS)
			slurm_error("mps: the option --%s cannot be registered", options[i].name);
	return ESPANK_SUCCESS;
}

/* The prolog sees SPANK_MPS, SPANK_MPS_THREADS and SPANK_MPS_MEM; it reads them as hostile text all the same. */
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
	if (rc != ESPANK_SUCCESS)
		slurm_error("mps: the request cannot be passed on: %s", spank_strerror(rc));
	return rc;
}

/* Slurm gives the job's tasks what was carried to the prolog under SLURM_SPANK_. */
static bool job_asked(spank_t sp)
{
	char value[8];

	return request.asked || spank_getenv(sp, "SLURM_SPANK_MPS", value, sizeof(value)) == ESPANK_SUCCESS;
}

static void fail_step(uint32_t job_id, const char *message)
{
	step.failed = true;
	slurm_error("mps: job %u: %s", job_id, message);
}

/* Find out where this step stands, and if it cannot run say so, once for all its tasks on this node. */
static void judge_step(spank_t sp)
{
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
	if (step.verdict.status == VERDICT_REFUSED)
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

/* Keep a thread percentage of the user's own that is valid and lower; a client cannot raise it anyway (O11). */
static bool set_threads(spank_t sp)
{
	const char *limit = step.verdict.thread_percentage;
	char own[OPTION_MAX];

	if (spank_getenv(sp, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", own, sizeof(own)) == ESPANK_SUCCESS) {
		unsigned int tenths = threads_tenths(own);

		if (tenths && tenths < threads_tenths(limit))
			return true;
	}
	return spank_setenv(sp, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", limit, 1) == ESPANK_SUCCESS;
}

/*
 * A value that the driver cannot use lifts the limit altogether (O12), so one that is left over in the user's
 * environment must not reach the program. "0=" is right whatever the task sees: every client has a device 0, and its
 * other devices keep the control daemon's own limit.
 */
static bool set_memory(spank_t sp)
{
	char value[sizeof(step.verdict.memory_limit) + 2];

	if (!step.verdict.memory_limit[0])
		return true;
	(void)snprintf(value, sizeof(value), "0=%s", step.verdict.memory_limit);
	return spank_setenv(sp, "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", value, 1) == ESPANK_SUCCESS;
}

/* Returns NULL, or why the task cannot have its GPUs. */
static const char *set_devices(spank_t sp)
{
	static char uuids[VERDICT_GPUS_MAX * sizeof(step.verdict.gpus[0].uuid)];
	static char visible[sizeof(uuids)];
	bool set = spank_getenv(sp, "CUDA_VISIBLE_DEVICES", visible, sizeof(visible)) == ESPANK_SUCCESS;

	if (!task_gpus(&step.verdict, set ? visible : NULL, uuids, sizeof(uuids)))
		return "its CUDA_VISIBLE_DEVICES names a GPU that the job does not have";
	if (uuids[0] && spank_setenv(sp, "CUDA_VISIBLE_DEVICES", uuids, 1) != ESPANK_SUCCESS)
		return "the environment cannot be set";
	return NULL;
}

static const char *set_environment(spank_t sp)
{
	if (spank_setenv(sp, "CUDA_MPS_PIPE_DIRECTORY", step.verdict.pipe_directory, 1) != ESPANK_SUCCESS ||
	    spank_setenv(sp, "CUDA_MPS_LOG_DIRECTORY", step.verdict.log_directory, 1) != ESPANK_SUCCESS ||
	    !set_threads(sp) || !set_memory(sp))
		return "the environment cannot be set";
	return set_devices(sp);
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
