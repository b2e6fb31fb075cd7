#include "jobdir.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include "verdict.h"

int jobdir_open(uint32_t job_id)
{
	char path[128];

	(void)snprintf(path, sizeof(path), STATE_DIRECTORY "/jobs/%u", job_id);
	return open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

bool jobdir_read_mark(int directory, const char *name, struct timespec *when)
{
	struct stat st;

	if (fstatat(directory, name, &st, AT_SYMLINK_NOFOLLOW))
		return false;
	*when = st.st_mtim;
	return true;
}

void jobdir_write_mark(int directory, const char *name)
{
	int fd = openat(directory, name, O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600);

	if (fd < 0)
		return;
	(void)futimens(fd, NULL);
	(void)close(fd);
}
