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

#include <slurm/spank.h>
#include <slurm/slurm_version.h>

#include "explain.h"
#include "limits.h"
#include "options.h"
#include "rollcall.h"
#include "step.h"
#include "suspect.h"
#include "task.h"
#include "verdict.h"

#define TEXT_OF(macro) QUOTED(macro)
#define QUOTED(text) #text

/* For tools that look at the file without loading it (slurm_mps/slurm/plugin_file.py). */
const char slurm_mps_plugin[] = "slurm-mps plugin " SLURM_MPS_VERSION " verdict " TEXT_OF(VERDICT_VERSION) " slurm "
				TEXT_OF(SLURM_VERSION_NUMBER) "\n";

SPANK_PLUGIN(mps, 1)

enum { OPTION_MPS, OPTION_THREADS, OPTION_MEM, OPTION_PRIORITY };

static struct {
	bool asked;
	char daemons[OPTION_MAX];
	char threads[OPTION_MAX];
	char mem[MEM_OPTION_MAX];
	char priority[OPTION_MAX];
} request;

static struct step step;

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
	if (in_a_job)
		unset("SLURM_SPANK__SLURM_SPANK_OPTION_mps_mps", given, sizeof(given) / sizeof(given[0]));
	task_forget_this_job();
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

/*
 * " on n1", for the end of a message's first words. Up to 24.11 slurmstepd begins each line with its own and the node's
 * name, since 25.05 with the time: a user of several nodes could not tell which one it is about.
 */
static const char *on_node(void)
{
#if SLURM_VERSION_NUMBER < SLURM_VERSION_NUM(25, 5, 0)
	return "";
#else
	static char words[72];
	const char *name = getenv("SLURMD_NODENAME");

	if (name)
		(void)snprintf(words, sizeof(words), " on %s", name);
	return words;
#endif
}

static void fail_step(const char *message)
{
	step.failed = true;
	slurm_error("mps: job %u%s: %s", step.job_id, on_node(), message);
}

/* Why no task can use a GPU: its control daemon is gone, or the server takes nobody after what an earlier task did. */
static void find_trouble(void)
{
	static char untried[2 * VERDICT_PROGRAM_MAX + 192], unsaid[sizeof(untried)];
	bool answers[GPUS_MAX] = { false };

	(void)snprintf(untried, sizeof(untried), "its MPS server on this node was not tried after an earlier step ended badly, "
						 "for %s -I -S %s does not run; was slurm-mps moved or removed?",
		       step.verdict.python, step.verdict.probe);
	(void)snprintf(unsaid, sizeof(unsaid), "how its MPS server on this node is after an earlier step ended badly is not "
					       "known, for %s -I -S %s gave no answer; start the step again",
		       step.verdict.python, step.verdict.probe);
	for (unsigned int i = 0; i < step.verdict.daemon_count; i++)
		answers[i] = verdict_daemon_answers(&step.verdict.daemons[i]);
	suspect_look(step.job_id, &step.verdict, &step.suspicion);
	for (unsigned int gpu = 0; gpu < step.verdict.gpu_count; gpu++) {
		const struct verdict_daemon *daemon = verdict_daemon_of(&step.verdict, &step.verdict.gpus[gpu]);

		if (!answers[daemon - step.verdict.daemons])
			step.trouble[gpu] = "its MPS control daemon on this node does not answer";
		else if (step.suspicion.unwell[gpu])
			step.trouble[gpu] = "its MPS server on this node takes no programs: one that an earlier step's fault "
					    "has hit, or that hangs, is still there; end it, or the job";
		else if (step.suspicion.untried[gpu])
			step.trouble[gpu] = step.suspicion.unsaid[gpu] ? unsaid : untried;
	}
}

/* Find out where this step stands, and if it cannot run say so, once for all its tasks on this node. */
static void judge_step(spank_t sp)
{
	const struct step_options options_given = { request.daemons, request.threads, request.mem, request.priority };
	char message[VERDICT_MESSAGE_MAX];

	if (step.known)
		return;
	step.known = true;
	if (spank_get_item(sp, S_JOB_ID, &step.job_id) != ESPANK_SUCCESS) {
		if (job_asked(sp))
			fail_step("slurmstepd does not tell the job's id");
		return;
	}
	verdict_read(step.job_id, &step.verdict);
	if (step.verdict.status == VERDICT_NONE && job_asked(sp))
		verdict_read_elsewhere(step.job_id, &step.verdict);
	switch (step.verdict.status) {
	case VERDICT_READY:
		if (limits_of_step(&step.verdict, &options_given, &step.limits, message, sizeof(message)))
			find_trouble();
		else
			fail_step(message);
		break;
	case VERDICT_REFUSED:
		fail_step(step.verdict.message);
		break;
	case VERDICT_WITHOUT:
		slurm_error("mps: job %u%s: RUNS WITHOUT MPS on this node, with no limits, as this site wants it: %s", step.job_id,
			    on_node(), step.verdict.message);
		break;
	case VERDICT_NONE:
		if (job_asked(sp))
			fail_step("MPS was asked for, but no prolog set it up on this node: give --mps to sbatch, "
					       "salloc or the srun that makes the job; if you did, tell your admin that "
					       "slurm-mps is not in the Prolog of this node");
		break;
	}
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
	if (!step.failed && task_prepare(sp, &step, problem, sizeof(problem)))
		return ESPANK_SUCCESS;
	if (!step.failed && rollcall_first(step.rollcall))
		slurm_error("mps: this task cannot start%s: %s", on_node(), problem);
	_exit(EXIT_FAILURE);
}

/* As root, when the tasks are forked: what was found well the next step need not try again. */
int slurm_spank_task_post_fork(spank_t sp, int ac, char **av)
{
	static bool done;
	uint32_t rank = 0;
	pid_t pid = 0;

	(void)ac;
	(void)av;
	if (step.failed || step.verdict.status != VERDICT_READY)
		return ESPANK_SUCCESS;
	if (!done)
		suspect_clear(step.job_id, &step.verdict, &step.suspicion);
	done = true;
	if (spank_get_item(sp, S_TASK_GLOBAL_ID, &rank) == ESPANK_SUCCESS &&
	    spank_get_item(sp, S_TASK_PID, &pid) == ESPANK_SUCCESS)
		explain_task(rank, pid);
	return ESPANK_SUCCESS;
}

/* As root, before srun learns that a task has ended. */
int slurm_spank_task_exit(spank_t sp, int ac, char **av)
{
	uint32_t rank = 0;
	uid_t uid = 0;
	int status = 0;

	(void)ac;
	(void)av;
	if (spank_context() != S_CTX_REMOTE || step.failed || step.verdict.status != VERDICT_READY ||
	    rollcall_failed(step.rollcall))
		return ESPANK_SUCCESS;
	if (spank_get_item(sp, S_TASK_EXIT_STATUS, &status) != ESPANK_SUCCESS)
		return ESPANK_SUCCESS;
	if (status)
		suspect_mark(step.job_id, &step.verdict);
	if (spank_get_item(sp, S_TASK_GLOBAL_ID, &rank) == ESPANK_SUCCESS &&
	    spank_get_item(sp, S_JOB_UID, &uid) == ESPANK_SUCCESS)
		explain_exit(&step, uid, task_is_script(sp), on_node(), rank, status);
	return ESPANK_SUCCESS;
}
