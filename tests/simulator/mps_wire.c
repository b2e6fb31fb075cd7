#include "mps_wire.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

const char *wire_pipe_directory(void)
{
	const char *directory = getenv("CUDA_MPS_PIPE_DIRECTORY");
	return directory && *directory ? directory : "/tmp/nvidia-mps";
}

bool wire_address(struct sockaddr_un *address, const char *directory, const char *name)
{
	memset(address, 0, sizeof *address);
	address->sun_family = AF_UNIX;
	int length = snprintf(address->sun_path, sizeof address->sun_path, "%s/%s", directory, name);
	return length > 0 && (size_t)length < sizeof address->sun_path;
}

int wire_connect(void)
{
	struct sockaddr_un address;
	if (!wire_address(&address, wire_pipe_directory(), "control"))
		return -1;
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
		return fd;
	close(fd);
	return -1;
}

bool wire_send(int fd, uint32_t type, const void *payload, uint32_t length, bool wait)
{
	struct wire_header header = {WIRE_MAGIC, type, length};
	struct iovec parts[] = {{&header, sizeof header}, {(void *)(uintptr_t)payload, length}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = length ? 2 : 1};
	ssize_t sent;
	do
		sent = sendmsg(fd, &message, MSG_NOSIGNAL | (wait ? 0 : MSG_DONTWAIT));
	while (sent < 0 && errno == EINTR);
	return sent == (ssize_t)(sizeof header + length);
}

bool wire_send_number(int fd, uint32_t type, int32_t number)
{
	return wire_send(fd, type, &number, sizeof number, false);
}

ssize_t wire_receive(int fd, uint32_t *type, void *payload, uint32_t size)
{
	struct wire_header header;
	struct iovec parts[] = {{&header, sizeof header}, {payload, size}};
	struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
	ssize_t got;
	do
		got = recvmsg(fd, &message, 0);
	while (got < 0 && errno == EINTR);
	if (got < (ssize_t)sizeof header || header.magic != WIRE_MAGIC ||
	    header.length != (uint32_t)got - sizeof header || (message.msg_flags & MSG_TRUNC))
		return -1;
	*type = header.type;
	return (ssize_t)header.length;
}

int wire_read(int fd, struct wire_reader *reader, struct wire_frame *frame)
{
	struct wire_header header;
	ssize_t got;
	do
		got = recv(fd, reader->bytes, sizeof reader->bytes - 1, MSG_DONTWAIT | MSG_TRUNC);
	while (got < 0 && errno == EINTR);
	if (got < 0)
		return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -1;
	if (got < (ssize_t)sizeof header || got >= (ssize_t)sizeof reader->bytes)
		return -1;
	memcpy(&header, reader->bytes, sizeof header);
	if (header.magic != WIRE_MAGIC || header.length != (uint32_t)got - sizeof header)
		return -1;
	frame->type = header.type;
	frame->length = header.length;
	frame->payload = reader->bytes + sizeof header;
	reader->bytes[got] = '\0';
	return 1;
}

bool server_message_send(int channel, const struct server_message *message, int fd)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = {(void *)(uintptr_t)message, sizeof *message};
	struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
	if (fd >= 0) {
		memset(&control, 0, sizeof control);
		header.msg_control = control.bytes;
		header.msg_controllen = sizeof control.bytes;
		struct cmsghdr *rider = CMSG_FIRSTHDR(&header);
		rider->cmsg_level = SOL_SOCKET;
		rider->cmsg_type = SCM_RIGHTS;
		rider->cmsg_len = CMSG_LEN(sizeof fd);
		memcpy(CMSG_DATA(rider), &fd, sizeof fd);
	}
	return sendmsg(channel, &header, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)sizeof *message;
}

int server_message_receive(int channel, struct server_message *message, int *fd)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec part = {message, sizeof *message};
	struct msghdr header = {
	    .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
	memset(message, 0, sizeof *message);
	*fd = -1;
	ssize_t got = recvmsg(channel, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	if (got < 0)
		return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? 0 : -1;
	struct cmsghdr *rider = CMSG_FIRSTHDR(&header);
	if (rider && rider->cmsg_level == SOL_SOCKET && rider->cmsg_type == SCM_RIGHTS)
		memcpy(fd, CMSG_DATA(rider), sizeof *fd);
	if (got == (ssize_t)sizeof *message)
		return 1;
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
	return -1;
}
