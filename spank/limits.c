#include "limits.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

/* A context costs 22 of 514 parts of its whole cost at 0 % of the threads, and the rest in proportion (O15). */
static uint64_t context_mib(const struct verdict *verdict, unsigned int tenths)
{
	return verdict->context_mib * (22 * 1000 + 492 * (uint64_t)tenths) / (514 * 1000);
}

/* A percentage as an option or an environment variable has it: 25, 12.5. */
static void write_percentage(unsigned int tenths, char *out, size_t size)
{
	if (tenths % 10)
		(void)snprintf(out, size, "%u.%u", tenths / 10, tenths % 10);
	else
		(void)snprintf(out, size, "%u", tenths / 10);
}

/* A memory limit as an option has it: 8G, 512M. */
static void write_mib(uint64_t mib, char *out, size_t size)
{
	bool whole = mib % 1024 == 0;

	(void)snprintf(out, size, "%llu%c", (unsigned long long)(whole ? mib / 1024 : mib), whole ? 'G' : 'M');
}

static bool lower_priority(const struct verdict *verdict, const char *asked, struct limits *limits, char *message,
			   size_t size)
{
	limits->priority = verdict->priority;
	if (limits->priority && client_priority(asked) == 0)
		return refuse_with(message, size, "--mps-priority=normal is more than the job has (low); a step can only lower it");
	if (client_priority(asked) == 1)
		limits->priority = 1;
	return true;
}

static bool lower_threads(const struct verdict *verdict, const char *asked, struct limits *limits, char *message,
			  size_t size)
{
	unsigned int tenths = threads_tenths(asked);
	char has[16];

	limits->divide_threads = *asked ? is_auto(asked) : verdict->auto_threads;
	limits->threads_tenths = verdict->threads_tenths;
	if (tenths && tenths < verdict->threads_tenths_min) {
		write_percentage(verdict->threads_tenths_min, has, sizeof(has));
		return refuse_with(message, size, "--mps-threads=%s: this site allows %s and more", asked, has);
	}
	if (tenths > verdict->threads_tenths) {
		write_percentage(verdict->threads_tenths, has, sizeof(has));
		return refuse_with(message, size, "--mps-threads=%s is more than the job has (%s); a step can only lower it",
				   asked, has);
	}
	if (tenths)
		limits->threads_tenths = tenths;
	return true;
}

/* Lower the limit of one GPU; `word` names it in messages, empty where all have the same. */
static bool lower_memory_of(const struct verdict *verdict, unsigned int gpu, uint64_t mib, const char *word,
			    struct limits *limits, char *message, size_t size)
{
	uint64_t job = verdict_daemon_of(verdict, &verdict->gpus[gpu])->mib;
	char asked[24], has[24];

	write_mib(mib, asked, sizeof(asked));
	limits->mib[gpu] = mib ? mib : job;
	if (job && mib > job) {
		write_mib(job, has, sizeof(has));
		return refuse_with(message, size, "--mps-mem=%s%s is more than the job has (%s); a step can only lower it",
				   word, asked, has);
	}
	if (mib > verdict->gpus[gpu].mib) {
		write_mib(verdict->gpus[gpu].mib, has, sizeof(has));
		return refuse_with(message, size, "--mps-mem=%s%s is more than %s has (%s)", word, asked,
				   verdict->gpus[gpu].uuid, has);
	}
	if (mib && mib < verdict->mib_min) {
		write_mib(verdict->mib_min, has, sizeof(has));
		return refuse_with(message, size, "--mps-mem=%s%s: this site allows %s and more", word, asked, has);
	}
	if (mib && mib <= context_mib(verdict, limits->threads_tenths))
		return refuse_with(message, size,
				   "--mps-mem=%s%s is less than a CUDA context costs with %u.%u %% of the threads (about %llu MiB)",
				   word, asked, limits->threads_tenths / 10, limits->threads_tenths % 10,
				   (unsigned long long)context_mib(verdict, limits->threads_tenths));
	return true;
}

static bool lower_memory(const struct verdict *verdict, const char *asked, struct limits *limits, char *message,
			 size_t size)
{
	struct mem_option mem;
	const char *problem = mem_option(asked, &mem);
	char word[8] = "";

	if (problem) /* it was refused where it was given */
		return refuse_with(message, size, "--mps-mem: %s", problem);
	if (mem.by_gpu && !verdict->per_gpu)
		return refuse_with(message, size, "--mps-mem=%s needs a job with --mps=per-gpu: one control daemon cannot tell its "
						  "GPUs apart", asked);
	for (unsigned int gpu = 0; gpu < GPUS_MAX; gpu++) {
		if (mem.by_gpu)
			(void)snprintf(word, sizeof(word), "%u:", gpu);
		limits->divide_memory[gpu] = mem.automatic || (!mem.mib[gpu] && verdict->auto_memory);
		if (gpu < verdict->gpu_count &&
		    !lower_memory_of(verdict, gpu, mem.mib[gpu], word, limits, message, size))
			return false;
		if (gpu >= verdict->gpu_count && mem.by_gpu && mem.mib[gpu])
			return refuse_with(message, size, "--mps-mem has a limit for GPU %u, but this job's GPUs on this node are 0 to "
							  "%u", gpu, verdict->gpu_count - 1);
	}
	return true;
}

bool limits_of_step(const struct verdict *verdict, const struct step_options *options, struct limits *limits,
		    char *message, size_t size)
{
	enum daemons daemons;

	memset(limits, 0, sizeof(*limits));
	limits->share_tenths = WHOLE_GPU;
	limits->says_memory = options->mem[0] || verdict->auto_memory;
	if (daemons_option(options->daemons, &daemons) && daemons != DAEMONS_UNSAID &&
	    (daemons == DAEMONS_PER_GPU) != verdict->per_gpu)
		return refuse_with(message, size, "--mps=%s: the job has --mps=%s, and its control daemons are started with the job",
				   options->daemons, verdict->per_gpu ? "per-gpu" : "per-node");
	return lower_priority(verdict, options->priority, limits, message, size) &&
	       lower_threads(verdict, options->threads, limits, message, size) &&
	       lower_memory(verdict, options->mem, limits, message, size);
}

static bool divides_memory(const struct limits *limits)
{
	bool any = false;

	for (unsigned int gpu = 0; gpu < GPUS_MAX; gpu++)
		any |= limits->divide_memory[gpu];
	return any;
}

void limits_of_share(const struct verdict *verdict, unsigned int shards, struct limits *limits)
{
	unsigned int of = verdict->shards_per_gpu * verdict->gpu_count;

	limits->share_tenths = verdict->share_tenths;
	if (of && shards && shards < of)
		limits->share_tenths = shards * WHOLE_GPU / of ? shards * WHOLE_GPU / of : 1;
	if (limits->threads_tenths > limits->share_tenths)
		limits->threads_tenths = limits->share_tenths;
	if (!verdict->share_memory || limits->says_memory || limits->share_tenths == WHOLE_GPU)
		return;
	limits->share_divides = !limits->divide_threads;
	for (unsigned int gpu = 0; gpu < GPUS_MAX; gpu++)
		limits->divide_memory[gpu] = true;
}

/* What the job's processes may have together of a GPU's memory. */
static uint64_t mib_of_share(const struct verdict_gpu *gpu, const struct limits *limits)
{
	return gpu->mib_for_clients * limits->share_tenths / WHOLE_GPU;
}

/* As many clients as the job may have on a GPU: of a daemon that serves others, too, its part. */
static unsigned int clients_of_job(const struct verdict *verdict, const struct limits *limits)
{
	unsigned int part = verdict->clients_per_gpu * limits->share_tenths / WHOLE_GPU;

	if (!verdict->joined)
		return verdict->clients_per_gpu;
	return part ? part : 1;
}

bool limits_need_task_counts(const struct verdict *verdict, const struct limits *limits, unsigned int tasks)
{
	return limits->divide_threads || divides_memory(limits) || tasks > clients_of_job(verdict, limits) ||
	       tasks > CLIENTS_OF_ANY_KIND;
}

/*
 * Whether a server takes so many tasks on a GPU, and each gets enough. All tasks of a step ask it of all its GPUs, so
 * that they all start or all fail.
 */
static bool is_enough(const struct verdict *verdict, const struct limits *limits, unsigned int gpu, unsigned int tasks,
		      char *message, size_t size)
{
	uint64_t mib = mib_of_share(&verdict->gpus[gpu], limits) / tasks;
	unsigned int tenths = limits->divide_threads ? limits->share_tenths / tasks : WHOLE_GPU;
	uint64_t context;
	char least[24];

	if (tasks > clients_of_job(verdict, limits))
		return refuse_with(message, size, "%u tasks of this step share a GPU, and an MPS server takes %u clients there; "
						  "start fewer on this node, or give the job more GPUs",
				   tasks, clients_of_job(verdict, limits));
	if (limits->divide_threads && tenths < verdict->threads_tenths_min) {
		write_percentage(verdict->threads_tenths_min, least, sizeof(least));
		return refuse_with(message, size, "--mps-threads=auto: %u tasks of this step share a GPU, %u.%u %% of its threads for "
						  "each; this site allows %s and more",
				   tasks, tenths / 10, tenths % 10, least);
	}
	if (tenths > limits->threads_tenths)
		tenths = limits->threads_tenths;
	context = context_mib(verdict, tenths);
	if (limits->divide_memory[gpu] && (mib <= context || mib < verdict->mib_min)) {
		write_mib(context < verdict->mib_min ? verdict->mib_min : context, least, sizeof(least));
		return refuse_with(message, size, "%s%u tasks of this step share %s, %lluM of memory for each; each needs at least %s",
				   limits->share_divides ? "" : "--mps-mem=auto: ", tasks,
				   limits->share_divides ? "the job's part of a GPU" : "a GPU", (unsigned long long)mib, least);
	}
	return true;
}

bool limits_divide(const struct verdict *verdict, const struct task_gpus *task, const unsigned int tasks_on[GPUS_MAX],
		   struct limits *limits, char *message, size_t size)
{
	limits->tasks_on_gpu = 1;
	for (unsigned int gpu = 0; gpu < verdict->gpu_count; gpu++)
		if (tasks_on[gpu] && !is_enough(verdict, limits, gpu, tasks_on[gpu], message, size))
			return false;
	for (unsigned int i = 0; i < task->count; i++) {
		size_t gpu = (size_t)(task->gpus[i] - verdict->gpus);
		uint64_t share = mib_of_share(task->gpus[i], limits) / (tasks_on[gpu] ? tasks_on[gpu] : 1);

		if (tasks_on[gpu] > limits->tasks_on_gpu)
			limits->tasks_on_gpu = tasks_on[gpu];
		if (limits->divide_memory[gpu] && (!limits->mib[gpu] || share < limits->mib[gpu]))
			limits->mib[gpu] = share;
	}
	if (limits->divide_threads && limits->share_tenths / limits->tasks_on_gpu < limits->threads_tenths)
		limits->threads_tenths = limits->share_tenths / limits->tasks_on_gpu;
	if (!limits->threads_tenths)
		limits->threads_tenths = 1; /* the least that there is */
	return true;
}

/* A percentage of the user's own may have more decimals than an option; they are cut off, which lowers it. */
static unsigned int users_tenths(const char *own)
{
	char cut[8];
	const char *point = own ? strchr(own, '.') : NULL;

	if (!point || strspn(point + 1, "0123456789") != strlen(point + 1) || (size_t)(point - own) + 3 > sizeof(cut))
		return threads_tenths(own);
	(void)snprintf(cut, sizeof(cut), "%.*s", (int)(point - own) + 2, own);
	if (!threads_tenths(cut) && strspn(cut, "0.") == strlen(cut) && strpbrk(point + 1, "123456789"))
		return 1; /* less than what there is is the least that there is */
	return threads_tenths(cut);
}

void limits_threads_value(const struct limits *limits, const char *own, char *out, size_t size)
{
	unsigned int tenths = users_tenths(own);

	if (!tenths || tenths > limits->threads_tenths)
		tenths = limits->threads_tenths;
	write_percentage(tenths, out, size);
}

/* Which of the task's devices has this name: a UUID, or an ordinal as the client counts; -1: none. */
static int find_device(const struct task_gpus *task, const char *name, size_t length)
{
	char ordinal[12];

	for (unsigned int device = 0; device < task->count; device++) {
		const char *uuid = task->gpus[device]->uuid;

		(void)snprintf(ordinal, sizeof(ordinal), "%u", device);
		if ((strlen(uuid) == length && !memcmp(uuid, name, length)) ||
		    (strlen(ordinal) == length && !memcmp(ordinal, name, length)))
			return (int)device;
	}
	return -1;
}

/* A size as the driver reads it, which may end in B or iB (O3). */
static uint64_t users_mib(char *size)
{
	size_t length = strlen(size);

	if (length > 2 && !strcasecmp(size + length - 2, "iB"))
		size[length - 2] = '\0';
	else if (length > 2 && !strcasecmp(size + length - 1, "B"))
		size[length - 1] = '\0';
	return mem_mib(size);
}

/* Take one "device=size" of the user's list; false when the driver could not read it. */
static bool lower_one(const char *entry, size_t length, const struct task_gpus *task, uint64_t mib[])
{
	const char *equals = memchr(entry, '=', length);
	char size[OPTION_MAX];
	size_t size_length;
	uint64_t own;
	int device;

	if (!equals)
		return false;
	size_length = length - (size_t)(equals + 1 - entry);
	if (size_length >= sizeof(size))
		return false;
	memcpy(size, equals + 1, size_length);
	size[size_length] = '\0';
	own = users_mib(size);
	device = find_device(task, entry, (size_t)(equals - entry));
	if (!own)
		return false;
	if (device >= 0 && (!mib[device] || own < mib[device]))
		mib[device] = own;
	return true;
}

static bool lower_all(const char *own, const struct task_gpus *task, uint64_t mib[])
{
	while (*own) {
		size_t length = strcspn(own, ",");

		if (!lower_one(own, length, task, mib))
			return false;
		own += length + (own[length] == ',');
	}
	return true;
}

/* A device of the task; a task that has none is taken for one with the job's first, should it find a way to it. */
static const struct verdict_gpu *device_of(const struct verdict *verdict, const struct task_gpus *task,
					   unsigned int device)
{
	return task->count ? task->gpus[device] : &verdict->gpus[0];
}

/* Whether a daemon that is asked for this default says it in full: from 1 GiB on it rounds down to GiB (O95). */
static bool is_printed_whole(uint64_t mib)
{
	return mib < 1024 || mib % 1024 == 0;
}

/* The step's limit of each of the task's devices, and what else than the daemon's own there is of them. A limit that
 * the daemon rounds where it prints it counts as other, so that the task knows its own: of one device alone, for a
 * list of several is dropped where the program sees fewer (O12). */
static void fill(const struct verdict *verdict, const struct limits *limits, const struct task_gpus *task,
		 unsigned int count, uint64_t mib[GPUS_MAX], bool *any, bool *other)
{
	*any = *other = false;
	for (unsigned int device = 0; device < count; device++) {
		const struct verdict_gpu *gpu = device_of(verdict, task, device);

		mib[device] = limits->mib[gpu - verdict->gpus];
		*any |= mib[device] != 0;
		*other |= verdict->joined || mib[device] != verdict_daemon_of(verdict, gpu)->mib ||
			  (count == 1 && !is_printed_whole(mib[device]));
	}
}

bool limits_memory_value(const struct verdict *verdict, const struct limits *limits, const struct task_gpus *task,
			 const char *own, char *out, size_t size)
{
	unsigned int count = task->count ? task->count : 1;
	uint64_t mib[GPUS_MAX];
	const char *comma = "";
	bool any, other;
	size_t used = 0;

	fill(verdict, limits, task, count, mib, &any, &other);
	if (!any || (!own && !other))
		return false;
	if (own && !lower_all(own, task, mib))
		fill(verdict, limits, task, count, mib, &any, &other);
	while (count > 1 && mib[count - 1] == verdict_daemon_of(verdict, task->gpus[count - 1])->mib)
		count--;
	out[0] = '\0';
	for (unsigned int device = 0; device < count && used < size; device++) {
		if (!mib[device])
			continue;
		used += (size_t)snprintf(out + used, size - used, "%s%u=%lluM", comma, device,
					 (unsigned long long)mib[device]);
		comma = ",";
	}
	return true;
}
