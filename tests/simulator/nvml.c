/* libnvidia-ml.so.1 of a simulated node: the part of NVML that a job's set-up uses, over the shared state. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sim_state.h"

#define API __attribute__((visibility("default")))

enum nvml_return {
	SUCCESS = 0,
	UNINITIALIZED = 1,
	INVALID_ARGUMENT = 2,
	NOT_SUPPORTED = 3,
	NO_PERMISSION = 4,
	NOT_FOUND = 6,
	INSUFFICIENT_SIZE = 7,
	DRIVER_NOT_LOADED = 9,
	GPU_IS_LOST = 15,
	ARGUMENT_VERSION_MISMATCH = 25,
};

enum { MEMORY_V2 = 40 | 2 << 24 };
enum { GPU_UTILIZATION_SAMPLES = 1, UNSIGNED_INT = 1, SAMPLES = 71, SAMPLE_US = 200000 }; /* O98 */

typedef struct sim_gpu *nvml_device;

struct nvml_memory {
	unsigned long long total, free, used;
};

struct nvml_memory_v2 {
	unsigned int version;
	unsigned long long total, reserved, free, used;
};

struct nvml_process {
	unsigned int pid;
	unsigned long long used;
	unsigned int gpu_instance, compute_instance;
};

struct nvml_sample {
	unsigned long long time_us;
	union {
		unsigned int number;
		unsigned long long all;
	} value;
};

struct nvml_attributes {
	unsigned int multiprocessors, shared_engines[5], gpu_slices, compute_slices;
	unsigned long long memory_mib;
};

struct nvml_pci {
	char bus_id_legacy[16];
	unsigned int domain, bus, device, pci_device_id, pci_subsystem_id;
	char bus_id[32];
};

static struct sim_state *state;
static int users;
static pthread_mutex_t users_lock = PTHREAD_MUTEX_INITIALIZER;

static const char *const error_texts[] = {
    [0] = "Success",
    [1] = "Uninitialized",
    [2] = "Invalid Argument",
    [3] = "Not Supported",
    [4] = "Insufficient Permissions",
    [5] = "Already Initialized",
    [6] = "Not Found",
    [7] = "Insufficient Size",
    [8] = "Insufficient External Power",
    [9] = "Driver Not Loaded",
    [10] = "Timeout",
    [11] = "Interrupt Request Issue",
    [12] = "NVML Shared Library Not Found",
    [13] = "Function Not Found",
    [14] = "Corrupted infoROM",
    [15] = "GPU is lost",
    [16] = "GPU requires reset",
    [17] = "GPU access blocked by the operating system",
    [18] = "Driver/library version mismatch",
    [19] = "In use by another client",
    [20] = "Insufficient Memory",
    [21] = "No data",
    [25] = "Argument version mismatch",
};

API const char *nvmlErrorString(int error)
{
	if (error >= 0 && error < (int)(sizeof error_texts / sizeof *error_texts) && error_texts[error])
		return error_texts[error];
	return "Unknown Error";
}

/* A told error of the function with this short name, or 0. */
static int told(const char *function)
{
	char key[96];
	snprintf(key, sizeof key, "nvml.%s", function);
	while (sim_fault_is(key, "hang"))
		pause();
	long number = sim_fault_number(key, "");
	return number > 0 ? (int)number : SUCCESS;
}

static int begin(const char *function)
{
	return users > 0 ? told(function) : UNINITIALIZED;
}

static int gpu_index(const struct sim_gpu *gpu)
{
	return (int)(gpu - state->gpus);
}

/* Check a call on a device; a handle from elsewhere is refused, not followed. */
static int begin_device(const char *function, const struct sim_gpu *gpu, const void *result)
{
	int error = begin(function);
	if (error)
		return error;
	uintptr_t at = (uintptr_t)gpu, first = (uintptr_t)state->gpus;
	if (at < first || at >= first + SIM_MAX_GPUS * sizeof *gpu || (at - first) % sizeof *gpu ||
	    !sim_is_there(state, gpu_index(gpu)) || !result)
		return INVALID_ARGUMENT;
	return sim_gpu_lost(gpu_index(gpu)) ? GPU_IS_LOST : SUCCESS;
}

/* The same of what NVML does not document for a MIG device, or not for a GPU in MIG mode. */
static int begin_gpu(const char *function, const struct sim_gpu *gpu, const void *result)
{
	int error = begin_device(function, gpu, result);
	return !error && gpu->parts ? NOT_SUPPORTED : error;
}

static int begin_mig(const char *function, const struct sim_gpu *gpu, const void *result)
{
	int error = begin_device(function, gpu, result);
	return !error && !gpu->parts ? INVALID_ARGUMENT : error;
}

static int give_text(char *to, unsigned int size, const char *text)
{
	if (strlen(text) >= size)
		return INSUFFICIENT_SIZE;
	strcpy(to, text);
	return SUCCESS;
}

API int nvmlInitWithFlags(unsigned int flags)
{
	char how[SIM_FAULT_SIZE] = "";
	(void)flags;
	sim_fault("nvml.init", how);
	if (strncmp(how, "slow:", 5) == 0)
		sim_sleep(atoi(how + 5));
	int error = told("init");
	if (error)
		return error;
	pthread_mutex_lock(&users_lock);
	if (users == 0) {
		sim_latency(10);
		if (!state)
			state = sim_open(); /* stays mapped: handles may outlive a shutdown */
	}
	if (state)
		users++;
	else
		error = DRIVER_NOT_LOADED;
	pthread_mutex_unlock(&users_lock);
	return error;
}

API int nvmlInit_v2(void)
{
	return nvmlInitWithFlags(0);
}

API int nvmlInit(void)
{
	return nvmlInitWithFlags(0);
}

API int nvmlShutdown(void)
{
	pthread_mutex_lock(&users_lock);
	int error = users > 0 ? told("Shutdown") : UNINITIALIZED;
	if (!error)
		users--;
	pthread_mutex_unlock(&users_lock);
	return error;
}

API int nvmlSystemGetDriverVersion(char *version, unsigned int size)
{
	char told_version[SIM_FAULT_SIZE];
	int cuda_version, error = begin("GetDriverVersion");
	if (error || !version)
		return error ? error : INVALID_ARGUMENT;
	const char *own = sim_driver_version(state->driver, &cuda_version);
	return give_text(version, size, sim_fault("driver.version", told_version) ? told_version : own);
}

API int nvmlSystemGetNVMLVersion(char *version, unsigned int size)
{
	char text[32];
	int cuda_version, error = begin("GetNVMLVersion");
	if (error || !version)
		return error ? error : INVALID_ARGUMENT;
	const char *own = sim_driver_version(state->driver, &cuda_version);
	snprintf(text, sizeof text, "%d.%s", cuda_version / 1000, own);
	return give_text(version, size, text);
}

API int nvmlSystemGetCudaDriverVersion(int *version)
{
	int error = begin("GetCudaDriverVersion");
	if (error || !version)
		return error ? error : INVALID_ARGUMENT;
	*version = state->cuda_version;
	return SUCCESS;
}

API int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
	return nvmlSystemGetCudaDriverVersion(version);
}

API int nvmlDeviceGetCount_v2(unsigned int *count)
{
	int error = begin("GetCount");
	if (error || !count)
		return error ? error : INVALID_ARGUMENT;
	*count = (unsigned int)state->gpu_count;
	return SUCCESS;
}

API int nvmlDeviceGetCount(unsigned int *count)
{
	return nvmlDeviceGetCount_v2(count);
}

/* Hand out a handle; the first one of a process is slow on the real card (O29). */
static int give_handle(int index, nvml_device *device)
{
	static int handed_out;
	if (sim_gpu_lost(index))
		return GPU_IS_LOST;
	if (!__atomic_exchange_n(&handed_out, 1, __ATOMIC_RELAXED))
		sim_latency(7);
	*device = &state->gpus[index];
	return SUCCESS;
}

API int nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvml_device *device)
{
	int error = begin("GetHandleByIndex");
	if (error)
		return error;
	if (!device || index >= (unsigned int)state->gpu_count)
		return INVALID_ARGUMENT;
	return give_handle((int)index, device);
}

API int nvmlDeviceGetHandleByIndex(unsigned int index, nvml_device *device)
{
	return nvmlDeviceGetHandleByIndex_v2(index, device);
}

API int nvmlDeviceGetHandleByUUID(const char *uuid, nvml_device *device)
{
	int error = begin("GetHandleByUUID");
	if (error)
		return error;
	if (!uuid || !device)
		return INVALID_ARGUMENT;
	int index = sim_gpu_by_uuid(state, uuid);
	return index < 0 ? NOT_FOUND : give_handle(index, device);
}

API int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvml_device *device)
{
	unsigned int domain, bus, slot;
	int error = begin("GetHandleByPciBusId");
	if (error)
		return error;
	if (!bus_id || !device)
		return INVALID_ARGUMENT;
	if (sscanf(bus_id, "%8x:%2x:%2x", &domain, &bus, &slot) != 3) {
		domain = 0;
		if (sscanf(bus_id, "%2x:%2x", &bus, &slot) != 2)
			return INVALID_ARGUMENT;
	}
	for (int i = 0; i < state->gpu_count; i++) {
		const struct sim_gpu *gpu = &state->gpus[i];
		if (gpu->domain == domain && gpu->bus == bus && gpu->device == slot)
			return give_handle(i, device);
	}
	return NOT_FOUND;
}

API int nvmlDeviceGetHandleByPciBusId(const char *bus_id, nvml_device *device)
{
	return nvmlDeviceGetHandleByPciBusId_v2(bus_id, device);
}

API int nvmlDeviceGetUUID(nvml_device gpu, char *uuid, unsigned int size)
{
	int error = begin_device("GetUUID", gpu, uuid);
	return error ? error : give_text(uuid, size, gpu->uuid);
}

API int nvmlDeviceGetName(nvml_device gpu, char *name, unsigned int size)
{
	int error = begin_device("GetName", gpu, name);
	return error ? error : give_text(name, size, gpu->name);
}

API int nvmlDeviceGetIndex(nvml_device gpu, unsigned int *index)
{
	int error = begin_device("GetIndex", gpu, index);
	if (!error)
		*index = (unsigned int)(gpu->parts ? gpu->instance - 1 : gpu_index(gpu));
	return error;
}

API int nvmlDeviceGetMinorNumber(nvml_device gpu, unsigned int *minor)
{
	int error = begin_gpu("GetMinorNumber", gpu, minor);
	if (!error)
		*minor = (unsigned int)gpu_index(gpu);
	return error;
}

API int nvmlDeviceGetMultiGpuBoard(nvml_device gpu, unsigned int *multi)
{
	int error = begin_device("GetMultiGpuBoard", gpu, multi);
	if (!error)
		*multi = 0;
	return error;
}

API int nvmlDeviceGetPersistenceMode(nvml_device gpu, int *mode)
{
	int error = begin_gpu("GetPersistenceMode", gpu, mode);
	if (!error)
		*mode = !sim_fault_is("nvml.GetPersistenceMode", "off");
	return error;
}

API int nvmlDeviceGetMigMode(nvml_device gpu, unsigned int *current, unsigned int *pending)
{
	int error = begin_gpu("GetMigMode", gpu, current);
	if (!error)
		*current = gpu->mig || sim_fault_is("nvml.GetMigMode", "on");
	if (!error && pending)
		*pending = *current != sim_fault_is("nvml.GetMigMode", "changed");
	return error;
}

API int nvmlDeviceIsMigDeviceHandle(nvml_device gpu, unsigned int *is_mig)
{
	int error = begin_device("IsMigDeviceHandle", gpu, is_mig);
	if (!error)
		*is_mig = gpu->parts > 0;
	return error;
}

API int nvmlDeviceGetMaxMigDeviceCount(nvml_device gpu, unsigned int *count)
{
	int error = begin_gpu("GetMaxMigDeviceCount", gpu, count);
	if (!error)
		*count = gpu->mig ? SIM_MIG_PARTS : 0;
	return error;
}

API int nvmlDeviceGetMigDeviceHandleByIndex(nvml_device gpu, unsigned int index, nvml_device *slice)
{
	int error = begin_gpu("GetMigDeviceHandleByIndex", gpu, slice);
	for (int i = state->gpu_count; !error && i < SIM_MAX_GPUS; i++)
		if (sim_is_there(state, i) && state->gpus[i].parent == gpu_index(gpu) &&
		    state->gpus[i].instance == (int)index + 1) {
			*slice = &state->gpus[i];
			return SUCCESS;
		}
	return error ? error : NOT_FOUND;
}

API int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvml_device slice, nvml_device *gpu)
{
	int error = begin_mig("GetDeviceHandleFromMigDeviceHandle", slice, gpu);
	if (!error)
		*gpu = &state->gpus[slice->parent];
	return error;
}

API int nvmlDeviceGetGpuInstanceId(nvml_device slice, unsigned int *id)
{
	int error = begin_mig("GetGpuInstanceId", slice, id);
	if (!error)
		*id = (unsigned int)slice->instance;
	return error;
}

API int nvmlDeviceGetComputeInstanceId(nvml_device slice, unsigned int *id)
{
	int error = begin_mig("GetComputeInstanceId", slice, id);
	if (!error)
		*id = 0;
	return error;
}

API int nvmlDeviceGetAttributes_v2(nvml_device slice, struct nvml_attributes *attributes)
{
	int error = begin_device("GetAttributes", slice, attributes);
	if (error || !slice->parts)
		return error ? error : NOT_SUPPORTED;
	memset(attributes, 0, sizeof *attributes);
	attributes->multiprocessors = (unsigned int)slice->sms;
	attributes->gpu_slices = attributes->compute_slices = (unsigned int)slice->parts;
	attributes->memory_mib = slice->memory_bytes / SIM_MIB;
	return SUCCESS;
}

API int nvmlDeviceGetCudaComputeCapability(nvml_device gpu, int *major, int *minor)
{
	int error = begin_gpu("GetCudaComputeCapability", gpu, major);
	if (error || !minor)
		return error ? error : INVALID_ARGUMENT;
	*major = gpu->compute_capability / 10;
	*minor = gpu->compute_capability % 10;
	return SUCCESS;
}

static uint64_t used_bytes(const struct sim_gpu *gpu)
{
	sim_lock(state);
	uint64_t used = sim_bytes_used(state, gpu_index(gpu));
	sim_unlock(state);
	return used;
}

/* The first form counts the driver's own part as used, the second apart, as NVML documents. */
API int nvmlDeviceGetMemoryInfo(nvml_device gpu, struct nvml_memory *memory)
{
	int error = begin_device("GetMemoryInfo", gpu, memory);
	if (error)
		return error;
	memory->total = gpu->memory_bytes;
	memory->used = gpu->memory_bytes - sim_cuda_total(gpu) + used_bytes(gpu);
	memory->free = memory->total - memory->used;
	return SUCCESS;
}

API int nvmlDeviceGetMemoryInfo_v2(nvml_device gpu, struct nvml_memory_v2 *memory)
{
	int error = begin_device("GetMemoryInfo", gpu, memory);
	if (error)
		return error;
	if (memory->version != MEMORY_V2)
		return ARGUMENT_VERSION_MISMATCH;
	memory->total = gpu->memory_bytes;
	memory->reserved = gpu->memory_bytes - sim_cuda_total(gpu);
	memory->used = used_bytes(gpu);
	memory->free = memory->total - memory->reserved - memory->used;
	return SUCCESS;
}

API int nvmlDeviceGetComputeMode(nvml_device gpu, int *mode)
{
	int error = begin_device("GetComputeMode", gpu, mode);
	if (!error && gpu->mig)
		error = NOT_SUPPORTED;
	if (!error)
		*mode = gpu->mode;
	return error;
}

API int nvmlDeviceSetComputeMode(nvml_device gpu, int mode)
{
	int error = begin_device("SetComputeMode", gpu, gpu);
	if (error)
		return error;
	if (mode != SIM_MODE_DEFAULT && mode != SIM_MODE_PROHIBITED && mode != SIM_MODE_EXCLUSIVE_PROCESS)
		return INVALID_ARGUMENT;
	if (geteuid() != 0)
		return NO_PERMISSION;
	if (gpu->mig || gpu->parts)
		return NOT_SUPPORTED;
	if (sim_fault_is("nvml.SetComputeMode", "noop"))
		return SUCCESS;
	sim_lock(state);
	gpu->mode = mode;
	sim_unlock(state);
	return SUCCESS;
}

static unsigned int instance_of(const struct sim_context *entry)
{
	return state->gpus[entry->gpu].parts ? (unsigned int)state->gpus[entry->gpu].instance : ~0u;
}

static unsigned int compute_of(const struct sim_context *entry)
{
	return state->gpus[entry->gpu].parts ? 0 : ~0u;
}

static bool is_listed(const struct sim_context *entry, int gpu, bool mps)
{
	bool within = entry->gpu >= 0 && state->gpus[entry->gpu].parts && state->gpus[entry->gpu].parent == gpu;
	if (entry->gpu != gpu && !within)
		return false;
	return mps ? entry->kind == SIM_CLIENT : entry->kind == SIM_PLAIN || entry->kind == SIM_SERVER;
}

/* One row a process, with its contexts summed. Returns how many there are, of which at most room are written. */
static unsigned int list_processes(int gpu, bool mps, struct nvml_process *rows, unsigned int room)
{
	unsigned int count = 0;
	for (int i = 0; i < SIM_MAX_CONTEXTS; i++) {
		const struct sim_context *entry = &state->contexts[i];
		bool first = is_listed(entry, gpu, mps);
		uint64_t bytes = first ? sim_context_bytes(state, entry) : 0;
		for (int j = 0; first && j < SIM_MAX_CONTEXTS; j++)
			if (j != i && state->contexts[j].pid == entry->pid && is_listed(&state->contexts[j], gpu, mps)) {
				first = j > i;
				bytes += sim_context_bytes(state, &state->contexts[j]);
			}
		if (!first)
			continue;
		if (count < room)
			rows[count] = (struct nvml_process){(unsigned int)entry->pid, bytes, instance_of(entry), compute_of(entry)};
		count++;
	}
	return count;
}

static int running_processes(const char *function, nvml_device gpu, bool mps, unsigned int *count,
			     struct nvml_process *rows)
{
	int error = begin_device(function, gpu, count);
	if (error)
		return error;
	if (*count > 0 && !rows)
		return INVALID_ARGUMENT;
	unsigned int room = *count;
	sim_lock(state);
	*count = list_processes(gpu_index(gpu), mps, rows, room);
	sim_unlock(state);
	return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

API int nvmlDeviceGetComputeRunningProcesses_v3(nvml_device gpu, unsigned int *count, struct nvml_process *rows)
{
	return running_processes("GetComputeRunningProcesses", gpu, false, count, rows);
}

API int nvmlDeviceGetComputeRunningProcesses_v2(nvml_device gpu, unsigned int *count, struct nvml_process *rows)
{
	return nvmlDeviceGetComputeRunningProcesses_v3(gpu, count, rows);
}

API int nvmlDeviceGetMPSComputeRunningProcesses_v3(nvml_device gpu, unsigned int *count, struct nvml_process *rows)
{
	return running_processes("GetMPSComputeRunningProcesses", gpu, true, count, rows);
}

API int nvmlDeviceGetMPSComputeRunningProcesses_v2(nvml_device gpu, unsigned int *count, struct nvml_process *rows)
{
	return nvmlDeviceGetMPSComputeRunningProcesses_v3(gpu, count, rows);
}

API int nvmlDeviceGetPciInfo_v3(nvml_device gpu, struct nvml_pci *pci)
{
	int error = begin_device("GetPciInfo", gpu, pci);
	if (error)
		return error;
	memset(pci, 0, sizeof *pci);
	pci->domain = gpu->domain;
	pci->bus = gpu->bus;
	pci->device = gpu->device;
	pci->pci_device_id = 0x233510de; /* an H200's */
	pci->pci_subsystem_id = 0x18be10de;
	snprintf(pci->bus_id_legacy, sizeof pci->bus_id_legacy, "%04X:%02X:%02X.0", gpu->domain & 0xffffu,
		 gpu->bus & 0xffu, gpu->device & 0xffu);
	snprintf(pci->bus_id, sizeof pci->bus_id, "%08X:%02X:%02X.0", gpu->domain, gpu->bus, gpu->device);
	return SUCCESS;
}

/* Of the whole GPU, and of nothing else. */
API int nvmlDeviceGetSamples(nvml_device gpu, int type, unsigned long long after_us, int *value_type, unsigned int *count,
			     struct nvml_sample *samples)
{
	int error = begin_gpu("GetSamples", gpu, count);
	uint64_t now = sim_since_1970_us();
	if (!error && (type != GPU_UTILIZATION_SAMPLES || gpu->mig))
		error = NOT_SUPPORTED;
	if (error || !value_type || (samples && *count < SAMPLES))
		return error ? error : INVALID_ARGUMENT;
	*value_type = UNSIGNED_INT;
	*count = 0;
	for (uint64_t i = SAMPLES; i-- > 0;) {
		uint64_t at = now - i * SAMPLE_US;
		if (at <= after_us)
			continue;
		if (samples) {
			samples[*count].time_us = at;
			samples[*count].value.all = 0;
			samples[*count].value.number = gpu->busy_us > at - SAMPLE_US && gpu->busy_us <= at ? 30 : 0;
		}
		++*count;
	}
	return *count ? SUCCESS : NOT_FOUND;
}
