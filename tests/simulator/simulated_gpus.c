/* simulated-gpus: make a simulated GPU node, look at it, break it, and run a small CUDA client on it. */
#include <dlfcn.h>
#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sim_fault.h"
#include "sim_state.h"

static const char usage[] =
    "simulated-gpus create COUNT [--sms 132] [--memory-mib 143771] [--compute-capability 9.0] [--cuda-version 13.0]\n"
    "                            [--driver 580] [--seed TEXT]       the seed makes the UUIDs\n"
    "simulated-gpus show [--json]\n"
    "simulated-gpus set-mode INDEX MODE          0, 2 or 3, or a name\n"
    "simulated-gpus mig INDEX [PROFILE ...]      MIG mode, cut into slices such as 1g.10gb; none: off again\n"
    "simulated-gpus fault [KEY=VALUE ...]        add faults (KEY= takes one back), or print them\n"
    "simulated-gpus fault --clear\n"
    "simulated-gpus client [--device N] [--alloc-mib N] [--hold SECONDS] [--work SECONDS] [--fault] [--trap] [--spin]\n";

static int complain(const char *what)
{
	fprintf(stderr, "simulated-gpus: %s\n", what);
	return 1;
}

static int misused(void)
{
	fputs(usage, stderr);
	return 2;
}

/* ---- create ---- */

/* "13.1": major * per_major + minor * per_minor; -1 when it is no such thing. */
static int read_version(const char *text, int per_major, int per_minor)
{
	int major, minor, end = 0;
	if (sscanf(text, "%3d.%1d%n", &major, &minor, &end) != 2 || text[end] || major < 1 || minor < 0)
		return -1;
	return major * per_major + minor * per_minor;
}

static int create(int count, char **arguments)
{
	static const struct option options[] = {{"sms", required_argument, NULL, 's'},
						{"memory-mib", required_argument, NULL, 'm'},
						{"compute-capability", required_argument, NULL, 'c'},
						{"cuda-version", required_argument, NULL, 'v'},
						{"driver", required_argument, NULL, 'd'},
						{"seed", required_argument, NULL, 'r'},
						{NULL, 0, NULL, 0}};
	const char *seed = getenv("SIMULATED_GPUS_SEED");
	long sms = 132, memory_mib = 143771;
	int capability = 90, driver = 580, cuda_version = 0, drivers_own;
	int option;
	while ((option = getopt_long(count, arguments, "", options, NULL)) != -1) {
		if (option == 's')
			sms = strtol(optarg, NULL, 10);
		else if (option == 'm')
			memory_mib = strtol(optarg, NULL, 10);
		else if (option == 'c')
			capability = read_version(optarg, 10, 1);
		else if (option == 'v')
			cuda_version = read_version(optarg, 1000, 10);
		else if (option == 'd')
			driver = atoi(optarg);
		else if (option == 'r')
			seed = optarg;
		else
			return misused();
	}
	if (optind + 1 != count)
		return misused();
	long gpus = strtol(arguments[optind], NULL, 10);
	if (gpus < 0 || gpus > SIM_MAX_GPUS || sms < 8 || sms > 1024 || memory_mib <= SIM_RESERVED_MIB)
		return complain("create: at most 16 GPUs, 8 to 1024 SMs, and more than 616 MiB");
	if (capability < 0 || cuda_version < 0)
		return complain("create: a compute capability and a CUDA version are written as 9.0 and 13.0");
	if (!sim_driver_version(driver, &drivers_own))
		return complain("create: the drivers are 535, 550 and 580");
	if (!cuda_version)
		cuda_version = drivers_own;
	struct sim_node node = {(int)gpus, (int)sms, capability, driver, cuda_version, (uint64_t)memory_mib,
				seed && *seed ? seed : "node"};
	int error = sim_create(&node);
	return error ? complain(strerror(error)) : 0;
}

/* ---- show ---- */

static const char *kind_name(int kind)
{
	static const char *const names[] = {"none", "plain", "server", "client", "attached"};
	return kind >= 0 && kind <= SIM_ATTACHED ? names[kind] : "?";
}

static const char *mode_name(int mode)
{
	return mode == 0 ? "DEFAULT" : mode == 2 ? "PROHIBITED" : mode == 3 ? "EXCLUSIVE_PROCESS" : "?";
}

static void show_text(const struct sim_state *state)
{
	for (int i = 0; i < state->gpu_count; i++) {
		const struct sim_gpu *gpu = &state->gpus[i];
		printf("GPU %d: %s  %s  %04x:%02x:%02x.0  %d SMs  %llu of %llu MiB used  %s%s\n", i, gpu->name, gpu->uuid,
		       gpu->domain, gpu->bus, gpu->device, gpu->sms,
		       (unsigned long long)(sim_bytes_used(state, i) / SIM_MIB),
		       (unsigned long long)(gpu->memory_bytes / SIM_MIB), mode_name(gpu->mode),
		       sim_gpu_lost(i) ? "  LOST" : "");
		for (int c = 0; c < SIM_MAX_CONTEXTS; c++) {
			const struct sim_context *entry = &state->contexts[c];
			if (entry->kind != SIM_NONE && entry->gpu == i)
				printf("  %-6s pid %d  %llu MiB  server %d\n", kind_name(entry->kind), entry->pid,
				       (unsigned long long)(sim_context_bytes(state, entry) / SIM_MIB), entry->server_pid);
		}
	}
}

static void show_json(const struct sim_state *state)
{
	const char *comma = "";
	printf("{\"gpus\": [");
	for (int i = 0; i < state->gpu_count; i++) {
		const struct sim_gpu *gpu = &state->gpus[i];
		printf("%s{\"index\": %d, \"uuid\": \"%s\", \"name\": \"%s\", \"pci_bus_id\": \"%08X:%02X:%02X.0\", \"sms\": %d, "
		       "\"memory_bytes\": %llu, \"used_bytes\": %llu, \"compute_mode\": %d, \"mig\": %s, \"lost\": %s}",
		       i ? ", " : "", i, gpu->uuid, gpu->name, gpu->domain, gpu->bus, gpu->device, gpu->sms,
		       (unsigned long long)gpu->memory_bytes, (unsigned long long)sim_bytes_used(state, i), gpu->mode,
		       gpu->mig ? "true" : "false", sim_gpu_lost(i) ? "true" : "false");
	}
	printf("], \"slices\": [");
	comma = "";
	for (int i = state->gpu_count; i < SIM_MAX_GPUS; i++) {
		const struct sim_gpu *slice = &state->gpus[i];
		if (!sim_is_there(state, i))
			continue;
		printf("%s{\"uuid\": \"%s\", \"name\": \"%s\", \"gpu\": %d, \"instance\": %d, \"caps\": [%d, %d], \"sms\": %d, "
		       "\"memory_bytes\": %llu}",
		       comma, slice->uuid, slice->name, slice->parent, slice->instance, sim_cap_minor(slice, false),
		       sim_cap_minor(slice, true), slice->sms, (unsigned long long)slice->memory_bytes);
		comma = ", ";
	}
	printf("], \"contexts\": [");
	comma = "";
	for (int c = 0; c < SIM_MAX_CONTEXTS; c++) {
		const struct sim_context *entry = &state->contexts[c];
		if (entry->kind == SIM_NONE)
			continue;
		printf("%s{\"kind\": \"%s\", \"pid\": %d, \"gpu\": %d, \"server_pid\": %d, \"bytes\": %llu}", comma,
		       kind_name(entry->kind), entry->pid, entry->gpu, entry->server_pid,
		       (unsigned long long)sim_context_bytes(state, entry));
		comma = ", ";
	}
	printf("]}\n");
}

static int show(int count, char **arguments)
{
	bool json = count == 2 && strcmp(arguments[1], "--json") == 0;
	struct sim_state *state = sim_open();
	if (count > 1 && !json)
		return misused();
	if (!state)
		return complain("there is no simulated node here: see create");
	sim_lock(state);
	if (json)
		show_json(state);
	else
		show_text(state);
	sim_unlock(state);
	return 0;
}

static int set_mode(int count, char **arguments)
{
	static const int modes[] = {SIM_MODE_DEFAULT, SIM_MODE_PROHIBITED, SIM_MODE_EXCLUSIVE_PROCESS};
	struct sim_state *state = sim_open();
	if (count != 3)
		return misused();
	if (!state)
		return complain("there is no simulated node here: see create");
	int index = atoi(arguments[1]);
	if (index < 0 || index >= state->gpu_count)
		return complain("no such GPU");
	for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
		char number[8];
		snprintf(number, sizeof number, "%d", modes[i]);
		if (strcmp(arguments[2], number) != 0 && strcasecmp(arguments[2], mode_name(modes[i])) != 0)
			continue;
		sim_lock(state);
		state->gpus[index].mode = modes[i];
		sim_unlock(state);
		return 0;
	}
	return complain("the modes are 0 DEFAULT, 2 PROHIBITED and 3 EXCLUSIVE_PROCESS");
}

static int mig(int count, char **arguments)
{
	struct sim_state *state = sim_open();
	if (count < 2)
		return misused();
	if (!state)
		return complain("there is no simulated node here: see create");
	int index = atoi(arguments[1]);
	if (index < 0 || index >= state->gpu_count)
		return complain("no such GPU");
	sim_lock(state);
	int error = sim_cut(state, index, count - 2, arguments + 2);
	sim_unlock(state);
	return error ? complain("mig: slices such as 1g.10gb, of seven parts in all") : 0;
}

/* ---- fault ---- */

static bool same_key(const char *line, const char *setting)
{
	size_t length = strcspn(setting, "=");
	return strncmp(line, setting, length) == 0 && line[length] == '=';
}

/* Copy the old faults but for those set anew. */
static void keep_old(FILE *to, int count, char **settings)
{
	char line[SIM_FAULT_SIZE + 128];
	FILE *old = fopen(SIM_FAULTS_FILE, "re");
	while (old && fgets(line, sizeof line, old)) {
		bool kept = true;
		for (int i = 0; i < count; i++)
			kept = kept && !same_key(line, settings[i]);
		if (kept)
			fputs(line, to);
	}
	if (old)
		fclose(old);
}

static int print_faults(void)
{
	char line[SIM_FAULT_SIZE + 128];
	FILE *file = fopen(SIM_FAULTS_FILE, "re");
	while (file && fgets(line, sizeof line, file))
		fputs(line, stdout);
	if (file)
		fclose(file);
	return 0;
}

static int fault(int count, char **arguments)
{
	static const char temporary[] = SIM_FAULTS_FILE ".new";
	if (count == 1)
		return print_faults();
	if (count == 2 && strcmp(arguments[1], "--clear") == 0)
		return unlink(SIM_FAULTS_FILE) == 0 || errno == ENOENT ? 0 : complain(strerror(errno));
	for (int i = 1; i < count; i++) {
		const char *equals = strchr(arguments[i], '=');
		if (!equals || equals == arguments[i] || strchr(arguments[i], '\n') || strlen(arguments[i]) > SIM_FAULT_SIZE)
			return misused();
	}
	FILE *file = fopen(temporary, "we");
	if (!file)
		return complain(strerror(errno));
	keep_old(file, count - 1, arguments + 1);
	for (int i = 1; i < count; i++)
		if (arguments[i][strcspn(arguments[i], "=") + 1])
			fprintf(file, "%s\n", arguments[i]);
	fchmod(fileno(file), 0644);
	bool written = fclose(file) == 0;
	/* Renamed, so that no reader sees half of it. */
	return written && rename(temporary, SIM_FAULTS_FILE) == 0 ? 0 : complain(strerror(errno));
}

/* ---- client ---- */

static struct {
	int (*init)(unsigned int);
	int (*create)(void **, unsigned int, int);
	int (*get_uuid)(unsigned char *, int);
	int (*get_name)(char *, int, int);
	int (*attribute)(int *, int, int);
	int (*memory)(size_t *, size_t *);
	int (*allocate)(uint64_t *, size_t);
	int (*synchronize)(void);
	int (*error_name)(int, const char **);
	int (*fault)(int);
	int (*spin)(void);
	int (*server_pid)(void);
} cuda;

static bool load_cuda(void)
{
	static const char *const names[] = {"cuInit", "cuCtxCreate_v2", "cuDeviceGetUuid_v2", "cuDeviceGetName", "cuDeviceGetAttribute",
					    "cuMemGetInfo_v2", "cuMemAlloc_v2", "cuCtxSynchronize", "cuGetErrorName",
					    "simFault", "simSpin", "simServerPid"};
	void *library = dlopen("libcuda.so.1", RTLD_NOW), *found[sizeof names / sizeof *names];
	_Static_assert(sizeof found == sizeof cuda, "one name a member, in order");
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		found[i] = library ? dlsym(library, names[i]) : NULL;
		if (!found[i])
			return false;
	}
	memcpy(&cuda, found, sizeof cuda);
	return true;
}

/* Exit when a call failed, in a form a test reads at a glance. */
static void check(const char *call, int error, int status)
{
	const char *name = NULL;
	if (error == 0)
		return;
	cuda.error_name(error, &name);
	printf("FAILED %s %d %s\n", call, error, name ? name : "?");
	exit(status);
}

static void print_device(int device)
{
	unsigned char bytes[16];
	char name[96];
	int sms = 0, server = cuda.server_pid();
	size_t free_bytes = 0, total = 0;
	check("uuid", cuda.get_uuid(bytes, device), 3);
	check("sms", cuda.attribute(&sms, 16, device), 3);
	check("memory", cuda.memory(&free_bytes, &total), 3);
	check("name", cuda.get_name(name, sizeof name, device), 3);
	printf("uuid=%s-", strstr(name, " MIG ") ? "MIG" : "GPU");
	for (int i = 0; i < 16; i++)
		printf("%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "", bytes[i]);
	printf(" sms=%d free=%zu total=%zu mps=", sms, free_bytes >> 20, total >> 20);
	if (server > 0)
		printf("%d\n", server);
	else
		printf("none\n");
	fflush(stdout);
}

struct errand {
	int device;
	long alloc_mib;
	double hold, work;
	bool fault, trap, spin;
};

static void run_errand(const struct errand *errand)
{
	if (errand->hold > 0)
		sim_sleep((long)(errand->hold * 1000));
	for (double left = errand->work * 1000; left > 0; left -= 5) {
		check("work", cuda.synchronize(), 4);
		sim_sleep(5);
	}
	if (errand->fault || errand->trap)
		check("fault", cuda.fault(errand->trap ? SIM_FAULT_TRAP : SIM_FAULT_ILLEGAL_ADDRESS), 4);
	if (errand->spin)
		check("spin", cuda.spin(), 4);
	check("synchronize", cuda.synchronize(), 4);
}

static int client(int count, char **arguments)
{
	static const struct option options[] = {
	    {"device", required_argument, NULL, 'd'}, {"alloc-mib", required_argument, NULL, 'a'},
	    {"hold", required_argument, NULL, 'h'},   {"work", required_argument, NULL, 'w'},
	    {"fault", no_argument, NULL, 'f'},	      {"trap", no_argument, NULL, 't'},
	    {"spin", no_argument, NULL, 's'},	      {NULL, 0, NULL, 0}};
	struct errand errand = {0};
	void *context = NULL;
	uint64_t address;
	int option;
	while ((option = getopt_long(count, arguments, "", options, NULL)) != -1) {
		if (option == 'd')
			errand.device = atoi(optarg);
		else if (option == 'a')
			errand.alloc_mib = strtol(optarg, NULL, 10);
		else if (option == 'h')
			errand.hold = strtod(optarg, NULL);
		else if (option == 'w')
			errand.work = strtod(optarg, NULL);
		else if (option == 'f')
			errand.fault = true;
		else if (option == 't')
			errand.trap = true;
		else if (option == 's')
			errand.spin = true;
		else
			return misused();
	}
	if (!load_cuda())
		return complain("no simulated libcuda.so.1");
	check("init", cuda.init(0), 3);
	check("context", cuda.create(&context, 0, errand.device), 3);
	if (errand.alloc_mib > 0)
		check("alloc", cuda.allocate(&address, (size_t)errand.alloc_mib << 20), 3);
	print_device(errand.device);
	run_errand(&errand);
	return 0;
}

int main(int count, char **arguments)
{
	static const struct {
		const char *name;
		int (*run)(int, char **);
	} commands[] = {{"create", create}, {"show", show}, {"set-mode", set_mode}, {"mig", mig}, {"fault", fault}, {"client", client}};
	for (size_t i = 0; count > 1 && i < sizeof commands / sizeof *commands; i++)
		if (strcmp(arguments[1], commands[i].name) == 0)
			return commands[i].run(count - 1, arguments + 1);
	return misused();
}
