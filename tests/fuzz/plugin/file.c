/*
 * Whatever lies in a verdict's place: the plugin reads it or refuses it, waits for nothing, and believes only root.
 *
 * An input is a byte for what lies there, two for its mode and its owner, one for its size, and the text.
 */
#include "fuzz.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { PLAIN, HOLE, LINK, LINK_TO_ITSELF, FIFO, DIRECTORY, SOCKET, DEVICE, NOTHING, BELOW_A_FILE, KINDS };
enum { HEAD = 4, A_USER = 20001 };

/* In the current directory. */
static const char place[] = "verdict", other[] = "other";

static void write_file(const char *path, const uint8_t *data, size_t size, const uint8_t head[HEAD], bool hole)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

	CHECK(fd >= 0 && write(fd, data, size) == (ssize_t)size);
	if (hole)
		CHECK(!ftruncate(fd, (off_t)head[3] << 12));
	CHECK(!fchown(fd, head[2] & 1 ? A_USER : 0, 0) && !fchmod(fd, (mode_t)(head[1] | (head[2] & 2) << 7)));
	(void)close(fd);
}

static void lay(int kind, const uint8_t *data, size_t size, const uint8_t head[HEAD])
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd;

	switch (kind) {
	case PLAIN:
	case HOLE:
		write_file(place, data, size, head, kind == HOLE);
		break;
	case LINK:
		write_file(other, data, size, head, false);
		CHECK(!symlink(other, place));
		break;
	case LINK_TO_ITSELF:
		CHECK(!symlink(place, place));
		break;
	case FIFO:
		CHECK(!mkfifo(place, 0666));
		break;
	case DIRECTORY:
		CHECK(!mkdir(place, 0755));
		break;
	case SOCKET:
		memcpy(address.sun_path, place, strlen(place));
		fd = socket(AF_UNIX, SOCK_STREAM, 0);
		CHECK(fd >= 0 && !bind(fd, (struct sockaddr *)&address, sizeof(address)));
		(void)close(fd);
		break;
	case DEVICE:
		CHECK(!mknod(place, S_IFCHR | 0666, 0));
		break;
	default:
		break;
	}
}

void fuzz_file(const uint8_t *data, size_t size)
{
	struct verdict *verdict = calloc(1, sizeof(*verdict));
	const uint8_t *head = data;
	struct stat status;
	char path[96];
	int kind;

	if (!verdict || size < HEAD)
		goto out;
	kind = head[0] % KINDS;
	lay(kind == BELOW_A_FILE ? PLAIN : kind, data + HEAD, size - HEAD, head);
	(void)snprintf(path, sizeof(path), "%s%s", place, kind == BELOW_A_FILE ? "/verdict" : "");
	parsers_read(path, verdict);
	if (verdict->status == VERDICT_NONE) {
		CHECK(kind == NOTHING || kind == BELOW_A_FILE);
	} else if (verdict->status == VERDICT_READY) {
		check_verdict(verdict);
		CHECK(!lstat(place, &status) && S_ISREG(status.st_mode));
		CHECK(status.st_uid == 0 && !(status.st_mode & (S_IWGRP | S_IWOTH)));
	} else {
		CHECK(IS_TEXT(verdict->message) && verdict->message[0]);
	}
	(void)remove(place);
	(void)unlink(other);
out:
	free(verdict);
}
