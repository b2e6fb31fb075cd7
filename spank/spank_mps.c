/*
 * spank_mps - the options --mps, --mps-threads, --mps-mem and --mps-priority, carried to the prolog and brought into
 * the task. This file has the callbacks that Slurm calls, in their order; submit.c, stepd.c and task.c say by their
 * names where they run.
 *
 * The plugin carries and refuses. The prolog decides whether the job has MPS and under which limits; its verdict says it.
 *
 * Promises:
 *  - A value that does not parse is refused where the user typed it; no job is queued.
 *  - A task of a job that asked for MPS starts with its control daemon's address and limits, or does not start; or,
 *    where the site allows it and the node has a fault, starts without MPS and with a message.
 *  - Nothing here fails in a callback that drains a node (init, init_post_opt and user_init in slurmstepd do).
 *  - A job that did not ask costs two failed open(2) per step.
 */
#include <stdbool.h>
#include <stdint.h>
#include <unistd.h>

#include <slurm/spank.h>
#include <slurm/slurm_version.h>

#include "explain.h"
#include "health.h"
#include "request.h"
#include "rollcall.h"
#include "step.h"
#include "stepd.h"
#include "submit.h"
#include "task.h"

#define TEXT_OF(macro) QUOTED(macro)
#define QUOTED(text) #text

/* For tools that look at the file without loading it (slurm_mps/slurm/plugin_file.py). */
const char slurm_mps_plugin[] = "slurm-mps plugin " SLURM_MPS_VERSION " verdict " TEXT_OF(VERDICT_VERSION) " slurm "
				TEXT_OF(SLURM_VERSION_NUMBER) "\n";

SPANK_PLUGIN(mps, 1)

static struct step step;
static unsigned int tasks_left;

/*
 * How often plugstack.conf names this file: for each line Slurm calls everything once more, in the same memory. What
 * counts tasks, or reads what the call before has set, must not run twice.
 */
static unsigned int lines_in_plugstack;

/* Whether this is the first of the calls that Slurm makes, one for each line. */
static bool is_first(unsigned int *calls)
{
	return (*calls)++ % (lines_in_plugstack ? lines_in_plugstack : 1) == 0;
}

static bool has_mps(void)
{
	return spank_context() == S_CTX_REMOTE && !step.failed && step.verdict.status == VERDICT_READY;
}

/* Everywhere: in srun, sbatch and salloc, and in slurmstepd. */
int slurm_spank_init(spank_t sp, int ac, char **av)
{
	lines_in_plugstack++;
	submit_forget_other_job();
	request_register(sp);
	return ESPANK_SUCCESS;
}

int slurm_spank_init_post_opt(spank_t sp, int ac, char **av)
{
	return submit_carry(sp);
}

/* Once per step on each node, in slurmstepd, as the user. */
int slurm_spank_user_init(spank_t sp, int ac, char **av)
{
	static unsigned int calls;

	if (spank_context() != S_CTX_REMOTE || !is_first(&calls))
		return ESPANK_SUCCESS;
	stepd_judge(sp, &step);
	if (has_mps())
		step.rollcall = rollcall_new();
	return ESPANK_SUCCESS;
}

/*
 * In the task's own process, before the program starts. A task that may not run ends here rather than through the
 * return value, which an admin's `optional` in plugstack.conf would turn into a program that runs without MPS.
 */
int slurm_spank_task_init(spank_t sp, int ac, char **av)
{
	static unsigned int calls;
	char problem[VERDICT_MESSAGE_MAX];

	if (!is_first(&calls))
		return ESPANK_SUCCESS;
	stepd_judge(sp, &step);
	if (!step.failed && task_prepare(sp, &step, problem, sizeof(problem)))
		return ESPANK_SUCCESS;
	if (!step.failed && rollcall_first(step.rollcall))
		slurm_error("mps: this task cannot start%s: %s", stepd_on_node(), problem);
	_exit(step.verdict.exit_status ? step.verdict.exit_status : EXIT_REFUSED);
}

/* In slurmstepd, as root, when a task is forked. */
int slurm_spank_task_post_fork(spank_t sp, int ac, char **av)
{
	static unsigned int calls;
	uint32_t rank = 0;
	pid_t pid = 0;

	if (!is_first(&calls) || !has_mps())
		return ESPANK_SUCCESS;
	tasks_left++;
	if (spank_get_item(sp, S_TASK_GLOBAL_ID, &rank) == ESPANK_SUCCESS &&
	    spank_get_item(sp, S_TASK_PID, &pid) == ESPANK_SUCCESS)
		explain_task(rank, pid);
	return ESPANK_SUCCESS;
}

/* In slurmstepd, as root, at its end; no task may have been started. */
int slurm_spank_exit(spank_t sp, int ac, char **av)
{
	if (spank_context() == S_CTX_REMOTE)
		health_stop(&step.health);
	return ESPANK_SUCCESS;
}

/* In slurmstepd, as root, before srun learns that a task has ended. */
int slurm_spank_task_exit(spank_t sp, int ac, char **av)
{
	static unsigned int calls;
	uint32_t rank = 0;
	uid_t uid = 0;
	int status = 0;

	if (!is_first(&calls) || !has_mps())
		return ESPANK_SUCCESS;
	if (!--tasks_left)
		health_stop(&step.health);
	if (rollcall_failed(step.rollcall))
		return ESPANK_SUCCESS;
	if (spank_get_item(sp, S_TASK_EXIT_STATUS, &status) != ESPANK_SUCCESS)
		return ESPANK_SUCCESS;
	if (status)
		health_mark(step.job_id, &step.verdict);
	if (spank_get_item(sp, S_TASK_GLOBAL_ID, &rank) == ESPANK_SUCCESS &&
	    spank_get_item(sp, S_JOB_UID, &uid) == ESPANK_SUCCESS)
		explain_exit(&step, uid, task_is_job_script(sp), stepd_on_node(), rank, status);
	return ESPANK_SUCCESS;
}
