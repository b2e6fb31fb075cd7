#include "daemon.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define CONNECT_TRIES 20
#define CONNECT_PAUSE_MS 50

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

bool daemon_answers(const struct verdict_daemon *daemon)
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
	answers = connects(fd, &address) && root_listens(fd);
	(void)close(fd);
	return answers;
}
