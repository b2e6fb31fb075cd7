/*
 * A program on a file system of an ordinary user's, which from then on answers nothing.
 *
 * An overlay lies over a FUSE file system, in a user namespace: it reads its lower layer as the one who mounted it, so
 * that FUSE's own check, which keeps a user's file system from root, lets root through.
 *
 * silent_fs PROGRAM FILE: runs PROGRAM from there as nvidia-cuda-mps-server, and makes FILE once nothing is answered.
 */
#include "own_fs.h"

#include <sys/wait.h>

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
	must(argc == 3, "silent_fs PROGRAM FILE");
	read_program(argv[1]);

	pid_t server = mount_own();
	must(!mkdir("/tmp/up", 0755) && !mkdir("/tmp/work", 0755) && !mkdir("/tmp/all", 0755), "mkdir");
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
