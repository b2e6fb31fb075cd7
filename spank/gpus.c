#include "gpus.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool device_is_slice(const struct verdict_gpu *gpu)
{
	return !strncmp(gpu->uuid, "MIG-", strlen("MIG-"));
}

/*
 * EPERM is the device cgroup's answer; every other failure says nothing about who the GPU belongs to. The driver is not
 * asked, which an open would do for each task and GPU; without persistence mode it would start an idle GPU up.
 */
bool device_may_open(const struct verdict_gpu *gpu)
{
	bool slice = device_is_slice(gpu);
	char path[64];

	(void)snprintf(path, sizeof(path), slice ? "/dev/nvidia-caps/nvidia-cap%u" : "/dev/nvidia%u", gpu->minor);
	return !access(path, slice ? R_OK : R_OK | W_OK) || errno != EPERM; /* a capability's node is read-only */
}

/* The job's GPUs that this process may open: to a client they are the devices 0, 1, ... in this order. */
static void find_openable(const struct verdict *verdict, struct task_gpus *open)
{
	open->count = 0;
	for (unsigned int i = 0; i < verdict->gpu_count; i++)
		if (device_may_open(&verdict->gpus[i])) {
			open->ordinals[open->count] = verdict->per_gpu ? 0 : open->count;
			open->gpus[open->count++] = &verdict->gpus[i];
		}
}

unsigned int gpus_named(const char *list)
{
	unsigned int count = *list ? 1 : 0;

	for (; *list; list++)
		count += *list == ',';
	return count;
}

/* Whether `name` of `length` characters is this GPU's UUID, or its index as Slurm counts the node's GPUs. */
static bool is_named(const struct verdict_gpu *gpu, const char *name, size_t length)
{
	char index[16];

	(void)snprintf(index, sizeof(index), "%u", gpu->slurm_index);
	return (strlen(index) == length && !memcmp(index, name, length)) ||
	       (strlen(gpu->uuid) == length && !memcmp(gpu->uuid, name, length));
}

static bool take_named(const struct task_gpus *open, const char *name, size_t length, struct task_gpus *task)
{
	for (unsigned int i = 0; i < open->count; i++)
		if (is_named(open->gpus[i], name, length)) {
			task->ordinals[task->count] = open->ordinals[i];
			task->gpus[task->count++] = open->gpus[i];
			return true;
		}
	return false;
}

bool task_gpus(const struct verdict *verdict, const char *visible, bool has_gpus, struct task_gpus *task)
{
	struct task_gpus open;

	task->count = 0;
	find_openable(verdict, &open);
	if (!visible && has_gpus) {
		*task = open;
		return true;
	}
	if (!visible || !*visible || !strcmp(visible, NO_DEVICES) || !open.count)
		return true; /* a step without GPUs, such as srun --gres=none */
	if (gpus_named(visible) >= open.count) {
		*task = open;
		return true;
	}
	/* Fewer names than openable GPUs: nothing confines the task, the names count all GPUs of the node. */
	while (*visible) {
		size_t length = strcspn(visible, ",");

		if (!take_named(&open, visible, length, task))
			return false;
		visible += length + (visible[length] == ',');
	}
	return true;
}

void task_gpus_list(const struct task_gpus *task, bool ordinals, char *out, size_t size)
{
	size_t used = 0;

	out[0] = '\0';
	for (unsigned int i = 0; i < task->count && used < size; i++) {
		const char *comma = i ? "," : "";
		int length = ordinals ? snprintf(out + used, size - used, "%s%u", comma, task->ordinals[i])
				      : snprintf(out + used, size - used, "%s%s", comma, task->gpus[i]->uuid);

		used += length > 0 ? (size_t)length : 0;
	}
}
