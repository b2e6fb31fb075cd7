/* The simulated driver: GPUs and contexts of one node, in a file that every library and program here maps.
 *
 * The file stands for the kernel's part. Whoever dies is forgotten at the next look, as a driver would. */
#ifndef SIM_STATE_H
#define SIM_STATE_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define SIM_DIRECTORY "/run/simulated-gpus"
#define SIM_STATE_FILE SIM_DIRECTORY "/state"
#define SIM_FAULTS_FILE SIM_DIRECTORY "/faults"
#define SIM_GPU_NAME "Simulated H200"
#define SIM_MIB ((uint64_t)1 << 20)

enum {
	SIM_MAX_GPUS = 16, /* and MIG slices */
	SIM_MIG_PARTS = 7,
	SIM_MAX_CONTEXTS = 1024,
	SIM_RESERVED_MIB = 616, /* NVML says 143771, CUDA 143155 */
	SIM_PLAIN_CONTEXT_MIB = 526,
	SIM_SERVER_CONTEXT_MIB = 73,
	SIM_SERVED_MIB = 3, /* and that with a client: O44's server and O15's context leave 142565 */
	SIM_UUID_SIZE = 48,
	SIM_FAULT_SIZE = 256,
};

/* The numbers are NVML's and CUDA's own. */
enum sim_mode { SIM_MODE_DEFAULT = 0, SIM_MODE_PROHIBITED = 2, SIM_MODE_EXCLUSIVE_PROCESS = 3 };

enum sim_kind {
	SIM_NONE = 0,
	SIM_PLAIN,    /* a context of a process that runs without MPS */
	SIM_SERVER,   /* an MPS server's own context */
	SIM_CLIENT,   /* a client's context inside a server */
	SIM_ATTACHED, /* a client after cuInit: known to the server, on no GPU */
};

/* A GPU or, after those, a MIG slice: to CUDA and NVML each is a device. */
struct sim_gpu {
	char uuid[SIM_UUID_SIZE];
	char name[64];
	uint32_t domain, bus, device; /* the index is the PCI order and the minor number */
	int32_t sms;
	int32_t compute_capability; /* 10 * major + minor */
	int32_t mode;
	uint64_t memory_bytes; /* as NVML counts */
	int32_t mig;           /* a GPU in MIG mode */
	int32_t parts;         /* of its GPU's SIM_MIG_PARTS, that a slice has; 0 for a GPU */
	int32_t parent, instance; /* a slice's GPU, and its GPU instance, which has the compute instance 0 alone */
	uint64_t busy_us;         /* since 1970, when a context was last made or used */
};

struct sim_context {
	int32_t kind;
	int32_t pid;
	uint64_t started; /* /proc start time: a pid alone may be somebody else's by now */
	int32_t gpu;      /* index, -1 for SIM_ATTACHED */
	int32_t server_pid;
	uint64_t server_started;
	int32_t context_id; /* "Context ID" of the server's log: 1, 2, … within a process */
	int32_t sequence;   /* "ID" of ps: counts a server's contexts */
	uint64_t bytes;
};

struct sim_state {
	uint32_t magic;
	int32_t gpu_count;
	int32_t cuda_version; /* 1000 * major + 10 * minor */
	int32_t driver;       /* its branch: 535, 550 or 580 */
	int32_t slices_made;  /* since the node was made: no UUID comes again */
	pthread_mutex_t lock; /* robust and shared: a SIGKILLed holder stops nobody, threads and forks included */
	struct sim_gpu gpus[SIM_MAX_GPUS];
	struct sim_context contexts[SIM_MAX_CONTEXTS];
};

/* The cards and driver that `create` makes. */
struct sim_node {
	int gpu_count, sms, compute_capability, driver, cuda_version;
	uint64_t memory_mib;
	const char *seed; /* makes the UUIDs */
};

/* The driver that was seen of each branch: its version, and its CUDA; NULL for a branch that was not (O83). */
const char *sim_driver_version(int branch, int *cuda_version);

/* Map the state; NULL when there is none, as on a node without a driver. */
struct sim_state *sim_open(void);
/* Write a fresh state, replacing the old one. Returns 0 or an errno. */
int sim_create(const struct sim_node *node);

/* Lock and forget the dead. */
void sim_lock(struct sim_state *state);
void sim_unlock(struct sim_state *state);

/* All below: with the lock held. */

/* Add a context as the compute mode allows. Returns 0 or a CUDA error, 46 or 2; *slot is the entry's place. */
int sim_context_add(struct sim_state *state, const struct sim_context *wanted, int *slot);
/* The entry at slot if it is still this process's own, otherwise NULL. */
struct sim_context *sim_context_own(struct sim_state *state, int slot);
/* What an entry takes: a server's context is larger while it serves clients on its GPU. */
uint64_t sim_context_bytes(const struct sim_state *state, const struct sim_context *entry);
uint64_t sim_bytes_used(const struct sim_state *state, int gpu);
uint64_t sim_bytes_free(const struct sim_state *state, int gpu); /* as CUDA counts */
uint64_t sim_cuda_total(const struct sim_gpu *gpu);

/* Turn a GPU's MIG mode on and cut it into slices such as 1g.10gb; none: turn it off. Returns 0 or an errno. */
int sim_cut(struct sim_state *state, int gpu, int count, char **profiles);

/* Needs no lock. */
pid_t sim_own_pid(void); /* as the machine of /proc counts, which the driver does, too (O60) */
bool sim_is_there(const struct sim_state *state, int gpu); /* a GPU, or a slice that was not cut away */
/* A slice's device below /dev/nvidia-caps: of its GPU instance, or of its compute instance. */
int sim_cap_minor(const struct sim_gpu *slice, bool of_compute_instance);
uint64_t sim_process_started(pid_t pid); /* 0: there is no such living process */
int sim_gpu_by_uuid(const struct sim_state *state, const char *uuid);
bool sim_gpu_lost(int gpu);

/* The faults this node was told, re-read at each call. True when key is set. */
bool sim_fault(const char *key, char value[SIM_FAULT_SIZE]);
bool sim_fault_is(const char *key, const char *value);
/* The number behind a prefix: "slow:" of "slow:200"; -1 when the fault is not of that kind. */
long sim_fault_number(const char *key, const char *prefix);
/* Sleep when latency=observed. */
void sim_latency(int milliseconds);
void sim_sleep(long milliseconds);
bool sim_latency_observed(void);
uint64_t sim_now_ms(void);
uint64_t sim_since_1970_us(void);

#endif
