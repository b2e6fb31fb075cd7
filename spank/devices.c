#include "devices.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* EPERM is the device cgroup's answer; every other failure says nothing about who the GPU belongs to. */
static bool may_open(const struct verdict_gpu *gpu)
{
	char path[32];
	int fd;

	(void)snprintf(path, sizeof(path), "/dev/nvidia%u", gpu->minor);
	fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return errno != EPERM;
	(void)close(fd);
	return true;
}

static unsigned int openable(const struct verdict *verdict, const struct verdict_gpu **gpus)
{
	unsigned int count = 0;

	for (unsigned int i = 0; i < verdict->gpu_count; i++)
		if (may_open(&verdict->gpus[i]))
			gpus[count++] = &verdict->gpus[i];
	return count;
}

static unsigned int entries(const char *list)
{
	unsigned int count = *list ? 1 : 0;

	for (; *list; list++)
		count += *list == ',';
	return count;
}

static bool append(char *out, size_t size, const char *uuid)
{
	size_t used = strlen(out);
	int length = snprintf(out + used, size - used, "%s%s", used ? "," : "", uuid);

	return length > 0 && (size_t)length < size - used;
}

/* `name` of `length` characters: a UUID, or an index as Slurm counts the node's GPUs. */
static const struct verdict_gpu *find(const struct verdict *verdict, const char *name, size_t length)
{
	for (unsigned int i = 0; i < verdict->gpu_count; i++) {
		const struct verdict_gpu *gpu = &verdict->gpus[i];
		char index[16];

		(void)snprintf(index, sizeof(index), "%u", gpu->slurm_index);
		if (strlen(index) == length && !memcmp(index, name, length))
			return gpu;
		if (strlen(gpu->uuid) == length && !memcmp(gpu->uuid, name, length))
			return gpu;
	}
	return NULL;
}

static bool by_name(const struct verdict *verdict, const char *visible, char *out, size_t size)
{
	while (*visible) {
		size_t length = strcspn(visible, ",");
		const struct verdict_gpu *gpu = find(verdict, visible, length);

		if (!gpu || !append(out, size, gpu->uuid))
			return false;
		visible += length + (visible[length] == ',');
	}
	return true;
}

bool task_gpus(const struct verdict *verdict, const char *visible, char *out, size_t size)
{
	const struct verdict_gpu *gpus[VERDICT_GPUS_MAX];
	unsigned int count = openable(verdict, gpus);

	out[0] = '\0';
	if (!visible || !*visible || !count)
		return true; /* a step without GPUs, such as srun --gres=none */
	/* Fewer names than openable GPUs: nothing constrains the task, the names count all GPUs of the node. */
	if (entries(visible) < count)
		return by_name(verdict, visible, out, size);
	for (unsigned int i = 0; i < count; i++)
		if (!append(out, size, gpus[i]->uuid))
			return false;
	return true;
}
