/*
 * LD_PRELOAD for a program of root's: whoever reads its memory waits, as for /proc/PID/environ and cmdline. The program
 * does nothing of its own; or with UNREADABLE_LATER=FILE it runs until there is such a file.
 *
 * A page of a file system of the user's own is being written back, which that file system never finishes. One thread
 * waits to change the page, another to unmap it, and holds the lock that every reader of this memory needs.
 */
#include "own_fs.h"

#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define PAGE 4096
#define PAUSE_US 100000

static char *page;

static void *write_back(void *unused)
{
	(void)msync(page, PAGE, MS_SYNC);
	return unused;
}

static void *change(void *unused)
{
	*(volatile char *)page = 2;
	return unused;
}

static void *unmap(void *unused)
{
	(void)munmap(page, PAGE);
	return unused;
}

/* Open the file in a namespace of its own, by a child that shares our descriptors; where we are, root sees us. */
static int open_own(void)
{
	int fd = open("/dev/null", O_RDWR);
	pid_t child = (pid_t)syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0);

	if (child == 0) {
		image = calloc(1, image_size = PAGE);
		(void)mount_own();
		must(dup2(open("/tmp/low/" NAME, O_RDWR), fd) == fd, "open");
		_exit(0);
	}
	must(waitpid(child, NULL, 0) == child, "waitpid");
	return fd;
}

static void *be_unreadable(void *later)
{
	void *(*const steps[])(void *) = {write_back, change, unmap};
	pthread_t thread;

	while (later && access(later, F_OK))
		(void)usleep(PAUSE_US / 10);
	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, open_own(), 0);
	must(page != MAP_FAILED, "mmap");
	*(volatile char *)page = 1;
	for (int i = 0; i < 3; i++) {
		must(!pthread_create(&thread, NULL, steps[i], NULL), "thread");
		(void)usleep(PAUSE_US);
	}
	must(creat("/home/alice/unreadable", 0600) >= 0, "/home/alice/unreadable");
	for (;;)
		(void)pause();
}

__attribute__((constructor)) static void start(void)
{
	char *later = getenv("UNREADABLE_LATER");
	pthread_t thread;

	if (!later)
		(void)be_unreadable(NULL);
	must(!pthread_create(&thread, NULL, be_unreadable, later), "thread");
}
