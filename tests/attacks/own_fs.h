/*
 * A file system of an ordinary user's: one file, NAME, served through FUSE in a user namespace of its own.
 *
 * It answers what is asked until it is told to be silent; a write is never answered. It ends by itself after a while, and
 * with it all that waits: whoever holds /dev/fuse open and waits for an answer could never be ended.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define NAME "nvidia-cuda-mps-server"
#define LIFE_SECONDS 15

static volatile sig_atomic_t silent;
static char in_bytes[1 << 20], out_bytes[1 << 20];
static char *image;
static size_t image_size;

static void be_silent(int number)
{
	(void)number;
	silent = 1;
}

static void must(int ok, const char *what)
{
	if (ok)
		return;
	perror(what);
	exit(1);
}

static void put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);

	must(fd >= 0 && write(fd, text, strlen(text)) >= 0, path);
	close(fd);
}

static void attributes(struct fuse_attr *attr, int node)
{
	attr->ino = node;
	attr->nlink = 1;
	attr->mode = node == 1 ? S_IFDIR | 0755 : S_IFREG | 0755;
	attr->size = node == 1 ? 0 : image_size;
}

/* The answer to one request: how many bytes, or a negative error. */
static long answer(const struct fuse_in_header *in, const void *given, void *out)
{
	const struct fuse_read_in *read_in = given;
	struct fuse_entry_out *entry = out;
	struct fuse_attr_out *attr = out;
	struct fuse_open_out *opened = out;
	struct fuse_init_out *init = out;
	size_t at, left;

	memset(out, 0, 4096);
	switch (in->opcode) {
	case FUSE_INIT:
		init->major = FUSE_KERNEL_VERSION;
		init->minor = 31;
		init->max_write = 65536;
		return sizeof(*init);
	case FUSE_LOOKUP:
		if (strcmp(given, NAME) != 0)
			return -ENOENT;
		entry->nodeid = 2;
		entry->entry_valid = 100000;
		attributes(&entry->attr, 2);
		return sizeof(*entry);
	case FUSE_GETATTR:
		attributes(&attr->attr, in->nodeid);
		return sizeof(*attr);
	case FUSE_OPEN:
	case FUSE_OPENDIR:
		opened->open_flags = FOPEN_KEEP_CACHE;
		return sizeof(*opened);
	case FUSE_READ:
		at = read_in->offset < image_size ? read_in->offset : image_size;
		left = image_size - at < read_in->size ? image_size - at : read_in->size;
		memcpy(out, image + at, left);
		return left;
	case FUSE_STATFS:
		return sizeof(struct fuse_statfs_out);
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
	case FUSE_FLUSH:
	case FUSE_READDIR:
	case FUSE_ACCESS:
		return 0;
	default:
		return -ENOSYS;
	}
}

static void serve(int fd)
{
	struct fuse_in_header *in = (void *)in_bytes;
	struct fuse_out_header *out = (void *)out_bytes;

	while (read(fd, in_bytes, sizeof(in_bytes)) > 0 || errno == EINTR || errno == ENOENT) {
		if (silent || in->opcode == FUSE_WRITE || in->opcode == FUSE_FORGET || in->opcode == FUSE_BATCH_FORGET)
			continue;
		long got = answer(in, in + 1, out + 1);
		out->error = got < 0 ? got : 0;
		out->len = sizeof(*out) + (got < 0 ? 0 : got);
		out->unique = in->unique;
		if (write(fd, out, out->len) < 0 && errno != ENOENT)
			perror("answer");
	}
}

/* Become root of a user namespace, and mount the file system on /tmp/low, of a /tmp of our own. Returns: who serves it. */
static pid_t mount_own(void)
{
	char text[256];
	uid_t uid = getuid();
	gid_t gid = getgid();
	pid_t server;
	int fd;

	must(unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0, "unshare");
	put("/proc/self/setgroups", "deny");
	(void)snprintf(text, sizeof(text), "0 %u 1", uid);
	put("/proc/self/uid_map", text);
	(void)snprintf(text, sizeof(text), "0 %u 1", gid);
	put("/proc/self/gid_map", text);
	fd = open("/dev/fuse", O_RDWR | O_CLOEXEC);
	must(fd >= 0, "/dev/fuse");
	must(mount("none", "/tmp", "tmpfs", 0, NULL) == 0, "tmpfs");
	must(!mkdir("/tmp/low", 0755), "mkdir");
	(void)snprintf(text, sizeof(text), "fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions", fd);
	must(mount("own", "/tmp/low", "fuse", MS_NOSUID | MS_NODEV, text) == 0, "fuse");
	server = fork();
	if (server == 0) {
		(void)alarm(LIFE_SECONDS);
		(void)signal(SIGUSR1, be_silent);
		serve(fd);
		_exit(0);
	}
	close(fd);
	return server;
}
