/*
 * A file system of an ordinary user's: it gives a program to run, and from then on answers nothing.
 *
 * An overlay lies over a FUSE file system, in a user namespace: it reads its lower layer as the one who mounted it, so
 * that FUSE's own check, which keeps a user's file system from root, lets root through.
 *
 * silent_fs PROGRAM FILE: runs PROGRAM from there as nvidia-cuda-mps-server, and makes FILE once nothing is answered.
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
#include <sys/wait.h>
#include <unistd.h>

#define NAME "nvidia-cuda-mps-server"

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
		if (silent || in->opcode == FUSE_FORGET || in->opcode == FUSE_BATCH_FORGET)
			continue;
		long got = answer(in, in + 1, out + 1);
		out->error = got < 0 ? got : 0;
		out->len = sizeof(*out) + (got < 0 ? 0 : got);
		out->unique = in->unique;
		if (write(fd, out, out->len) < 0 && errno != ENOENT)
			perror("answer");
	}
}

static void read_program(const char *path)
{
	struct stat status;
	int fd = open(path, O_RDONLY);

	must(fd >= 0 && fstat(fd, &status) == 0, path);
	image_size = status.st_size;
	image = malloc(image_size);
	must(image && read(fd, image, image_size) == (ssize_t)image_size, path);
	close(fd);
}

int main(int argc, char **argv)
{
	char text[256];
	uid_t uid = getuid();
	gid_t gid = getgid();

	must(argc == 3, "silent_fs PROGRAM FILE");
	read_program(argv[1]);
	must(unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0, "unshare");
	put("/proc/self/setgroups", "deny");
	(void)snprintf(text, sizeof(text), "0 %u 1", uid);
	put("/proc/self/uid_map", text);
	(void)snprintf(text, sizeof(text), "0 %u 1", gid);
	put("/proc/self/gid_map", text);

	int fd = open("/dev/fuse", O_RDWR);
	must(fd >= 0, "/dev/fuse");
	must(mount("none", "/tmp", "tmpfs", 0, NULL) == 0, "tmpfs");
	must(!mkdir("/tmp/low", 0755) && !mkdir("/tmp/up", 0755) && !mkdir("/tmp/work", 0755) &&
		     !mkdir("/tmp/all", 0755), "mkdir");
	(void)snprintf(text, sizeof(text), "fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions", fd);
	must(mount("own", "/tmp/low", "fuse", MS_NOSUID | MS_NODEV, text) == 0, "fuse");
	pid_t server = fork();
	if (server == 0) {
		(void)signal(SIGUSR1, be_silent);
		serve(fd);
		_exit(0);
	}
	close(fd);
	must(mount("own", "/tmp/all", "overlay", 0,
		   "lowerdir=/tmp/low,upperdir=/tmp/up,workdir=/tmp/work,userxattr") == 0, "overlay");
	pid_t child = fork();
	if (child == 0) {
		char *args[] = {NAME, "60", NULL}, *environment[] = {NULL};
		(void)execve("/tmp/all/" NAME, args, environment);
		perror("exec");
		_exit(1);
	}
	(void)usleep(300000);
	kill(server, SIGUSR1);
	must(creat(argv[2], 0600) >= 0, argv[2]);
	(void)waitpid(child, NULL, 0);
	return 0;
}
