#include "suspect.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef STATE_DIRECTORY
#define STATE_DIRECTORY "/run/slurm-mps"
#endif
#define MARK "suspect"
#define WAIT_TRIES 500
#define WAIT_PAUSE_MS 10

/* Only root can write a job's directory, so what is in it is root's. */
static int open_job_directory(uint32_t job_id)
{
	char path[128];

	(void)snprintf(path, sizeof(path), STATE_DIRECTORY "/jobs/%u", job_id);
	return open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

static bool read_mark(int directory, struct timespec *when)
{
	struct stat st;

	if (fstatat(directory, MARK, &st, AT_SYMLINK_NOFOLLOW))
		return false;
	*when = st.st_mtim;
	return true;
}

void suspect_mark(uint32_t job_id)
{
	int directory = open_job_directory(job_id);
	int fd;

	if (directory < 0)
		return; /* the epilog was faster */
	fd = openat(directory, MARK, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
	if (fd >= 0) {
		(void)futimens(fd, NULL);
		(void)close(fd);
	}
	(void)close(directory);
}

bool suspect_marked(uint32_t job_id, struct timespec *when)
{
	int directory = open_job_directory(job_id);
	bool marked;

	if (directory < 0)
		return false;
	marked = read_mark(directory, when);
	(void)close(directory);
	return marked;
}

void suspect_clear(uint32_t job_id, const struct timespec *when)
{
	int directory = open_job_directory(job_id);
	struct timespec now;

	if (directory < 0)
		return;
	if (read_mark(directory, &now) && now.tv_sec == when->tv_sec && now.tv_nsec == when->tv_nsec)
		(void)unlinkat(directory, MARK, 0);
	(void)close(directory);
}

static void close_others(void)
{
	long limit = sysconf(_SC_OPEN_MAX);

	for (int fd = 3; fd < (limit > 0 && limit < 65536 ? limit : 65536); fd++)
		(void)close(fd);
}

/* In the child: be the user for good, have nothing of slurmstepd's, and become the probe. */
static void become_probe(const struct verdict *verdict, const struct verdict_daemon *daemon)
{
	static char pipe_variable[VERDICT_PATH_MAX + 32], log_variable[VERDICT_PATH_MAX + 32];
	char *const argv[] = { (char *)(uintptr_t)verdict->python, "-I", "-S", (char *)(uintptr_t)verdict->probe, NULL };
	char *const environment[] = { "PATH=/usr/bin:/bin", pipe_variable, log_variable, NULL };
	uid_t uid = geteuid();
	gid_t gid = getegid();
	sigset_t none;
	int null = open("/dev/null", O_RDWR);

	(void)snprintf(pipe_variable, sizeof(pipe_variable), "CUDA_MPS_PIPE_DIRECTORY=%s", daemon->pipe_directory);
	(void)snprintf(log_variable, sizeof(log_variable), "CUDA_MPS_LOG_DIRECTORY=%s", daemon->log_directory);
	(void)sigemptyset(&none);
	if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0 || chdir("/"))
		_exit(126);
	close_others();
	if (setpgid(0, 0) || sigprocmask(SIG_SETMASK, &none, NULL))
		_exit(126);
	if (setresgid(gid, gid, gid) || setresuid(uid, uid, uid) || (uid && !setuid(0)))
		_exit(126);
	(void)execve(argv[0], argv, environment);
	_exit(127);
}

static pid_t start_probe(const struct verdict *verdict, const struct verdict_daemon *daemon)
{
	pid_t pid = fork();

	if (pid == 0)
		become_probe(verdict, daemon);
	return pid;
}

/* Whether a probe ended well by the time that is left; one that has not is killed with all that it started. */
static bool ended_well(pid_t pid, int *tries_left)
{
	int status = -1;
	pid_t ended;

	if (pid < 0)
		return false;
	while ((ended = waitpid(pid, &status, WNOHANG)) == 0 && *tries_left > 0) {
		(void)poll(NULL, 0, WAIT_PAUSE_MS);
		(*tries_left)--;
	}
	if (ended == pid)
		return WIFEXITED(status) && WEXITSTATUS(status) == 0;
	(void)kill(-pid, SIGKILL);
	(void)poll(NULL, 0, WAIT_PAUSE_MS);
	(void)waitpid(pid, &status, WNOHANG); /* what SIGKILL does not end is init's when this process ends */
	return false;
}

bool suspect_is_well(const struct verdict *verdict)
{
	pid_t probes[GPUS_MAX];
	int tries_left = WAIT_TRIES;
	bool well = true;

	for (unsigned int i = 0; i < verdict->daemon_count; i++)
		probes[i] = start_probe(verdict, &verdict->daemons[i]);
	for (unsigned int i = 0; i < verdict->daemon_count; i++)
		well &= ended_well(probes[i], &tries_left);
	return well;
}
