/*
 * A library in front of libc that counts the calls by which a hook changes something, and at the one asked for kills the
 * process or makes the call fail. The points to strike at are thus found, not listed.
 *
 * STRIKE_ON names the calls that count; each is noted in STRIKE_LOG. At number STRIKE_AT (and, with STRIKE_STAYS, at
 * every later one) the call fails with error STRIKE_ERROR, or the process is killed where there is none.
 *
 * A compute mode is set behind the driver's own door, between two of these calls: both sides of it are struck.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

static long (*real_syscall)(long, ...);

static int number(const char *name)
{
	const char *text = getenv(name);

	return text ? atoi(text) : 0;
}

static void find_real(const char *name, void *where)
{
	if (!*(void **)where)
		*(void **)where = dlsym(RTLD_NEXT, name);
}

static void note(const char *call)
{
	static int (*real_open)(const char *, int, ...);
	const char *log = getenv("STRIKE_LOG");
	char line[32];
	int fd;

	find_real("open", &real_open);
	find_real("syscall", &real_syscall);
	fd = log ? real_open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
	if (fd < 0)
		return;
	real_syscall(SYS_write, fd, line, snprintf(line, sizeof(line), "%s\n", call)); /* in one piece: threads */
	close(fd);
}

/* Returns the error that the call is to fail with, 0 for none. */
static int strike(const char *call)
{
	static int count;
	const char *on = getenv("STRIKE_ON");
	int at = number("STRIKE_AT"), error = number("STRIKE_ERROR"), now;

	if (!on || !strstr(on, call) || !strstr(program_invocation_short_name, "python"))
		return 0; /* the script before it starts others, too */
	now = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST); /* hooks have threads */
	note(call);
	if (!at || now < at || (now > at && !number("STRIKE_STAYS")))
		return 0;
	if (!error)
		kill(getpid(), SIGKILL);
	return error;
}

static int is_there(int dir, const char *path)
{
	struct stat about;

	return fstatat(dir, path, &about, AT_SYMLINK_NOFOLLOW) == 0;
}

static int is_file(int fd)
{
	struct stat about;

	return fd > 2 && fstat(fd, &about) == 0 && S_ISREG(about.st_mode);
}

#define IN_FRONT(type, name, parameters, arguments, changes, failed) \
	type name parameters \
	{ \
		static type(*real) parameters; \
		int error; \
		find_real(#name, &real); \
		error = (changes) ? strike(#name) : 0; \
		if (error) { \
			errno = error; \
			return failed; \
		} \
		return real arguments; \
	}

IN_FRONT(int, mkdirat, (int dir, const char *path, mode_t mode), (dir, path, mode), !is_there(dir, path), -1)
IN_FRONT(int, unlinkat, (int dir, const char *path, int flags), (dir, path, flags), is_there(dir, path), -1)
IN_FRONT(int, linkat, (int from, const char *old, int to, const char *new, int flags), (from, old, to, new, flags), 1, -1)
IN_FRONT(int, renameat, (int from, const char *old, int to, const char *new), (from, old, to, new), 1, -1)
IN_FRONT(int, fsetxattr, (int fd, const char *name, const void *value, size_t size, int flags),
	 (fd, name, value, size, flags), 1, -1)
IN_FRONT(int, fchmod, (int fd, mode_t mode), (fd, mode), 1, -1)
IN_FRONT(int, fsync, (int fd), (fd), 1, -1)
IN_FRONT(int, futimens, (int fd, const struct timespec times[2]), (fd, times), 1, -1)
IN_FRONT(pid_t, fork, (void), (), 1, -1)
IN_FRONT(int, killpg, (pid_t group, int signal), (group, signal), signal, -1)
IN_FRONT(ssize_t, write, (int fd, const void *bytes, size_t size), (fd, bytes, size), is_file(fd), -1)
IN_FRONT(int, posix_spawn,
	 (pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions, const posix_spawnattr_t *attributes,
	  char *const *argv, char *const *envp),
	 (pid, path, actions, attributes, argv, envp), 1, error)

/* Python is built with the latter. */
static int truncate_file(int (**real)(int, off_t), const char *name, int fd, off_t size)
{
	int error = strike("ftruncate");

	find_real(name, real);
	if (error) {
		errno = error;
		return -1;
	}
	return (*real)(fd, size);
}

int ftruncate(int fd, off_t size)
{
	static int (*real)(int, off_t);
	return truncate_file(&real, "ftruncate", fd, size);
}

int ftruncate64(int fd, off_t size)
{
	static int (*real)(int, off_t);
	return truncate_file(&real, "ftruncate64", fd, size);
}

/* Opening changes something where it makes a file or empties one. */
static int open_in(const char *name, int (**real)(int, const char *, int, ...), int dir, const char *path, int flags,
		   mode_t mode)
{
	int error = 0;

	find_real(name, real);
	if ((flags & O_TRUNC) || ((flags & O_CREAT) && !is_there(dir, path)))
		error = strike("openat");
	if (error) {
		errno = error;
		return -1;
	}
	return (*real)(dir, path, flags, mode);
}

#define OPEN_IN(name) \
	int name(int dir, const char *path, int flags, ...) \
	{ \
		static int (*real)(int, const char *, int, ...); \
		va_list more; \
		mode_t mode; \
		va_start(more, flags); \
		mode = flags & O_CREAT ? va_arg(more, mode_t) : 0; \
		va_end(more); \
		return open_in(#name, &real, dir, path, flags, mode); \
	}

OPEN_IN(openat)
OPEN_IN(openat64)

/* Python has no wrapper of libc's for the signals that go by pidfd. */
long syscall(long call, ...)
{
	long a[6];
	va_list more;
	int error;

	find_real("syscall", &real_syscall);
	va_start(more, call);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(more, long);
	va_end(more);
	error = call == SYS_pidfd_send_signal && a[1] ? strike("pidfd_send_signal") : 0;
	if (error) {
		errno = error;
		return -1;
	}
	return real_syscall(call, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* The first wait for each child: it has been started, and is not done. */
int poll(struct pollfd *fds, nfds_t count, int timeout)
{
	static int (*real)(struct pollfd *, nfds_t, int);
	static int last;

	find_real("poll", &real);
	if (count == 3 && fds[0].fd != last) {
		last = fds[0].fd;
		strike("poll");
	}
	return real(fds, count, timeout);
}
