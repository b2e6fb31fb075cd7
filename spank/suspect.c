#include "suspect.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "devices.h"

#define MARK "suspect"
#define MARK_SIZE (sizeof(MARK) + 12)
#define WAIT_TRIES 500
/*
 * The probe is in slurmstepd's place among the cgroups, not the step's: its user must not be able to take it over with
 * ptrace(2), which asks for the same gids. The MPS server has gid 0 and is safe by that, too (O51).
 */
#define PROBE_GID 65534
#define WAIT_PAUSE_MS 10

/* Only root can write a job's directory, so what is in it is root's. */
static int open_job_directory(uint32_t job_id)
{
	char path[128];

	(void)snprintf(path, sizeof(path), STATE_DIRECTORY "/jobs/%u", job_id);
	return open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

static void mark_name(char *name, size_t size, unsigned int gpu)
{
	(void)snprintf(name, size, MARK "-%u", gpu);
}

static bool read_mark(int directory, unsigned int gpu, struct timespec *when)
{
	char name[MARK_SIZE];
	struct stat st;

	mark_name(name, sizeof(name), gpu);
	if (fstatat(directory, name, &st, AT_SYMLINK_NOFOLLOW))
		return false;
	*when = st.st_mtim;
	return true;
}

static void write_mark(int directory, unsigned int gpu)
{
	char name[MARK_SIZE];
	int fd;

	mark_name(name, sizeof(name), gpu);
	fd = openat(directory, name, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600);
	if (fd < 0)
		return;
	(void)futimens(fd, NULL);
	(void)close(fd);
}

void suspect_mark(uint32_t job_id, const struct verdict *verdict)
{
	int directory = open_job_directory(job_id);

	if (directory < 0)
		return; /* the epilog was faster */
	for (unsigned int gpu = 0; gpu < verdict->gpu_count; gpu++)
		if (device_may_open(&verdict->gpus[gpu]))
			write_mark(directory, gpu);
	(void)close(directory);
}

void suspect_clear(uint32_t job_id, const struct verdict *verdict, const struct suspicion *suspicion)
{
	int directory = open_job_directory(job_id);
	struct timespec now;
	char name[MARK_SIZE];

	if (directory < 0)
		return;
	for (unsigned int gpu = 0; gpu < verdict->gpu_count; gpu++) {
		const struct timespec *then = &suspicion->since[gpu];

		if (!suspicion->probed[gpu] || suspicion->unwell[gpu] || !read_mark(directory, gpu, &now) ||
		    now.tv_sec != then->tv_sec || now.tv_nsec != then->tv_nsec)
			continue;
		mark_name(name, sizeof(name), gpu);
		(void)unlinkat(directory, name, 0);
	}
	(void)close(directory);
}

static void close_others(void)
{
	long limit = sysconf(_SC_OPEN_MAX);

#ifdef SYS_close_range
	if (!syscall(SYS_close_range, 3U, ~0U, 0U))
		return;
#endif
	for (int fd = 3; fd < (limit > 0 && limit < 65536 ? limit : 65536); fd++)
		(void)close(fd);
}

/* In the child: be the user for good, have nothing of slurmstepd's, and become the probe. */
static void become_probe(const struct verdict *verdict, const struct verdict_daemon *daemon, const struct task_gpus *gpus)
{
	static char visible_variable[GPUS_MAX * sizeof(gpus->gpus[0]->uuid) + 32] = "CUDA_VISIBLE_DEVICES=";
	static char pipe_variable[VERDICT_PATH_MAX + 32], log_variable[VERDICT_PATH_MAX + 32];
	char *const argv[] = { (char *)(uintptr_t)verdict->python, "-I", "-S", (char *)(uintptr_t)verdict->probe, NULL };
	char *const environment[] = { "PATH=/usr/bin:/bin", pipe_variable, log_variable, visible_variable, NULL };
	uid_t uid = geteuid();
	sigset_t none;
	int null = open("/dev/null", O_RDWR);

	task_gpus_list(gpus, false, visible_variable + strlen(visible_variable),
		       sizeof(visible_variable) - strlen(visible_variable));
	(void)snprintf(pipe_variable, sizeof(pipe_variable), "CUDA_MPS_PIPE_DIRECTORY=%s", daemon->pipe_directory);
	(void)snprintf(log_variable, sizeof(log_variable), "CUDA_MPS_LOG_DIRECTORY=%s", daemon->log_directory);
	(void)sigemptyset(&none);
	if (null < 0 || dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0 || chdir("/"))
		_exit(126);
	close_others();
	if (setpgid(0, 0) || sigprocmask(SIG_SETMASK, &none, NULL))
		_exit(126);
	if (uid && (seteuid(0) || setresgid(PROBE_GID, PROBE_GID, PROBE_GID)))
		_exit(126);
	if (setresuid(uid, uid, uid) || (uid && !setuid(0)))
		_exit(126);
	(void)execve(argv[0], argv, environment);
	_exit(127);
}

static pid_t start_probe(const struct verdict *verdict, const struct verdict_daemon *daemon,
			 const struct task_gpus *gpus)
{
	pid_t pid = fork();

	if (pid == 0)
		become_probe(verdict, daemon, gpus);
	if (pid > 0)
		(void)setpgid(pid, pid); /* so does the child; whoever comes first */
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

/* The noted GPUs of one control daemon. */
static void gpus_of_daemon(const struct verdict *verdict, unsigned int daemon, const struct suspicion *suspicion,
			   struct task_gpus *gpus)
{
	gpus->count = 0;
	for (unsigned int gpu = 0; gpu < verdict->gpu_count; gpu++)
		if (suspicion->probed[gpu] && verdict_daemon_of(verdict, &verdict->gpus[gpu]) == &verdict->daemons[daemon])
			gpus->gpus[gpus->count++] = &verdict->gpus[gpu];
}

static void probe(const struct verdict *verdict, struct suspicion *suspicion)
{
	static struct task_gpus gpus[GPUS_MAX];
	pid_t probes[GPUS_MAX];
	int tries_left = WAIT_TRIES;

	for (unsigned int i = 0; i < verdict->daemon_count; i++) {
		gpus_of_daemon(verdict, i, suspicion, &gpus[i]);
		probes[i] = gpus[i].count ? start_probe(verdict, &verdict->daemons[i], &gpus[i]) : 0;
	}
	for (unsigned int i = 0; i < verdict->daemon_count; i++) {
		bool well = !gpus[i].count || ended_well(probes[i], &tries_left);

		for (unsigned int j = 0; j < gpus[i].count; j++)
			suspicion->unwell[gpus[i].gpus[j] - verdict->gpus] = !well;
	}
}

void suspect_look(uint32_t job_id, const struct verdict *verdict, struct suspicion *suspicion)
{
	int directory = open_job_directory(job_id);
	bool any = false;

	memset(suspicion, 0, sizeof(*suspicion));
	if (directory < 0)
		return;
	for (unsigned int gpu = 0; gpu < verdict->gpu_count; gpu++) {
		suspicion->probed[gpu] = read_mark(directory, gpu, &suspicion->since[gpu]) &&
					 device_may_open(&verdict->gpus[gpu]);
		any |= suspicion->probed[gpu];
	}
	(void)close(directory);
	if (any)
		probe(verdict, suspicion);
}
