#include "variables.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SET_BY_US "CUDA_MPS_SET_BY_SLURM"
#define NODE_FAULT "SLURM_MPS_NODE_FAULT"

/* The lists of GPUs and of their limits, two paths, and the names. */
#define NOTE_MAX (2 * VALUE_MAX + 2 * VERDICT_PATH_MAX + 512)

static const char *const names[VARIABLES] = {
	[VISIBLE_DEVICES] = "CUDA_VISIBLE_DEVICES",
	[PIPE_DIRECTORY] = "CUDA_MPS_PIPE_DIRECTORY",
	[LOG_DIRECTORY] = "CUDA_MPS_LOG_DIRECTORY",
	[THREAD_PERCENTAGE] = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE",
	[MEMORY_LIMIT] = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
	[CLIENT_PRIORITY] = "CUDA_MPS_CLIENT_PRIORITY",
	[MAX_CONNECTIONS] = "CUDA_DEVICE_MAX_CONNECTIONS",
};

/* What was set here, "NAME=value" each with a space between: neither a UUID nor a path of ours has one. */
static char note[NOTE_MAX];

static const char *get(spank_t sp, const char *name, char *value, size_t size)
{
	if (!sp)
		return getenv(name);
	return spank_getenv(sp, name, value, (int)size) == ESPANK_SUCCESS ? value : NULL;
}

static void unset(spank_t sp, const char *name)
{
	(void)(sp ? (int)spank_unsetenv(sp, name) : unsetenv(name));
}

const char *variable_get(spank_t sp, enum variable variable, char *value, size_t size)
{
	int result = (int)spank_getenv(sp, names[variable], value, (int)size);

	if (result == ESPANK_NOSPACE) /* the driver cannot use it either, and may lift a limit for it (O12) */
		unset(sp, names[variable]);
	return result == ESPANK_SUCCESS ? value : NULL;
}

bool variable_keep(spank_t sp, enum variable variable, const char *value)
{
	return spank_setenv(sp, names[variable], value, 1) == ESPANK_SUCCESS;
}

bool variable_set(spank_t sp, enum variable variable, const char *value)
{
	size_t used = strlen(note);
	int more = snprintf(note + used, sizeof(note) - used, "%s%s=%s", used ? " " : "", names[variable], value);

	if (more < 0 || (size_t)more >= sizeof(note) - used)
		return false;
	return variable_keep(sp, variable, value) && spank_setenv(sp, SET_BY_US, note, 1) == ESPANK_SUCCESS;
}

void variable_unset(spank_t sp, enum variable variable)
{
	unset(sp, names[variable]);
}

/* Whether a note has this name with this value. */
static bool has_noted(const char *noted, const char *name, const char *value)
{
	size_t name_length = strlen(name), value_length = strlen(value);

	while (*noted) {
		size_t length = strcspn(noted, " ");

		if (length == name_length + 1 + value_length && !memcmp(noted, name, name_length) &&
		    noted[name_length] == '=' && !memcmp(noted + name_length + 1, value, value_length))
			return true;
		noted += length + (noted[length] == ' ');
	}
	return false;
}

/* No job but ours has its control daemon there; a note may have been lost on the way. */
static bool is_a_jobs(const char *pipe_directory)
{
	return pipe_directory && !strncmp(pipe_directory, STATE_DIRECTORY "/jobs/", strlen(STATE_DIRECTORY "/jobs/"));
}

void variables_forget(spank_t sp)
{
	static char noted[NOTE_MAX], value[VALUE_MAX];
	const char *kept = get(sp, SET_BY_US, noted, sizeof(noted));

	if (is_a_jobs(get(sp, names[PIPE_DIRECTORY], value, sizeof(value)))) {
		unset(sp, names[PIPE_DIRECTORY]);
		unset(sp, names[LOG_DIRECTORY]);
	}
	for (int variable = sp ? VISIBLE_DEVICES + 1 : VISIBLE_DEVICES; kept && variable < VARIABLES; variable++) {
		const char *own = get(sp, names[variable], value, sizeof(value));

		if (own && has_noted(kept, names[variable], own))
			unset(sp, names[variable]);
	}
	unset(sp, SET_BY_US);
	unset(sp, NODE_FAULT);
}

bool variables_set_node_fault(spank_t sp, const char *message)
{
	return spank_setenv(sp, NODE_FAULT, message, 1) == ESPANK_SUCCESS;
}
