#include "stepd.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <slurm/slurm_version.h>

#include "request.h"

const char *stepd_on_node(void)
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

static void fail(struct step *step, const char *message)
{
	step->failed = true;
	slurm_error("mps: job %u%s: %s", step->job_id, stepd_on_node(), message);
}

/* Slurm gives the job's tasks what was carried to the prolog under SLURM_SPANK_. */
static bool job_asked(spank_t sp)
{
	char value[8];

	return request_asks() || spank_getenv(sp, "SLURM_SPANK_MPS", value, sizeof(value)) == ESPANK_SUCCESS;
}

/*
 * Slurm keeps one set of plugin options for all components of a heterogeneous job: one that has no GPU did not ask.
 * Its user could set the variable, and gains nothing: there is no GPU to use.
 */
static bool is_component(spank_t sp)
{
	char value[16];

	return spank_getenv(sp, "SLURM_HET_SIZE", value, sizeof(value)) == ESPANK_SUCCESS;
}

/* A job that had this one's id left it, and no prolog of this one's has run. */
static bool is_anothers(spank_t sp, const struct verdict *verdict)
{
	uid_t uid = 0;

	return verdict->uid != UNSAID && spank_get_item(sp, S_JOB_UID, &uid) == ESPANK_SUCCESS && uid != verdict->uid;
}

/* The socket itself is open to all (O25): make sure that root listens on it, not whoever got there first. */
static bool root_listens(int fd)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);

	return !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) && peer.uid == 0;
}

static bool is_roots_socket(const char *path)
{
	struct stat status;

	return !lstat(path, &status) && S_ISSOCK(status.st_mode) && status.st_uid == 0;
}

/*
 * Whether root's control daemon listens in its pipe directory. Where its queue is full nobody knows who listens there,
 * and the socket's owner has to do; it accepts nobody while it starts a server, and a step need not wait for that.
 */
static bool daemon_answers(const struct verdict_daemon *daemon)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int length = snprintf(address.sun_path, sizeof(address.sun_path), "%s/control", daemon->pipe_directory);
	bool answers;
	int fd;

	if (length < 0 || (size_t)length >= sizeof(address.sun_path))
		return false;
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); /* O39 */
	if (fd < 0)
		return false;
	if (!connect(fd, (const struct sockaddr *)&address, sizeof(address)))
		answers = root_listens(fd);
	else
		answers = errno == EAGAIN && is_roots_socket(address.sun_path);
	(void)close(fd);
	return answers;
}

const char *stepd_trouble(const struct step *step, const struct verdict_gpu *gpu)
{
	static char untried[2 * VERDICT_PROGRAM_MAX + 192], silent[sizeof(untried)];
	const struct verdict *verdict = &step->verdict;

	if (!step->answers[verdict_daemon_of(verdict, gpu) - verdict->daemons])
		return "its MPS control daemon on this node does not answer; submit the job again";
	switch (health_wait(verdict, &step->health, (unsigned int)(gpu - verdict->gpus))) {
	case HEALTH_REFUSES:
		return "its MPS server accepts no programs until every program that a GPU fault hit, or that hangs, has ended; end "
		       "those, or the job";
	case HEALTH_UNTRIED:
		(void)snprintf(untried, sizeof(untried),
			       "cannot test its MPS server on this node after an earlier step failed: %s -I -S %s does not run; "
			       "was slurm-mps moved or removed?", verdict->python, verdict->probe);
		return untried;
	case HEALTH_UNKNOWN:
	case HEALTH_SILENT:
		(void)snprintf(silent, sizeof(silent),
			       "cannot tell whether its MPS server on this node recovered after an earlier step failed: %s -I -S %s "
			       "did not answer; start the step again", verdict->python, verdict->probe);
		return silent;
	case HEALTH_GOOD:
		break;
	}
	return NULL;
}

static void ask_daemons(struct step *step)
{
	for (unsigned int i = 0; i < step->verdict.daemon_count; i++)
		step->answers[i] = daemon_answers(&step->verdict.daemons[i]);
	health_try(step->job_id, &step->verdict, &step->health);
}

void stepd_judge(spank_t sp, struct step *step)
{
	const struct step_options options_given = { request.daemons, request.threads, request.mem, request.priority };
	char message[VERDICT_MESSAGE_MAX];

	if (step->known)
		return;
	step->known = true;
	if (spank_get_item(sp, S_JOB_ID, &step->job_id) != ESPANK_SUCCESS) {
		if (job_asked(sp))
			fail(step, "slurmstepd does not tell the job's id");
		return;
	}
	verdict_read(step->job_id, &step->verdict);
	if (step->verdict.status == VERDICT_NONE && job_asked(sp))
		verdict_read_elsewhere(step->job_id, &step->verdict);
	if (is_anothers(sp, &step->verdict)) {
		fail(step, "another user's job with this id left its state on this node; tell your admin to run slurm-mps "
			   "reconcile there, and to check that the Prolog runs slurm-mps");
		return;
	}
	if (step->verdict.exit_status == EXIT_NO_GPU && is_component(sp)) {
		step->verdict.status = VERDICT_NONE;
		return;
	}
	switch (step->verdict.status) {
	case VERDICT_READY:
		if (request.off)
			fail(step, "--mps=off: this job has MPS, and a step cannot be without; give it to the sbatch, salloc or "
				   "srun that makes the job");
		else if (limits_of_step(&step->verdict, &options_given, &step->limits, message, sizeof(message)))
			ask_daemons(step);
		else
			fail(step, message);
		break;
	case VERDICT_REFUSED:
		fail(step, step->verdict.message);
		break;
	case VERDICT_WITHOUT:
		slurm_error("mps: job %u%s: RUNS WITHOUT MPS on this node, with no limits, as this site wants it: %s", step->job_id,
			    stepd_on_node(), step->verdict.message);
		break;
	case VERDICT_NONE:
		if (job_asked(sp))
			fail(step, "MPS was asked for, but no prolog set it up on this node: give --mps to sbatch, "
				   "salloc or the srun that makes the job; if you did, tell your admin that "
				   "slurm-mps is not in the Prolog of this node");
		break;
	}
}
