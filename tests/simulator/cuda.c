/* libcuda.so.1 of a simulated node: contexts and memory of one process, with MPS or without.
 *
 * As the real one, it uses MPS when the `control` socket can be reached and says nothing when it cannot (O21). */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mps_wire.h"
#include "sim_fault.h"
#include "sim_state.h"
#include "sim_units.h"

#define API __attribute__((visibility("default")))

enum cuda_error {
	CUDA_SUCCESS = 0,
	INVALID_VALUE = 1,
	OUT_OF_MEMORY = 2,
	NOT_INITIALIZED = 3,
	DEVICE_UNAVAILABLE = 46,
	NO_DEVICE = 100,
	INVALID_DEVICE = 101,
	INVALID_CONTEXT = 201,
	ILLEGAL_ADDRESS = 700,
	LAUNCH_FAILED = 719,
	CONNECTION_FAILED = 805,
	RPC_FAILURE = 806,
};

enum attribute {
	MAX_THREADS_PER_BLOCK = 1,
	WARP_SIZE = 10,
	MULTIPROCESSOR_COUNT = 16,
	COMPUTE_MODE = 20,
	PCI_BUS_ID = 33,
	PCI_DEVICE_ID = 34,
	MAX_THREADS_PER_MULTIPROCESSOR = 39,
	PCI_DOMAIN_ID = 50,
	COMPUTE_CAPABILITY_MAJOR = 75,
	COMPUTE_CAPABILITY_MINOR = 76,
};

struct allocation {
	struct allocation *next;
	uint64_t address, bytes;
};

struct context {
	struct context *next;
	int ordinal;    /* among this process's devices */
	int slot;       /* its entry in the shared state */
	int connection; /* to the server, -1 without MPS */
	int error;      /* one that stays */
	int retained;   /* a primary context's users; 0 for any other */
	struct allocation *allocations;
};

static struct {
	pthread_mutex_t lock;
	struct sim_state *state;
	pid_t pid; /* who called cuInit; a fork has no CUDA until exec, as in life */
	bool ready, mps;
	int connection; /* the one of cuInit */
	struct wire_welcome server;
	struct units_gpus gpus;
	int sms[SIM_MAX_GPUS];
	uint64_t limit[SIM_MAX_GPUS]; /* by ordinal; 0: none */
	struct context *contexts;
	uint64_t next_address;
} cuda = {.lock = PTHREAD_MUTEX_INITIALIZER, .connection = -1, .next_address = (uint64_t)0x7f5100000000};

static _Thread_local struct context *current;

static const struct {
	int number;
	const char *name, *text;
} errors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {46, "CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {805, "CUDA_ERROR_MPS_CONNECTION_FAILED", "MPS client failed to connect to the MPS control daemon or the MPS server"},
    {806, "CUDA_ERROR_MPS_RPC_FAILURE", "the remote procedural call between the MPS server and the MPS client failed"},
    {807, "CUDA_ERROR_MPS_SERVER_NOT_READY", "MPS server is not ready to accept new MPS client requests"},
    {808, "CUDA_ERROR_MPS_MAX_CLIENTS_REACHED",
     "the hardware resources required to create MPS client have been exhausted"},
    {809, "CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED",
     "the hardware resources required to support device connections have been exhausted"},
    {810, "CUDA_ERROR_MPS_CLIENT_TERMINATED", "the MPS client has been terminated by the server"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

static int find_error(int number)
{
	for (int i = 0; i < (int)(sizeof errors / sizeof *errors); i++)
		if (errors[i].number == number)
			return i;
	return -1;
}

API int cuGetErrorName(int number, const char **name)
{
	int at = find_error(number);
	if (!name)
		return INVALID_VALUE;
	*name = at < 0 ? NULL : errors[at].name;
	return at < 0 ? INVALID_VALUE : CUDA_SUCCESS;
}

API int cuGetErrorString(int number, const char **text)
{
	int at = find_error(number);
	if (!text)
		return INVALID_VALUE;
	*text = at < 0 ? NULL : errors[at].text;
	return at < 0 ? INVALID_VALUE : CUDA_SUCCESS;
}

API int cuDriverGetVersion(int *version)
{
	if (!version)
		return INVALID_VALUE;
	pthread_mutex_lock(&cuda.lock);
	if (!cuda.state)
		cuda.state = sim_open();
	*version = cuda.state ? cuda.state->cuda_version : 0;
	pthread_mutex_unlock(&cuda.lock);
	return CUDA_SUCCESS;
}

/* ---- Finding the server ---- */

/* A child must not keep its parent's clients alive. */
static void close_in_child(void)
{
	for (struct context *one = cuda.contexts; one; one = one->next)
		if (one->connection >= 0)
			close(one->connection);
	if (cuda.connection >= 0)
		close(cuda.connection);
	cuda.connection = -1;
	cuda.contexts = NULL;
}

/* Say who we are and wait for the server's word; the daemon may have to start it first. */
static int knock(int fd, int gpu, struct wire_welcome *welcome)
{
	uint32_t type;
	const char *connections = getenv("CUDA_DEVICE_MAX_CONNECTIONS");
	struct wire_client request = {.gpu = gpu, .connections = connections ? atoi(connections) : 0};
	if (!wire_send(fd, WIRE_CLIENT, &request, sizeof request, true))
		return CONNECTION_FAILED;
	if (wire_receive(fd, &type, welcome, sizeof *welcome) != (ssize_t)sizeof *welcome || type != WIRE_WELCOME)
		return CONNECTION_FAILED;
	if (welcome->gpu_count < 0 || welcome->gpu_count > SIM_MAX_GPUS)
		return CONNECTION_FAILED;
	return welcome->status;
}

static int join_server(void)
{
	int probe = wire_connect();
	if (probe < 0)
		return CUDA_SUCCESS; /* without MPS, and without a word */
	close(probe); /* the real client's first connection comes to nothing, too */
	int fd = wire_connect();
	int error = fd < 0 ? CONNECTION_FAILED : knock(fd, -1, &cuda.server);
	if (error) {
		if (fd >= 0)
			close(fd);
		return error;
	}
	cuda.connection = fd;
	cuda.mps = true;
	return CUDA_SUCCESS;
}

/* ---- What the server and the environment leave us ---- */

static void cap_sms(void)
{
	double own, percentage = cuda.mps ? cuda.server.percentage : 100.0;
	const char *text = getenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE");
	if (cuda.mps && text && units_read_percentage(text, &own) && own < percentage)
		percentage = own; /* lowers, never raises (O11) */
	for (int i = 0; i < cuda.gpus.count; i++)
		cuda.sms[i] = units_sms(cuda.state->gpus[cuda.gpus.index[i]].sms, percentage);
}

/* Apply one "<device>=<size>"; false when it cannot be used. */
static bool lower_limit(char *entry)
{
	char *equals = strchr(entry, '=');
	if (!equals)
		return false;
	*equals = '\0';
	int ordinal = units_place(cuda.state, &cuda.gpus, entry);
	uint64_t bytes = units_read_limit(equals + 1);
	if (ordinal < 0 || bytes == 0)
		return false;
	if (cuda.limit[ordinal] == 0 || bytes < cuda.limit[ordinal])
		cuda.limit[ordinal] = bytes;
	return true;
}

/* One entry that cannot be used, and there is no limit at all (O12). */
static void limit_memory(void)
{
	char copy[4096], *rest = copy, *entry;
	const char *text = getenv("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT");
	memset(cuda.limit, 0, sizeof cuda.limit);
	if (!cuda.mps)
		return;
	for (int i = 0; i < cuda.gpus.count; i++)
		cuda.limit[i] = cuda.server.limit_bytes[i]; /* by our ordinal, not by GPU (O13) */
	if (!text || !*text)
		return;
	snprintf(copy, sizeof copy, "%s", text);
	while ((entry = strsep(&rest, ",")))
		if (!lower_limit(entry)) {
			memset(cuda.limit, 0, sizeof cuda.limit);
			return;
		}
}

static void add_attached_entry(void)
{
	int slot;
	struct sim_context entry = {.kind = SIM_ATTACHED,
				    .pid = sim_own_pid(),
				    .started = sim_process_started(sim_own_pid()),
				    .gpu = -1,
				    .server_pid = cuda.server.server_pid,
				    .server_started = sim_process_started(cuda.server.server_pid)};
	sim_lock(cuda.state);
	sim_context_add(cuda.state, &entry, &slot);
	sim_unlock(cuda.state);
}

static void leave_server(void)
{
	if (cuda.connection >= 0)
		close(cuda.connection);
	cuda.connection = -1;
	cuda.mps = false;
}

static int initialise(void)
{
	static bool fork_handled;
	if (!cuda.state)
		cuda.state = sim_open();
	if (!cuda.state || cuda.state->gpu_count == 0)
		return NO_DEVICE;
	if (!fork_handled)
		fork_handled = pthread_atfork(NULL, NULL, close_in_child) == 0;
	cuda.mps = false;
	int error = join_server();
	if (error)
		return error;
	struct units_gpus all = units_all(cuda.state);
	if (cuda.mps) {
		all.count = cuda.server.gpu_count;
		memcpy(all.index, cuda.server.gpus, sizeof all.index);
		for (int i = 0; i < all.count; i++)
			if (!sim_is_there(cuda.state, all.index[i]))
				all.count = i;
	}
	cuda.gpus = units_visible(cuda.state, units_openable(cuda.state, all), getenv("CUDA_VISIBLE_DEVICES"));
	if (cuda.gpus.count == 0) {
		leave_server();
		return NO_DEVICE;
	}
	cap_sms();
	limit_memory();
	if (cuda.mps)
		add_attached_entry();
	sim_latency(cuda.mps ? 12 + 8 * (all.count - 1) : 100);
	cuda.pid = getpid();
	cuda.ready = true;
	return CUDA_SUCCESS;
}

API int cuInit(unsigned int flags)
{
	if (flags)
		return INVALID_VALUE;
	pthread_mutex_lock(&cuda.lock);
	int error = !cuda.ready ? initialise() : cuda.pid == getpid() ? CUDA_SUCCESS : NOT_INITIALIZED;
	pthread_mutex_unlock(&cuda.lock);
	return error;
}

/* ---- Devices ---- */

static int check_device(int device)
{
	if (!cuda.ready || cuda.pid != getpid())
		return NOT_INITIALIZED;
	return device >= 0 && device < cuda.gpus.count ? CUDA_SUCCESS : INVALID_DEVICE;
}

static const struct sim_gpu *gpu_of(int device)
{
	return &cuda.state->gpus[cuda.gpus.index[device]];
}

API int cuDeviceGetCount(int *count)
{
	if (!cuda.ready || cuda.pid != getpid())
		return NOT_INITIALIZED;
	if (!count)
		return INVALID_VALUE;
	*count = cuda.gpus.count;
	return CUDA_SUCCESS;
}

API int cuDeviceGet(int *device, int ordinal)
{
	int error = check_device(ordinal);
	if (error || !device)
		return error ? error : INVALID_VALUE;
	*device = ordinal;
	return CUDA_SUCCESS;
}

API int cuDeviceGetUuid(unsigned char *bytes, int device)
{
	int error = check_device(device);
	if (error || !bytes)
		return error ? error : INVALID_VALUE;
	const char *digit = gpu_of(device)->uuid + strlen("GPU-");
	for (int i = 0; i < 16; i++) {
		unsigned int byte = 0;
		if (*digit == '-')
			digit++;
		sscanf(digit, "%2x", &byte);
		bytes[i] = (unsigned char)byte;
		digit += 2;
	}
	return CUDA_SUCCESS;
}

API int cuDeviceGetUuid_v2(unsigned char *bytes, int device)
{
	return cuDeviceGetUuid(bytes, device);
}

API int cuDeviceGetName(char *name, int size, int device)
{
	int error = check_device(device);
	if (error || !name || size < 1)
		return error ? error : INVALID_VALUE;
	snprintf(name, (size_t)size, "%s", gpu_of(device)->name);
	return CUDA_SUCCESS;
}

API int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
	int error = check_device(device);
	if (error || !bytes)
		return error ? error : INVALID_VALUE;
	*bytes = sim_cuda_total(gpu_of(device));
	return CUDA_SUCCESS;
}

API int cuDeviceGetPCIBusId(char *text, int size, int device)
{
	int error = check_device(device);
	if (error || !text || size < 13)
		return error ? error : INVALID_VALUE;
	const struct sim_gpu *gpu = gpu_of(device);
	snprintf(text, (size_t)size, "%04x:%02x:%02x.0", gpu->domain & 0xffffu, gpu->bus & 0xffu, gpu->device & 0xffu);
	return CUDA_SUCCESS;
}

API int cuDeviceGetAttribute(int *value, int attribute, int device)
{
	int error = check_device(device);
	if (error || !value)
		return error ? error : INVALID_VALUE;
	const struct sim_gpu *gpu = gpu_of(device);
	switch (attribute) {
	case MAX_THREADS_PER_BLOCK:
		*value = 1024;
		return CUDA_SUCCESS;
	case WARP_SIZE:
		*value = 32;
		return CUDA_SUCCESS;
	case MULTIPROCESSOR_COUNT:
		*value = cuda.sms[device];
		return CUDA_SUCCESS;
	case COMPUTE_MODE:
		*value = gpu->mode;
		return CUDA_SUCCESS;
	case PCI_BUS_ID:
		*value = (int)gpu->bus;
		return CUDA_SUCCESS;
	case PCI_DEVICE_ID:
		*value = (int)gpu->device;
		return CUDA_SUCCESS;
	case MAX_THREADS_PER_MULTIPROCESSOR:
		*value = 2048;
		return CUDA_SUCCESS;
	case PCI_DOMAIN_ID:
		*value = (int)gpu->domain;
		return CUDA_SUCCESS;
	case COMPUTE_CAPABILITY_MAJOR:
		*value = gpu->compute_capability / 10;
		return CUDA_SUCCESS;
	case COMPUTE_CAPABILITY_MINOR:
		*value = gpu->compute_capability % 10;
		return CUDA_SUCCESS;
	default:
		return INVALID_VALUE;
	}
}

/* ---- Contexts; cuda.lock is held ---- */

/* An error the server has sent for a connection, 0 when there is none. */
static int word_from_server(int connection)
{
	struct {
		struct wire_header header;
		int32_t error;
	} word;
	if (connection < 0)
		return CUDA_SUCCESS;
	ssize_t got = recv(connection, &word, sizeof word, MSG_DONTWAIT | MSG_PEEK);
	if (got < 0 && (errno == EAGAIN || errno == EINTR))
		return CUDA_SUCCESS;
	if (got == (ssize_t)sizeof word && word.header.type == WIRE_ERROR)
		return word.error; /* left there: it stays true */
	return RPC_FAILURE;
}

static int look(struct context *context)
{
	if (!context->error)
		context->error = word_from_server(context->connection);
	return context->error;
}

/* This process's bytes on a GPU: what a limit counts. */
static uint64_t own_bytes(int gpu)
{
	uint64_t bytes = 0;
	for (int i = 0; i < SIM_MAX_CONTEXTS; i++) {
		const struct sim_context *entry = &cuda.state->contexts[i];
		if (entry->kind != SIM_NONE && entry->gpu == gpu && entry->pid == sim_own_pid())
			bytes += entry->bytes;
	}
	return bytes;
}

/* Free bytes for this process; the state is locked. */
static uint64_t free_bytes(int device)
{
	int gpu = cuda.gpus.index[device];
	uint64_t left = sim_bytes_free(cuda.state, gpu), limit = cuda.limit[device];
	if (limit == 0)
		return left;
	uint64_t own = own_bytes(gpu), under = limit > own ? limit - own : 0;
	return under < left ? under : left;
}

static int add_entry(struct context *context, const struct wire_welcome *welcome)
{
	int gpu = cuda.gpus.index[context->ordinal];
	uint64_t mib = cuda.mps ? units_context_mib(cuda.sms[context->ordinal]) : SIM_PLAIN_CONTEXT_MIB;
	struct sim_context entry = {.kind = cuda.mps ? SIM_CLIENT : SIM_PLAIN,
				    .pid = sim_own_pid(),
				    .started = sim_process_started(sim_own_pid()),
				    .gpu = gpu,
				    .bytes = mib * SIM_MIB};
	if (cuda.mps) {
		entry.server_pid = welcome->server_pid;
		entry.server_started = sim_process_started(welcome->server_pid);
		entry.context_id = welcome->context_id;
		entry.sequence = welcome->sequence;
	}
	sim_lock(cuda.state);
	int error = OUT_OF_MEMORY;
	if (entry.bytes <= free_bytes(context->ordinal) || cuda.limit[context->ordinal] == 0)
		error = sim_context_add(cuda.state, &entry, &context->slot);
	sim_unlock(cuda.state);
	return error;
}

static int connect_context(struct context *context, struct wire_welcome *welcome)
{
	int error = word_from_server(cuda.connection);
	if (error)
		return error;
	context->connection = wire_connect();
	if (context->connection < 0)
		return CONNECTION_FAILED;
	return knock(context->connection, cuda.gpus.index[context->ordinal], welcome);
}

static int create(int device, struct context **created)
{
	struct wire_welcome welcome = {0};
	struct context *fresh = calloc(1, sizeof *fresh);
	if (!fresh)
		return OUT_OF_MEMORY;
	fresh->ordinal = device;
	fresh->connection = -1;
	sim_latency(95);
	int error = cuda.mps ? connect_context(fresh, &welcome) : CUDA_SUCCESS;
	if (!error)
		error = add_entry(fresh, &welcome);
	if (error) {
		if (fresh->connection >= 0)
			close(fresh->connection);
		free(fresh);
		return error;
	}
	fresh->next = cuda.contexts;
	cuda.contexts = fresh;
	*created = fresh;
	return CUDA_SUCCESS;
}

static bool known(const struct context *context)
{
	for (const struct context *one = cuda.contexts; one; one = one->next)
		if (one == context)
			return true;
	return false;
}

static void destroy(struct context *gone)
{
	struct context **link = &cuda.contexts;
	while (*link != gone)
		link = &(*link)->next;
	*link = gone->next;
	sim_lock(cuda.state);
	struct sim_context *entry = sim_context_own(cuda.state, gone->slot);
	if (entry)
		memset(entry, 0, sizeof *entry);
	sim_unlock(cuda.state);
	if (gone->connection >= 0)
		close(gone->connection);
	while (gone->allocations) {
		struct allocation *next = gone->allocations->next;
		free(gone->allocations);
		gone->allocations = next;
	}
	if (current == gone)
		current = NULL;
	free(gone);
}

/* Take the lock and check the current context; on an error the lock is not held. */
static int begin(struct context **context)
{
	if (!cuda.ready || cuda.pid != getpid())
		return NOT_INITIALIZED;
	pthread_mutex_lock(&cuda.lock);
	int error = current && known(current) ? look(current) : INVALID_CONTEXT;
	*context = current;
	if (error)
		pthread_mutex_unlock(&cuda.lock);
	else
		cuda.state->gpus[cuda.gpus.index[current->ordinal]].busy_us = sim_since_1970_us();
	return error;
}

API int cuCtxCreate_v2(struct context **context, unsigned int flags, int device)
{
	(void)flags;
	int error = check_device(device);
	if (error || !context)
		return error ? error : INVALID_VALUE;
	pthread_mutex_lock(&cuda.lock);
	error = create(device, context);
	if (!error)
		current = *context;
	pthread_mutex_unlock(&cuda.lock);
	return error;
}

API int cuCtxDestroy_v2(struct context *context)
{
	if (!cuda.ready || cuda.pid != getpid())
		return NOT_INITIALIZED;
	pthread_mutex_lock(&cuda.lock);
	bool ours = known(context);
	int error = ours ? look(context) : INVALID_CONTEXT;
	if (ours)
		destroy(context);
	pthread_mutex_unlock(&cuda.lock);
	return error;
}

API int cuCtxSetCurrent(struct context *context)
{
	if (!cuda.ready || cuda.pid != getpid())
		return NOT_INITIALIZED;
	pthread_mutex_lock(&cuda.lock);
	int error = !context || known(context) ? CUDA_SUCCESS : INVALID_CONTEXT;
	if (!error)
		current = context;
	pthread_mutex_unlock(&cuda.lock);
	return error;
}

API int cuCtxGetCurrent(struct context **context)
{
	if (!cuda.ready || cuda.pid != getpid())
		return NOT_INITIALIZED;
	if (!context)
		return INVALID_VALUE;
	*context = current;
	return CUDA_SUCCESS;
}

API int cuCtxGetDevice(int *device)
{
	struct context *context;
	int error = device ? begin(&context) : INVALID_VALUE;
	if (error)
		return error;
	*device = context->ordinal;
	pthread_mutex_unlock(&cuda.lock);
	return CUDA_SUCCESS;
}

API int cuCtxSynchronize(void)
{
	struct context *context;
	int error = begin(&context);
	if (!error)
		pthread_mutex_unlock(&cuda.lock);
	return error;
}

static struct context *primary(int device)
{
	for (struct context *one = cuda.contexts; one; one = one->next)
		if (one->ordinal == device && one->retained > 0)
			return one;
	return NULL;
}

API int cuDevicePrimaryCtxRetain(struct context **context, int device)
{
	int error = check_device(device);
	if (error || !context)
		return error ? error : INVALID_VALUE;
	pthread_mutex_lock(&cuda.lock);
	*context = primary(device);
	if (!*context)
		error = create(device, context);
	if (!error)
		(*context)->retained++;
	pthread_mutex_unlock(&cuda.lock);
	return error;
}

API int cuDevicePrimaryCtxRelease_v2(int device)
{
	int error = check_device(device);
	if (error)
		return error;
	pthread_mutex_lock(&cuda.lock);
	struct context *one = primary(device);
	if (!one)
		error = INVALID_CONTEXT;
	else if (--one->retained == 0)
		destroy(one);
	pthread_mutex_unlock(&cuda.lock);
	return error;
}

API int cuDevicePrimaryCtxRelease(int device)
{
	return cuDevicePrimaryCtxRelease_v2(device);
}

/* ---- Memory ---- */

API int cuMemGetInfo_v2(size_t *free_now, size_t *total)
{
	struct context *context;
	int error = free_now && total ? begin(&context) : INVALID_VALUE;
	if (error)
		return error;
	sim_lock(cuda.state);
	*free_now = free_bytes(context->ordinal);
	sim_unlock(cuda.state);
	*total = sim_cuda_total(gpu_of(context->ordinal)); /* the whole card, limit or not (O16) */
	pthread_mutex_unlock(&cuda.lock);
	return CUDA_SUCCESS;
}

/* Put bytes on this context's account if there is room. */
static int charge(const struct context *context, uint64_t bytes)
{
	int error = OUT_OF_MEMORY;
	sim_lock(cuda.state);
	struct sim_context *entry = sim_context_own(cuda.state, context->slot);
	if (entry && bytes <= free_bytes(context->ordinal)) {
		entry->bytes += bytes;
		error = CUDA_SUCCESS;
	}
	sim_unlock(cuda.state);
	return error;
}

static void refund(const struct context *context, uint64_t bytes)
{
	sim_lock(cuda.state);
	struct sim_context *entry = sim_context_own(cuda.state, context->slot);
	if (entry)
		entry->bytes -= bytes;
	sim_unlock(cuda.state);
}

API int cuMemAlloc_v2(uint64_t *address, size_t size)
{
	const uint64_t granule = 2 * SIM_MIB;
	struct context *context;
	if (!address || size == 0)
		return INVALID_VALUE;
	int error = begin(&context);
	if (error)
		return error;
	struct allocation *fresh = calloc(1, sizeof *fresh);
	uint64_t bytes = size > UINT64_MAX - granule ? UINT64_MAX : (size + granule - 1) / granule * granule;
	error = fresh ? charge(context, bytes) : OUT_OF_MEMORY;
	if (!error) {
		*fresh = (struct allocation){context->allocations, cuda.next_address, bytes};
		context->allocations = fresh;
		cuda.next_address += bytes;
		*address = fresh->address;
	} else {
		free(fresh);
	}
	pthread_mutex_unlock(&cuda.lock);
	return error;
}

API int cuMemFree_v2(uint64_t address)
{
	struct context *context;
	if (address == 0)
		return CUDA_SUCCESS;
	int error = begin(&context);
	if (error)
		return error;
	error = INVALID_VALUE;
	for (struct allocation **link = &context->allocations; *link; link = &(*link)->next) {
		struct allocation *gone = *link;
		if (gone->address != address)
			continue;
		*link = gone->next;
		refund(context, gone->bytes);
		free(gone);
		error = CUDA_SUCCESS;
		break;
	}
	pthread_mutex_unlock(&cuda.lock);
	return error;
}

/* ---- Misbehaviour, for tests ---- */

/* Wait, without the lock, until the server says or does something. */
static int wait_for_word(const struct context *context)
{
	char byte;
	if (context->connection < 0)
		for (;;)
			pause();
	while (recv(context->connection, &byte, 1, MSG_PEEK) < 0 && errno == EINTR)
		continue;
	return word_from_server(context->connection);
}

API int simFault(int kind)
{
	struct context *context;
	int32_t message = kind == SIM_FAULT_TRAP ? SIM_FAULT_TRAP : SIM_FAULT_ILLEGAL_ADDRESS;
	int error = begin(&context);
	if (error)
		return error;
	if (context->connection < 0)
		error = kind == SIM_FAULT_TRAP ? LAUNCH_FAILED : ILLEGAL_ADDRESS;
	else
		wire_send(context->connection, WIRE_FAULT, &message, sizeof message, true);
	pthread_mutex_unlock(&cuda.lock);
	if (!error)
		error = wait_for_word(context);
	context->error = error;
	return error;
}

API int simSpin(void)
{
	struct context *context;
	int error = begin(&context);
	if (error)
		return error;
	if (context->connection >= 0)
		wire_send(context->connection, WIRE_SPIN, NULL, 0, true);
	pthread_mutex_unlock(&cuda.lock);
	context->error = wait_for_word(context);
	return context->error;
}

API int simServerPid(void)
{
	if (!cuda.ready)
		return -1;
	return cuda.mps ? cuda.server.server_pid : 0;
}
