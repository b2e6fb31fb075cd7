/* A SPANK plugin of another author's, which leaves a file of root's open in slurmstepd for whoever it starts. */
#include <fcntl.h>
#include <slurm/spank.h>

SPANK_PLUGIN(leaky, 1)

int slurm_spank_init(spank_t sp, int ac, char **av)
{
	(void)sp;
	(void)ac;
	(void)av;
	(void)open("/root/secret", O_RDONLY);
	return ESPANK_SUCCESS;
}
