/* A user's own SPANK plugin: sends any SPANK_* text to the prolog, past spank_mps.so and its checks. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <slurm/spank.h>

SPANK_PLUGIN(free, 1)

extern char **environ;

/* FREE_NAME=value in the environment of sbatch becomes SPANK_NAME=value in the prolog. */
int slurm_spank_init_post_opt(spank_t sp, int ac, char **av)
{
	(void)ac;
	(void)av;
	if (spank_context() != S_CTX_ALLOCATOR && spank_context() != S_CTX_LOCAL)
		return 0;
	for (char **entry = environ; *entry; entry++) {
		char name[128];
		char *value = strchr(*entry, '=');

		if (strncmp(*entry, "FREE_", 5) || !value || (size_t)(value - *entry) >= sizeof(name))
			continue;
		memcpy(name, *entry + 5, (size_t)(value - *entry) - 5);
		name[(size_t)(value - *entry) - 5] = '\0';
		if (spank_job_control_setenv(sp, name, value + 1, 1) != ESPANK_SUCCESS)
			exit(3);
	}
	return 0;
}
