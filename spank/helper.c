#include "helper.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/*
 * A helper is in slurmstepd's place among the cgroups, not the step's: its user must not be able to take it over with
 * ptrace(2), which asks for the same gids. The MPS server has gid 0 and is safe by that, too (O51). The first group is
 * beyond those of accounts and of user namespaces; a container that does not have it has 65534, which is a user's own
 * only where a site has given it away.
 */
#define HELPER_GID 4294901760
#define HELPER_GID_OF_A_CONTAINER 65534

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

static bool become_nobodys(void)
{
	return !setresgid(HELPER_GID, HELPER_GID, HELPER_GID) ||
	       !setresgid(HELPER_GID_OF_A_CONTAINER, HELPER_GID_OF_A_CONTAINER, HELPER_GID_OF_A_CONTAINER);
}

/* For good. As root in effect, the groups are slurmd's; as the user they are the user's, who may need them. */
static bool become_user(uid_t uid)
{
	if (!uid)
		return geteuid() == 0;
	if (geteuid() == 0 && setgroups(0, NULL))
		return false;
	if (seteuid(0) || !become_nobodys() || setresuid(uid, uid, uid))
		return false;
	return setuid(0) != 0; /* there is no way back */
}

/* The standard descriptors become /dev/null, and standard output `output` where that is not -1; no other is left. */
static bool keep_nothing(int output)
{
	int null = open("/dev/null", O_RDWR);

	if (null < 0 || dup2(null, 0) < 0 || dup2(output < 0 ? null : output, 1) < 0 || dup2(null, 2) < 0)
		return false;
	close_others();
	return true;
}

static void become_helper(uid_t uid, char *const argv[], char *const environment[], int output)
{
	sigset_t none;

	(void)sigemptyset(&none);
	if (!keep_nothing(output) || chdir("/"))
		_exit(126);
	if (setpgid(0, 0) || sigprocmask(SIG_SETMASK, &none, NULL) || !become_user(uid))
		_exit(126);
	(void)execve(argv[0], argv, environment);
	_exit(127);
}

bool helper_beside(void (*work)(const void *argument), const void *argument)
{
	pid_t parent = fork(), child;
	int status = 0;

	if (parent == 0) {
		child = fork();
		if (child == 0 && keep_nothing(-1))
			work(argument);
		_exit(child < 0);
	}
	return parent > 0 && (waitpid(parent, &status, 0) == parent ? status == 0 : errno == ECHILD);
}

pid_t helper_start(uid_t uid, char *const argv[], char *const environment[], int output)
{
	pid_t pid = fork();

	if (pid == 0)
		become_helper(uid, argv, environment, output);
	if (pid > 0)
		(void)setpgid(pid, pid); /* so does the child; whoever comes first */
	return pid;
}

/* Whether the program has ended, and is still to be waited for. */
static bool has_ended(pid_t pid)
{
	siginfo_t info = { 0 };

	errno = 0;
	return !waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) && info.si_pid == pid;
}

int helper_end(pid_t pid, atomic_int *tries_left)
{
	int status = -1;
	bool ended;

	if (pid < 0)
		return HELPER_DIED;
	while (!(ended = has_ended(pid)) && errno != ECHILD && atomic_load(tries_left) > 0) {
		(void)poll(NULL, 0, HELPER_PAUSE_MS);
		(void)atomic_fetch_sub(tries_left, 1);
	}
	if (!ended && errno == ECHILD)
		return HELPER_DIED; /* and its pid may be another's by now */
	(void)kill(-pid, SIGKILL); /* also what it has left; until it is waited for, no other group has this number */
	if (!ended)
		(void)poll(NULL, 0, HELPER_PAUSE_MS);
	if (waitpid(pid, &status, WNOHANG) != pid || !ended)
		return HELPER_LATE; /* what SIGKILL does not end is init's when this process ends */
	return WIFEXITED(status) ? WEXITSTATUS(status) : HELPER_DIED;
}
