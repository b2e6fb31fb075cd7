#include "explain.h"

#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <slurm/spank.h>

#include "helper.h"
#include "jobdir.h"
#include "options.h"

#define TASKS_MAX 512
#define TASK_TEXT sizeof("4294967295:2147483647:65535,")
#define TRIES (2000 / HELPER_PAUSE_MS)
#define LINE_MAX_BYTES 1024
#define EXPLAINED "explained"

struct task_note {
	uint32_t rank;
	pid_t pid;
	bool ended;
	int status;
};

static struct {
	struct timespec since;
	unsigned int forked, ended;
	bool bad, looked, explained;
	unsigned int count;
	struct task_note tasks[TASKS_MAX]; /* more than these are not named to the program */
} seen;

void explain_task(uint32_t rank, pid_t pid)
{
	if (!seen.forked++)
		(void)clock_gettime(CLOCK_REALTIME, &seen.since);
	if (seen.count < TASKS_MAX)
		seen.tasks[seen.count++] = (struct task_note){ .rank = rank, .pid = pid };
}

static bool is_a_signal_that_somebody_sent(int number)
{
	return number == SIGTERM || number == SIGKILL || number == SIGINT || number == SIGHUP;
}

/* A task that a signal asked to end did not end badly; a shell reports its program's signal as 128 and the number. */
static bool ended_badly(int status)
{
	if (WIFSIGNALED(status))
		return !is_a_signal_that_somebody_sent(WTERMSIG(status));
	return WEXITSTATUS(status) && !is_a_signal_that_somebody_sent(WEXITSTATUS(status) - 128);
}

/* What one client may have of a GPU: the least that any GPU of the step has. */
static void memory_text(const struct step *step, char *out, size_t size)
{
	uint64_t least = 0;

	for (unsigned int gpu = 0; gpu < step->verdict.gpu_count; gpu++) {
		uint64_t mib = step->limits.mib[gpu];

		if (step->limits.divide_memory[gpu]) {
			(void)snprintf(out, size, "auto");
			return;
		}
		if (mib && (!least || mib < least))
			least = mib;
	}
	(void)snprintf(out, size, least ? "%" PRIu64 : "-", least);
}

static void tasks_text(char *out, size_t size)
{
	size_t at = 0;

	out[0] = '\0';
	for (unsigned int i = 0; i < seen.count && size - at > TASK_TEXT; i++) {
		const struct task_note *task = &seen.tasks[i];

		at += (size_t)snprintf(out + at, size - at, "%s%" PRIu32 ":%d:", i ? "," : "", task->rank, (int)task->pid);
		if (task->ended)
			at += (size_t)snprintf(out + at, size - at, "%d", task->status);
	}
}

static bool is_later(const struct timespec *one, const struct timespec *other)
{
	return one->tv_sec > other->tv_sec || (one->tv_sec == other->tv_sec && one->tv_nsec > other->tv_nsec);
}

/*
 * Write since when each control daemon's logs count: since the tasks were forked, or, where its server was probed, since
 * the probe's end; and for a script not before the time at which one of its steps explained a failure, if one did. What
 * the step explained is not explained again.
 * Returns: whether a step explained a failure.
 */
static bool since_text(const struct step *step, int directory, bool job_script, char *out, size_t size)
{
	struct timespec since = seen.since, explained;
	bool was_explained = job_script && directory >= 0 && jobdir_read_mark(directory, EXPLAINED, &explained) &&
			     is_later(&explained, &since);
	size_t at = 0;

	if (was_explained)
		since = explained;
	for (unsigned int i = 0; i < step->verdict.daemon_count && at < size; i++) {
		struct timespec probed, then = since;

		if (health_probed_until(&step->health, i, &probed) && is_later(&probed, &since))
			then = probed;
		at += (size_t)snprintf(out + at, size - at, "%s%lld.%03ld", i ? "," : "", (long long)then.tv_sec,
				       then.tv_nsec / 1000000);
	}
	return was_explained;
}

/* What the program prints, without its line end; empty when it has nothing to say, or is not done in time. */
static void ask(const struct step *step, uid_t uid, int directory, bool job_script, char *line, size_t size)
{
	static char job_id[16], since[GPUS_MAX * 32], memory[24], tasks[TASKS_MAX * TASK_TEXT];
	bool was_explained = since_text(step, directory, job_script, since, sizeof(since));
	char *const argv[] = { (char *)(uintptr_t)step->verdict.python, "-I", "-S",
			       (char *)(uintptr_t)step->verdict.explain, job_id, since, job_script ? "script" : "step", memory,
			       tasks, was_explained ? EXPLAINED : NULL, NULL };
	char *const environment[] = { "PATH=/usr/bin:/bin", NULL };
	atomic_int tries = TRIES;
	int pipes[2];
	ssize_t got = 0;
	pid_t pid;

	line[0] = '\0';
	(void)snprintf(job_id, sizeof(job_id), "%" PRIu32, step->job_id);
	memory_text(step, memory, sizeof(memory));
	tasks_text(tasks, sizeof(tasks));
	if (pipe2(pipes, O_CLOEXEC | O_NONBLOCK))
		return;
	pid = helper_start(uid, argv, environment, pipes[1]);
	(void)close(pipes[1]);
	if (helper_end(pid, &tries) == 0)
		got = read(pipes[0], line, size - 1);
	(void)close(pipes[0]);
	line[got > 0 ? got : 0] = '\0';
	line[strcspn(line, "\n")] = '\0';
}

/* The line names its job, and does not know Slurm's name of the node. */
static void tell(uint32_t job_id, const char *line, const char *on_node)
{
	static char shown[LINE_MAX_BYTES];
	char job[32];
	size_t length = (size_t)snprintf(job, sizeof(job), "job %" PRIu32, job_id);

	printable(shown, sizeof(shown), line);
	if (!strncmp(shown, job, length) && shown[length] == ':')
		slurm_error("mps: %s%s%s", job, on_node, shown + length);
	else
		slurm_error("mps: %s", shown);
}

static void look(const struct step *step, uid_t uid, bool job_script, const char *on_node)
{
	static char line[LINE_MAX_BYTES];
	int directory = jobdir_open(step->job_id);

	ask(step, uid, directory, job_script, line, sizeof(line));
	if (line[0]) {
		seen.explained = true;
		tell(step->job_id, line, on_node);
		if (directory >= 0)
			jobdir_write_mark(directory, EXPLAINED);
	}
	if (directory >= 0)
		(void)close(directory);
}

/* Whether the step lasted long enough to be asked about: looking takes 20 ms, as long as a short step may last. */
static bool lasted(void)
{
	struct timespec now;

	(void)clock_gettime(CLOCK_REALTIME, &now);
	return now.tv_sec - seen.since.tv_sec - (now.tv_nsec < seen.since.tv_nsec) >= 1;
}

void explain_exit(const struct step *step, uid_t uid, bool job_script, const char *on_node, uint32_t rank, int status)
{
	bool first, last = ++seen.ended >= seen.forked, unnoticed;

	for (unsigned int i = 0; i < seen.count; i++) {
		if (seen.tasks[i].rank == rank) {
			seen.tasks[i].ended = true;
			seen.tasks[i].status = status;
		}
	}
	seen.bad |= ended_badly(status);
	first = seen.bad && !seen.looked;
	/* It may have run without MPS, and succeeded. */
	unnoticed = last && step->verdict.unguarded && (job_script || lasted());
	if (seen.explained || !(unnoticed || (seen.bad && (first || last))))
		return;
	seen.looked = true;
	look(step, uid, job_script, on_node);
}
