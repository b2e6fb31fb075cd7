#include "verdict.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef STATE_DIRECTORY
#define STATE_DIRECTORY "/run/slurm-mps"
#endif
#define VERDICT_SIZE_MAX 16384
#define CONNECT_TRIES 20
#define CONNECT_PAUSE_MS 50

static void refuse(struct verdict *verdict, const char *message)
{
	verdict->status = VERDICT_REFUSED;
	(void)snprintf(verdict->message, sizeof(verdict->message), "%s", message);
}

/* Copy a value whole, or not at all: a cut path or UUID would name something else. */
static bool take(char *out, size_t size, const char *value)
{
	size_t length = strlen(value);

	if (!length || length >= size)
		return false;
	memcpy(out, value, length + 1);
	return true;
}

/* "<slurm index> <minor> <uuid>" */
static bool take_gpu(struct verdict *verdict, const char *value)
{
	struct verdict_gpu *gpu;
	char uuid[sizeof(gpu->uuid)];
	unsigned int slurm_index, minor;

	if (verdict->gpu_count == VERDICT_GPUS_MAX)
		return false;
	if (sscanf(value, "%u %u %47s", &slurm_index, &minor, uuid) != 3)
		return false;
	gpu = &verdict->gpus[verdict->gpu_count++];
	gpu->slurm_index = slurm_index;
	gpu->minor = minor;
	memcpy(gpu->uuid, uuid, sizeof(gpu->uuid));
	return true;
}

static bool take_status(struct verdict *verdict, const char *value)
{
	if (!strcmp(value, "ready"))
		verdict->status = VERDICT_READY;
	else if (!strcmp(value, "refused"))
		verdict->status = VERDICT_REFUSED;
	else
		return false;
	return true;
}

/* One "key value" line; unknown keys belong to a newer prolog and are not for us. */
static bool take_line(struct verdict *verdict, char *line)
{
	char *value = strchr(line, ' ');

	if (!value)
		return false;
	*value++ = '\0';
	if (!strcmp(line, "status"))
		return take_status(verdict, value);
	if (!strcmp(line, "message"))
		return take(verdict->message, sizeof(verdict->message), value);
	if (!strcmp(line, "pipe_directory"))
		return take(verdict->pipe_directory, sizeof(verdict->pipe_directory), value);
	if (!strcmp(line, "log_directory"))
		return take(verdict->log_directory, sizeof(verdict->log_directory), value);
	if (!strcmp(line, "thread_percentage"))
		return take(verdict->thread_percentage, sizeof(verdict->thread_percentage), value);
	if (!strcmp(line, "memory_limit"))
		return take(verdict->memory_limit, sizeof(verdict->memory_limit), value);
	if (!strcmp(line, "context_mib"))
		return sscanf(value, "%5" SCNu64, &verdict->context_mib) == 1;
	if (!strcmp(line, "client_priority")) {
		verdict->priority = !strcmp(value, "1");
		return true;
	}
	if (!strcmp(line, "visible_devices")) {
		verdict->ordinals = !strcmp(value, "ordinal");
		return true;
	}
	if (!strcmp(line, "gpu"))
		return take_gpu(verdict, value);
	return true;
}

static bool is_complete(const struct verdict *verdict)
{
	if (verdict->status == VERDICT_REFUSED)
		return verdict->message[0];
	return verdict->status == VERDICT_READY && verdict->pipe_directory[0] && verdict->log_directory[0] &&
	       verdict->thread_percentage[0] && verdict->gpu_count;
}

/* First line "slurm-mps verdict 1", last line "end ..."; between them one key and value a line. */
static bool parse(struct verdict *verdict, char *text)
{
	char *save = NULL;
	char *line = strtok_r(text, "\n", &save);

	if (!line || strcmp(line, "slurm-mps verdict 1"))
		return false;
	while ((line = strtok_r(NULL, "\n", &save))) {
		if (!strncmp(line, "end ", 4))
			return !strtok_r(NULL, "\n", &save) && is_complete(verdict);
		if (!take_line(verdict, line))
			return false;
	}
	return false;
}

/* Only root writes verdicts; anything else under that name is not one. */
static bool is_roots_file(int fd)
{
	struct stat st;

	return !fstat(fd, &st) && S_ISREG(st.st_mode) && st.st_uid == 0 && !(st.st_mode & (S_IWGRP | S_IWOTH));
}

static ssize_t read_whole(int fd, char *text, size_t size)
{
	size_t length = 0;

	while (length < size) {
		ssize_t got = read(fd, text + length, size - length);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -1;
		if (got == 0)
			return (ssize_t)length;
		length += (size_t)got;
	}
	return -1; /* longer than any verdict is */
}

void verdict_read(uint32_t job_id, struct verdict *verdict)
{
	char path[64];
	char text[VERDICT_SIZE_MAX + 1];
	ssize_t length;
	int fd;

	memset(verdict, 0, sizeof(*verdict));
	(void)snprintf(path, sizeof(path), STATE_DIRECTORY "/jobs/%u/verdict", job_id);
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (fd < 0) {
		if (errno != ENOENT && errno != ENOTDIR)
			refuse(verdict, "the prolog's verdict on this node cannot be read");
		return;
	}
	length = is_roots_file(fd) ? read_whole(fd, text, VERDICT_SIZE_MAX) : -1;
	(void)close(fd);
	if (length >= 0)
		text[length] = '\0';
	if (length < 0 || !parse(verdict, text))
		refuse(verdict, "the prolog's verdict on this node cannot be understood; "
				"are spank_mps.so and the prolog of the same version?");
}

/* The socket itself is open to all (O25): make sure that root listens on it, not whoever got there first. */
static bool root_listens(int fd)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);

	return !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) && peer.uid == 0;
}

/* Connect without waiting, trying again while the daemon's queue is full: many steps may start at once. */
static bool connects(int fd, const struct sockaddr_un *address)
{
	for (int tries = 0; tries < CONNECT_TRIES; tries++) {
		if (!connect(fd, (const struct sockaddr *)address, sizeof(*address)))
			return true;
		if (errno != EAGAIN && errno != EINTR)
			return false;
		(void)poll(NULL, 0, CONNECT_PAUSE_MS);
	}
	return false;
}

bool verdict_daemon_answers(const struct verdict *verdict)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int length = snprintf(address.sun_path, sizeof(address.sun_path), "%s/control", verdict->pipe_directory);
	bool answers;
	int fd;

	if (length < 0 || (size_t)length >= sizeof(address.sun_path))
		return false;
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); /* O39 */
	if (fd < 0)
		return false;
	answers = connects(fd, &address) && root_listens(fd);
	(void)close(fd);
	return answers;
}
