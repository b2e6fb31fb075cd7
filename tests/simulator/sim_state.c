#include "sim_state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { STATE_MAGIC = 0x51604755 };

enum { CUDA_OUT_OF_MEMORY = 2, CUDA_DEVICE_UNAVAILABLE = 46, CUDA_UNKNOWN = 999 };

struct sim_state *sim_open(void)
{
	struct stat about;
	int fd = open(SIM_STATE_FILE, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return NULL;
	struct sim_state *state = MAP_FAILED;
	if (fstat(fd, &about) == 0 && (size_t)about.st_size >= sizeof *state)
		state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (state == MAP_FAILED)
		return NULL;
	if (state->magic != STATE_MAGIC || state->gpu_count < 0 || state->gpu_count > SIM_MAX_GPUS) {
		munmap(state, sizeof *state);
		return NULL;
	}
	return state;
}

static uint64_t mix(uint64_t x) /* splitmix64's finish */
{
	x += 0x9e3779b97f4a7c15u;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

static void fill_gpu(struct sim_gpu *gpu, int index, const struct sim_node *node)
{
	uint64_t hash = 0xcbf29ce484222325u;
	for (const char *seed = node->seed; *seed; seed++)
		hash = (hash ^ (unsigned char)*seed) * 0x100000001b3u;
	uint64_t a = mix(hash + (uint64_t)index), b = mix(a);
	snprintf(gpu->uuid, sizeof gpu->uuid, "GPU-51000000-%04x-%04x-%04x-%012llx", (unsigned)(a & 0xffff),
		 (unsigned)(a >> 16 & 0xffff), (unsigned)(a >> 32 & 0xffff), (unsigned long long)(b & 0xffffffffffff));
	snprintf(gpu->name, sizeof gpu->name, "%s", SIM_GPU_NAME);
	gpu->domain = 0;
	gpu->bus = 0;
	gpu->device = (uint32_t)(6 + index);
	gpu->sms = node->sms;
	gpu->compute_capability = node->compute_capability;
	gpu->mode = SIM_MODE_DEFAULT;
	gpu->memory_bytes = node->memory_mib * SIM_MIB;
}

bool sim_is_there(const struct sim_state *state, int gpu)
{
	return gpu >= 0 && gpu < SIM_MAX_GPUS && state->gpus[gpu].uuid[0];
}

/* As the driver numbers them in /proc/driver/nvidia-caps/mig-minors: 15 GPU instances of a GPU, 8 compute instances. */
int sim_cap_minor(const struct sim_gpu *slice, bool of_compute_instance)
{
	return 3 + slice->parent * 15 * 9 + slice->instance * 9 + of_compute_instance;
}

static bool cut_one(struct sim_state *state, int gpu, int instance, const char *profile)
{
	int parts, gib, place = state->gpu_count, end = 0;
	struct sim_gpu *slice, *parent = &state->gpus[gpu];
	if (sscanf(profile, "%1dg.%3dgb%n", &parts, &gib, &end) != 2 || profile[end] || parts < 1)
		return false;
	while (place < SIM_MAX_GPUS && state->gpus[place].uuid[0])
		place++;
	if (place == SIM_MAX_GPUS)
		return false;
	slice = &state->gpus[place];
	*slice = *parent;
	slice->mig = 0;
	slice->parts = parts;
	slice->parent = gpu;
	slice->instance = instance;
	slice->sms = parts * 16 < parent->sms ? parts * 16 : parent->sms; /* an H100's 1g has 16 */
	slice->memory_bytes = (uint64_t)gib * 1024 * 95 / 100 * SIM_MIB;  /* 1g.10gb: 9728 MiB */
	snprintf(slice->uuid, sizeof slice->uuid, "MIG-51000000-%04x%.23s", (unsigned)++state->slices_made, parent->uuid + 17);
	snprintf(slice->name, sizeof slice->name, "%s MIG %.16s", SIM_GPU_NAME, profile);
	return true;
}

int sim_cut(struct sim_state *state, int gpu, int count, char **profiles)
{
	int parts = 0;
	for (int i = state->gpu_count; i < SIM_MAX_GPUS; i++)
		if (state->gpus[i].uuid[0] && state->gpus[i].parent == gpu)
			memset(&state->gpus[i], 0, sizeof state->gpus[i]);
	state->gpus[gpu].mig = count > 0;
	for (int i = 0; i < count; i++) {
		parts += atoi(profiles[i]);
		if (parts > SIM_MIG_PARTS || !cut_one(state, gpu, i + 1, profiles[i]))
			return EINVAL;
	}
	return 0;
}

static void init_lock(pthread_mutex_t *lock)
{
	pthread_mutexattr_t how;
	pthread_mutexattr_init(&how);
	pthread_mutexattr_setpshared(&how, PTHREAD_PROCESS_SHARED);
	pthread_mutexattr_setrobust(&how, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(lock, &how);
	pthread_mutexattr_destroy(&how);
}

int sim_create(const struct sim_node *node)
{
	static const char temporary[] = SIM_STATE_FILE ".new";
	if (mkdir(SIM_DIRECTORY, 0755) != 0 && errno != EEXIST)
		return errno;
	chmod(SIM_DIRECTORY, 0755); /* whatever the umask */
	int fd = open(temporary, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
	if (fd < 0)
		return errno;
	struct sim_state *state = MAP_FAILED;
	if (fchmod(fd, 0666) == 0 && ftruncate(fd, sizeof *state) == 0)
		state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	int error = errno;
	close(fd);
	if (state == MAP_FAILED)
		return error;
	state->gpu_count = node->gpu_count;
	state->cuda_version = node->cuda_version;
	state->driver = node->driver;
	init_lock(&state->lock);
	for (int i = 0; i < node->gpu_count; i++)
		fill_gpu(&state->gpus[i], i, node);
	state->magic = STATE_MAGIC;
	munmap(state, sizeof *state);
	unlink(SIM_FAULTS_FILE); /* a fresh node is a sound one */
	return rename(temporary, SIM_STATE_FILE) == 0 ? 0 : errno;
}

pid_t sim_own_pid(void)
{
	char text[16] = "";
	int pid = 0;
	return readlink("/proc/self", text, sizeof text - 1) > 0 && sscanf(text, "%d", &pid) == 1 ? pid : getpid();
}

uint64_t sim_process_started(pid_t pid)
{
	char path[64], text[1024], state = 'X';
	unsigned long long started = 0;
	snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t length = read(fd, text, sizeof text - 1);
	close(fd);
	if (length <= 0)
		return 0;
	text[length] = '\0';
	const char *rest = strrchr(text, ')'); /* a command may hold anything, brackets too */
	if (!rest || sscanf(rest + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
			    &state, &started) != 2)
		return 0;
	/* A zombie's driver files are closed: its memory is free even when nobody reaps it. */
	return state == 'Z' || state == 'X' ? 0 : (started ? started : 1);
}

static bool lives(const struct sim_context *entry)
{
	if (sim_process_started(entry->pid) != entry->started)
		return false;
	/* What a client has on a GPU belongs to its server, and goes with it (O31). */
	return entry->server_pid == 0 || entry->server_pid == entry->pid ||
	       sim_process_started(entry->server_pid) == entry->server_started;
}

void sim_lock(struct sim_state *state)
{
	if (pthread_mutex_lock(&state->lock) == EOWNERDEAD)
		pthread_mutex_consistent(&state->lock);
	for (int i = 0; i < SIM_MAX_CONTEXTS; i++)
		if (state->contexts[i].kind != SIM_NONE && !lives(&state->contexts[i]))
			memset(&state->contexts[i], 0, sizeof state->contexts[i]);
}

void sim_unlock(struct sim_state *state)
{
	pthread_mutex_unlock(&state->lock);
}

static bool mode_allows(const struct sim_state *state, const struct sim_context *wanted)
{
	int mode = state->gpus[wanted->gpu].mode;
	if (mode == SIM_MODE_PROHIBITED)
		return false;
	if (mode != SIM_MODE_EXCLUSIVE_PROCESS || wanted->kind == SIM_CLIENT)
		return true; /* a client shares its server's place */
	for (int i = 0; i < SIM_MAX_CONTEXTS; i++) {
		const struct sim_context *held = &state->contexts[i];
		if ((held->kind == SIM_PLAIN || held->kind == SIM_SERVER) && held->gpu == wanted->gpu &&
		    held->pid != wanted->pid)
			return false;
	}
	return true;
}

int sim_context_add(struct sim_state *state, const struct sim_context *wanted, int *slot)
{
	if (wanted->kind != SIM_ATTACHED) {
		if (!sim_is_there(state, wanted->gpu) || sim_gpu_lost(wanted->gpu))
			return CUDA_UNKNOWN;
		if (!mode_allows(state, wanted))
			return CUDA_DEVICE_UNAVAILABLE;
		if (wanted->bytes > sim_bytes_free(state, wanted->gpu))
			return CUDA_OUT_OF_MEMORY;
	}
	for (int i = 0; i < SIM_MAX_CONTEXTS; i++) {
		if (state->contexts[i].kind != SIM_NONE)
			continue;
		if (wanted->kind != SIM_ATTACHED)
			state->gpus[wanted->gpu].busy_us = sim_since_1970_us();
		state->contexts[i] = *wanted;
		*slot = i;
		return 0;
	}
	return CUDA_OUT_OF_MEMORY;
}

struct sim_context *sim_context_own(struct sim_state *state, int slot)
{
	if (slot < 0 || slot >= SIM_MAX_CONTEXTS)
		return NULL;
	struct sim_context *entry = &state->contexts[slot];
	return entry->kind != SIM_NONE && entry->pid == getpid() ? entry : NULL;
}

uint64_t sim_context_bytes(const struct sim_state *state, const struct sim_context *entry)
{
	if (entry->kind != SIM_SERVER)
		return entry->bytes;
	for (int i = 0; i < SIM_MAX_CONTEXTS; i++) {
		const struct sim_context *client = &state->contexts[i];
		if (client->kind == SIM_CLIENT && client->gpu == entry->gpu && client->server_pid == entry->pid)
			return entry->bytes + SIM_SERVED_MIB * SIM_MIB;
	}
	return entry->bytes;
}

uint64_t sim_bytes_used(const struct sim_state *state, int gpu)
{
	uint64_t used = 0;
	for (int i = 0; i < SIM_MAX_CONTEXTS; i++)
		if (state->contexts[i].kind != SIM_NONE && state->contexts[i].gpu == gpu)
			used += sim_context_bytes(state, &state->contexts[i]);
	return used;
}

uint64_t sim_cuda_total(const struct sim_gpu *gpu)
{
	uint64_t reserved = (uint64_t)SIM_RESERVED_MIB * (gpu->parts ? gpu->parts : SIM_MIG_PARTS) / SIM_MIG_PARTS * SIM_MIB;
	return gpu->memory_bytes > reserved ? gpu->memory_bytes - reserved : 0;
}

uint64_t sim_bytes_free(const struct sim_state *state, int gpu)
{
	uint64_t total = sim_cuda_total(&state->gpus[gpu]), used = sim_bytes_used(state, gpu);
	return total > used ? total - used : 0;
}

int sim_gpu_by_uuid(const struct sim_state *state, const char *uuid)
{
	for (int i = 0; i < SIM_MAX_GPUS; i++)
		if (*uuid && strcmp(state->gpus[i].uuid, uuid) == 0)
			return i;
	return -1;
}

const char *sim_driver_version(int branch, int *cuda_version)
{
	static const struct {
		int branch, cuda_version;
		const char *version;
	} drivers[] = {{535, 12020, "535.261.03"}, {550, 12040, "550.163.01"}, {580, 13000, "580.159.04"}};
	for (size_t i = 0; i < sizeof drivers / sizeof *drivers; i++)
		if (drivers[i].branch == branch) {
			*cuda_version = drivers[i].cuda_version;
			return drivers[i].version;
		}
	return NULL;
}

bool sim_gpu_lost(int gpu)
{
	char key[32];
	snprintf(key, sizeof key, "gpu.%d", gpu);
	return sim_fault_is(key, "lost");
}

bool sim_fault(const char *key, char value[SIM_FAULT_SIZE])
{
	char line[SIM_FAULT_SIZE + 128];
	bool found = false;
	FILE *file = fopen(SIM_FAULTS_FILE, "re");
	if (!file)
		return false;
	while (!found && fgets(line, sizeof line, file)) {
		line[strcspn(line, "\n")] = '\0';
		char *equals = strchr(line, '=');
		if (!equals)
			continue;
		*equals = '\0';
		found = strcmp(line, key) == 0;
		if (found)
			snprintf(value, SIM_FAULT_SIZE, "%.*s", SIM_FAULT_SIZE - 1, equals + 1);
	}
	fclose(file);
	return found;
}

bool sim_fault_is(const char *key, const char *value)
{
	char told[SIM_FAULT_SIZE];
	return sim_fault(key, told) && strcmp(told, value) == 0;
}

long sim_fault_number(const char *key, const char *prefix)
{
	char told[SIM_FAULT_SIZE], *end;
	size_t length = strlen(prefix);
	if (!sim_fault(key, told) || strncmp(told, prefix, length) != 0)
		return -1;
	long number = strtol(told + length, &end, 10);
	return end == told + length || *end || number < 0 ? -1 : number;
}

void sim_sleep(long milliseconds)
{
	struct timespec left = {.tv_sec = milliseconds / 1000, .tv_nsec = milliseconds % 1000 * 1000000};
	while (nanosleep(&left, &left) != 0 && errno == EINTR)
		continue;
}

bool sim_latency_observed(void)
{
	return sim_fault_is("latency", "observed");
}

void sim_latency(int milliseconds)
{
	if (sim_latency_observed())
		sim_sleep(milliseconds);
}

uint64_t sim_now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

uint64_t sim_since_1970_us(void)
{
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}
