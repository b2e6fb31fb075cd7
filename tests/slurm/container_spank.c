/*
 * Another's SPANK plugin, which does what pyxis does: in task_init each task enters one container, a user and a mount
 * namespace with another root, and the container's variables overwrite the task's (spank_import_container_env of
 * pyxis). The container has one of the image's, CUDA_MPS_PIPE_DIRECTORY, as under enroot. SEES lists the directories
 * that the container has. A step has a container where CONTAINER_AS is set: to "user", or to "root" for pyxis'
 * --container-remap-root.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(container, 1)

#define INSIDE "/mnt"

static const char *const seen[] = { SEES };

static int write_file(const char *path, const char *text)
{
	int file = open(path, O_WRONLY);
	int failed = file < 0 || write(file, text, strlen(text)) < 0;

	if (file >= 0)
		close(file);
	return failed;
}

static int enter_namespaces(int as_root)
{
	unsigned int uid = getuid(), gid = getgid();
	char map[64];

	/* Who has been root is not the owner of its own /proc/self until then. */
	if (prctl(PR_SET_DUMPABLE, 1) || unshare(CLONE_NEWUSER | CLONE_NEWNS) || write_file("/proc/self/setgroups", "deny"))
		return -1;
	(void)snprintf(map, sizeof(map), "%u %u 1", as_root ? 0 : uid, uid);
	if (write_file("/proc/self/uid_map", map))
		return -1;
	(void)snprintf(map, sizeof(map), "%u %u 1", as_root ? 0 : gid, gid);
	return write_file("/proc/self/gid_map", map);
}

static int show(const char *path)
{
	char target[256];

	(void)snprintf(target, sizeof(target), INSIDE "%s", path);
	for (char *slash = strchr(target + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
		*slash = '\0';
		(void)mkdir(target, 0755);
		*slash = '/';
	}
	(void)mkdir(target, 0755);
	return mount(path, target, NULL, MS_BIND | MS_REC, NULL);
}

static int enter_root(void)
{
	if (mount("none", INSIDE, "tmpfs", 0, NULL))
		return -1;
	for (size_t i = 0; i < sizeof(seen) / sizeof(seen[0]); i++)
		if (show(seen[i]))
			return -1;
	if (symlink("usr/bin", INSIDE "/bin") || symlink("usr/lib", INSIDE "/lib") || symlink("usr/lib64", INSIDE "/lib64"))
		return -1;
	return chroot(INSIDE) || chdir("/");
}

int slurm_spank_task_init(spank_t sp, int ac, char **av)
{
	char as[16];

	(void)ac;
	(void)av;
	if (spank_getenv(sp, "CONTAINER_AS", as, sizeof(as)) != ESPANK_SUCCESS)
		return 0;
	if (spank_setenv(sp, "CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps", 1) || enter_namespaces(!strcmp(as, "root")) || enter_root()) {
		slurm_error("container: %s", strerror(errno));
		return -1;
	}
	return 0;
}
