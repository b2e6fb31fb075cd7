/* nvidia-smi of a simulated node: the few queries that prologs use, over whatever libnvidia-ml.so.1 is loaded. */
#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <unistd.h>

enum { MAX_GPUS = 64, MAX_FIELDS = 32, MAX_PROCESSES = 1024, MEMORY_V2 = 40 | 2 << 24 };

typedef void *device;

struct memory {
	unsigned int version;
	unsigned long long total, reserved, free, used;
};

struct process {
	unsigned int pid;
	unsigned long long used;
	unsigned int gpu_instance, compute_instance;
};

struct pci {
	char bus_id_legacy[16];
	unsigned int domain, bus, device, pci_device_id, pci_subsystem_id;
	char bus_id[32];
};

static struct {
	int (*init)(void);
	const char *(*error)(int);
	int (*driver)(char *, unsigned int);
	int (*count)(unsigned int *);
	int (*by_index)(unsigned int, device *);
	int (*uuid)(device, char *, unsigned int);
	int (*name)(device, char *, unsigned int);
	int (*memory)(device, struct memory *);
	int (*pci)(device, struct pci *);
	int (*mode)(device, int *);
	int (*set_mode)(device, int);
	int (*compute)(device, unsigned int *, struct process *);
	int (*mps)(device, unsigned int *, struct process *);
} nvml;

static struct {
	bool list, header, units;
	const char *fields, *apps, *devices, *mode;
} asked = {.header = true, .units = true};

static bool load(void)
{
	static const char *const names[] = {
	    "nvmlInit_v2", "nvmlErrorString", "nvmlSystemGetDriverVersion", "nvmlDeviceGetCount_v2",
	    "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetUUID", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo_v2",
	    "nvmlDeviceGetPciInfo_v3", "nvmlDeviceGetComputeMode", "nvmlDeviceSetComputeMode",
	    "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetMPSComputeRunningProcesses_v3"};
	void *library = dlopen("libnvidia-ml.so.1", RTLD_NOW), *found[sizeof names / sizeof *names];
	_Static_assert(sizeof found == sizeof nvml, "one name a member, in order");
	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		found[i] = library ? dlsym(library, names[i]) : NULL;
		if (!found[i])
			return false;
	}
	memcpy(&nvml, found, sizeof nvml);
	return true;
}

static const char *mode_name(int mode)
{
	switch (mode) {
	case 0:
		return "Default";
	case 2:
		return "Prohibited";
	case 3:
		return "Exclusive_Process";
	default:
		return "[Unknown]";
	}
}

static int mode_number(const char *text)
{
	static const struct {
		const char *name;
		int number;
	} modes[] = {{"0", 0}, {"DEFAULT", 0}, {"2", 2}, {"PROHIBITED", 2}, {"3", 3}, {"EXCLUSIVE_PROCESS", 3}};
	for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
		if (strcasecmp(text, modes[i].name) == 0)
			return modes[i].number;
	return -1;
}

static int fail(int error)
{
	if (error == 9)
		printf("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the "
		       "latest NVIDIA driver is installed and running.\n\n");
	else
		printf("Failed to initialize NVML: %s\n", nvml.error(error));
	return error;
}

/* Whether -i names this GPU: by index, UUID or PCI address. */
static bool is_asked(unsigned int index, const char *uuid, const char *bus_id)
{
	char copy[1024], *rest = copy, *word, number[16];
	if (!asked.devices)
		return true;
	snprintf(number, sizeof number, "%u", index);
	snprintf(copy, sizeof copy, "%s", asked.devices);
	while ((word = strsep(&rest, ",")))
		if (strcmp(word, number) == 0 || strcmp(word, uuid) == 0 || strcasecmp(word, bus_id) == 0)
			return true;
	return false;
}

static void print_mib(unsigned long long bytes)
{
	printf("%llu%s", bytes >> 20, asked.units ? " MiB" : "");
}

static bool print_field(const char *field, unsigned int index, device gpu, const struct pci *pci)
{
	char text[128] = "";
	struct memory memory = {.version = MEMORY_V2};
	int mode = -1;
	if (strcmp(field, "index") == 0) {
		printf("%u", index);
	} else if (strcmp(field, "uuid") == 0 || strcmp(field, "gpu_uuid") == 0) {
		nvml.uuid(gpu, text, sizeof text);
		printf("%s", text);
	} else if (strcmp(field, "name") == 0 || strcmp(field, "gpu_name") == 0) {
		nvml.name(gpu, text, sizeof text);
		printf("%s", text);
	} else if (strcmp(field, "compute_mode") == 0) {
		nvml.mode(gpu, &mode);
		printf("%s", mode_name(mode));
	} else if (strcmp(field, "memory.total") == 0) {
		nvml.memory(gpu, &memory);
		print_mib(memory.total);
	} else if (strcmp(field, "memory.used") == 0) {
		nvml.memory(gpu, &memory);
		print_mib(memory.used);
	} else if (strcmp(field, "memory.free") == 0) {
		nvml.memory(gpu, &memory);
		print_mib(memory.free);
	} else if (strcmp(field, "pci.bus_id") == 0 || strcmp(field, "gpu_bus_id") == 0) {
		printf("%s", pci->bus_id);
	} else if (strcmp(field, "driver_version") == 0) {
		nvml.driver(text, sizeof text);
		printf("%s", text);
	} else {
		return false;
	}
	return true;
}

static int split_fields(const char *text, char *copy, size_t size, const char **fields)
{
	int count = 0;
	char *word;
	snprintf(copy, size, "%s", text);
	while ((word = strsep(&copy, ",")) && count < MAX_FIELDS) {
		word += strspn(word, " ");
		fields[count++] = word;
	}
	return count;
}

static void print_header(const char *const *fields, int count)
{
	for (int i = 0; i < count; i++) {
		const char *name = strcmp(fields[i], "used_memory") == 0 ? "used_gpu_memory" : fields[i];
		printf("%s%s%s", i ? ", " : "", name, strstr(name, "memory") ? " [MiB]" : "");
	}
	printf("\n");
}

static void print_gpu_row(const char *const *fields, int count, unsigned int index, device gpu, const struct pci *pci)
{
	for (int i = 0; i < count; i++) {
		printf("%s", i ? ", " : "");
		print_field(fields[i], index, gpu, pci);
	}
	printf("\n");
}

static void print_process_name(unsigned int pid)
{
	char path[64], name[256] = "";
	snprintf(path, sizeof path, "/proc/%u/cmdline", pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		ssize_t length = read(fd, name, sizeof name - 1);
		name[length > 0 ? length : 0] = '\0';
		close(fd);
	}
	printf("%s", *name ? name : "[Not Found]");
}

static void print_process_rows(const char *const *fields, int count, device gpu,
			       int (*list)(device, unsigned int *, struct process *))
{
	static struct process rows[MAX_PROCESSES];
	unsigned int found = MAX_PROCESSES;
	char uuid[96] = "";
	nvml.uuid(gpu, uuid, sizeof uuid);
	if (list(gpu, &found, rows) != 0)
		return;
	for (unsigned int r = 0; r < found; r++) {
		for (int i = 0; i < count; i++) {
			printf("%s", i ? ", " : "");
			if (strcmp(fields[i], "pid") == 0)
				printf("%u", rows[r].pid);
			else if (strcmp(fields[i], "process_name") == 0 || strcmp(fields[i], "name") == 0)
				print_process_name(rows[r].pid);
			else if (strcmp(fields[i], "gpu_uuid") == 0)
				printf("%s", uuid);
			else
				print_mib(rows[r].used);
		}
		printf("\n");
	}
}

static int set_mode(device gpu, const struct pci *pci)
{
	int mode = mode_number(asked.mode);
	static const char *const names[] = {"DEFAULT", "", "PROHIBITED", "EXCLUSIVE_PROCESS"};
	int error = nvml.set_mode(gpu, mode);
	if (error) {
		printf("Unable to set the compute mode for GPU %s: %s\nTerminating early due to previous errors.\n", pci->bus_id,
		       nvml.error(error));
		return error;
	}
	printf("Set compute mode to %s for GPU %s.\n", names[mode], pci->bus_id);
	return 0;
}

static int do_one(unsigned int index, device gpu, const char *const *fields, int field_count)
{
	char name[96] = "", uuid[96] = "";
	struct pci pci = {0};
	nvml.pci(gpu, &pci);
	int error = nvml.uuid(gpu, uuid, sizeof uuid);
	if (!is_asked(index, uuid, pci.bus_id))
		return -1;
	if (error && !asked.mode) {
		printf("Unable to determine the device handle for GPU%u: %s: %s\n", index, pci.bus_id, nvml.error(error));
		return error;
	}
	if (asked.mode)
		return set_mode(gpu, &pci);
	if (asked.list) {
		nvml.name(gpu, name, sizeof name);
		printf("GPU %u: %s (UUID: %s)\n", index, name, uuid);
	} else if (asked.fields) {
		print_gpu_row(fields, field_count, index, gpu, &pci);
	} else {
		print_process_rows(fields, field_count, gpu, nvml.compute);
		print_process_rows(fields, field_count, gpu, nvml.mps);
	}
	return 0;
}

static int do_all(void)
{
	char copy[1024];
	const char *fields[MAX_FIELDS];
	unsigned int count = 0;
	int field_count = 0, done = 0, error = nvml.count(&count);
	if (error)
		return fail(error);
	if (asked.fields || asked.apps) {
		field_count = split_fields(asked.fields ? asked.fields : asked.apps, copy, sizeof copy, fields);
		if (asked.header)
			print_header(fields, field_count);
	}
	for (unsigned int i = 0; i < count && i < MAX_GPUS; i++) {
		device gpu;
		error = nvml.by_index(i, &gpu);
		if (error) {
			printf("Unable to determine the device handle for GPU%u: %s\n", i, nvml.error(error));
			return error;
		}
		error = do_one(i, gpu, fields, field_count);
		if (error > 0)
			return error;
		done += error == 0;
	}
	if (done == 0) {
		printf("No devices were found\n");
		return 6;
	}
	if (asked.mode)
		printf("All done.\n");
	return 0;
}

/* The value of --option=value, or of "--option value" and the short form; NULL when it is another option. */
static const char *value_of(const char *option, const char *short_form, char **arguments, int count, int *at)
{
	size_t length = strlen(option);
	if (strncmp(arguments[*at], option, length) == 0 && arguments[*at][length] == '=')
		return arguments[*at] + length + 1;
	if (strcmp(arguments[*at], option) != 0 && (!short_form || strcmp(arguments[*at], short_form) != 0))
		return NULL;
	return *at + 1 < count ? arguments[++*at] : NULL;
}

static bool read_arguments(int count, char **arguments)
{
	for (int i = 1; i < count; i++) {
		const char *value;
		if (strcmp(arguments[i], "-L") == 0 || strcmp(arguments[i], "--list-gpus") == 0) {
			asked.list = true;
		} else if ((value = value_of("--query-gpu", NULL, arguments, count, &i))) {
			asked.fields = value;
		} else if ((value = value_of("--query-compute-apps", NULL, arguments, count, &i))) {
			asked.apps = value;
		} else if ((value = value_of("--format", NULL, arguments, count, &i))) {
			asked.header = !strstr(value, "noheader");
			asked.units = !strstr(value, "nounits");
		} else if ((value = value_of("--id", "-i", arguments, count, &i))) {
			asked.devices = value;
		} else if ((value = value_of("--compute-mode", "-c", arguments, count, &i))) {
			asked.mode = value;
		} else {
			printf("Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.\n");
			return false;
		}
	}
	return true;
}

static bool fields_known(void)
{
	static const char known[] = ",index,uuid,gpu_uuid,name,gpu_name,compute_mode,memory.total,memory.used,memory.free,"
				    "pci.bus_id,gpu_bus_id,driver_version,";
	static const char known_apps[] = ",pid,process_name,name,used_memory,used_gpu_memory,gpu_uuid,";
	char copy[1024], quoted[128];
	const char *fields[MAX_FIELDS];
	if (!asked.fields && !asked.apps)
		return true;
	int count = split_fields(asked.fields ? asked.fields : asked.apps, copy, sizeof copy, fields);
	for (int i = 0; i < count; i++) {
		snprintf(quoted, sizeof quoted, ",%s,", fields[i]);
		if (strstr(asked.fields ? known : known_apps, quoted))
			continue;
		printf("Field \"%s\" is not a valid field to query.\n\n", fields[i]);
		return false;
	}
	return true;
}

int main(int count, char **arguments)
{
	if (!read_arguments(count, arguments) || !fields_known())
		return 2;
	if (asked.mode && mode_number(asked.mode) < 0) {
		printf("Invalid compute mode \"%s\" specified.\n", asked.mode);
		return 2;
	}
	if (!load()) {
		printf("NVIDIA-SMI couldn't find libnvidia-ml.so library in your system.\n");
		return 12;
	}
	int error = nvml.init();
	if (error)
		return fail(error);
	if (!asked.fields && !asked.apps && !asked.mode)
		asked.list = true; /* the big table is not drawn here */
	return do_all();
}
