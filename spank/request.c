#include "request.h"

#include <stdio.h>
#include <string.h>

enum { OPTION_MPS, OPTION_THREADS, OPTION_MEM, OPTION_PRIORITY };

struct request request;

static int refuse_value(const char *option, const char *value, const char *problem)
{
	char shown[48];

	printable(shown, sizeof(shown), value ? value : "");
	slurm_error("mps: --%s=%s: %s", option, shown, problem);
	return ESPANK_BAD_ARG;
}

/* Keep a value that was read; what the parsers accept fits, but for a list with more zeros than anybody needs. */
static int keep(char *out, size_t size, const char *option, const char *value)
{
	if (value && strlen(value) >= size)
		return refuse_value(option, value, "it is too long");
	(void)snprintf(out, size, "%s", value ? value : "");
	return ESPANK_SUCCESS;
}

static int on_mem(const char *value)
{
	struct mem_option mem;
	const char *problem = value && *value ? mem_option(value, &mem) : "expected " MEM_EXPECTED;

	if (problem)
		return refuse_value("mps-mem", value, problem);
	return keep(request.mem, sizeof(request.mem), "mps-mem", value);
}

/* May run several times: Slurm calls it for an option in the environment, then for the same on the command line. */
static int on_option(int which, const char *value, int remote)
{
	enum daemons daemons;

	request.given = true;
	switch (which) {
	case OPTION_MPS:
		request.off = value && !strcmp(value, "off");
		if (request.off)
			return ESPANK_SUCCESS;
		if (!daemons_option(value, &daemons))
			return refuse_value("mps", value, "expected " DAEMONS_EXPECTED);
		return daemons == DAEMONS_UNSAID ? ESPANK_SUCCESS :
						   keep(request.daemons, sizeof(request.daemons), "mps", value);
	case OPTION_THREADS:
		if (!threads_tenths(value) && !is_auto(value))
			return refuse_value("mps-threads", value, "expected " THREADS_EXPECTED);
		return keep(request.threads, sizeof(request.threads), "mps-threads", value);
	case OPTION_MEM:
		return on_mem(value);
	case OPTION_PRIORITY:
		if (client_priority(value) < 0)
			return refuse_value("mps-priority", value, "expected " PRIORITY_EXPECTED);
		return keep(request.priority, sizeof(request.priority), "mps-priority", value);
	default:
		return ESPANK_SUCCESS;
	}
}

static struct spank_option options[] = {
	{ "mps", "per-node|per-gpu|off",
	  "share this job's GPUs between its processes through CUDA MPS, with one control daemon on each node "
	  "(so does --mps alone) or on each GPU, or, with off, without MPS whatever else is given",
	  2, OPTION_MPS, on_option },
	{ "mps-threads", "PCT|auto",
	  "with MPS, each process gets at most PCT percent of a GPU's threads, or as much as is left when all tasks "
	  "that share it get the same (implies --mps)",
	  1, OPTION_THREADS, on_option },
	{ "mps-mem", "SIZE|auto",
	  "with MPS, each process gets at most SIZE (M, G or T) of a GPU's memory, or an even part of it; with "
	  "--mps=per-gpu also GPU:SIZE,... (implies --mps)",
	  1, OPTION_MEM, on_option },
	{ "mps-priority", "normal|low", "with MPS, how each process's work is ranked on the GPU (implies --mps)", 1,
	  OPTION_PRIORITY, on_option },
};

bool request_asks(void)
{
	return request.given && !request.off;
}

void request_register(spank_t sp)
{
	for (size_t i = 0; i < sizeof(options) / sizeof(options[0]); i++)
		if (spank_option_register(sp, &options[i]) != ESPANK_SUCCESS)
			slurm_error("mps: the option --%s cannot be registered", options[i].name);
}
