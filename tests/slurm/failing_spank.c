/* Another's SPANK plugin, whose slurm_spank_init fails wherever a step starts; MODE says what Slurm is to make of it. */
#include <slurm/slurm_errno.h>
#include <slurm/spank.h>

SPANK_PLUGIN(failing, 1)

#ifdef MODE
int slurm_spank_init_failure_mode = MODE;
#endif

int slurm_spank_init(spank_t sp, int ac, char **av)
{
	(void)ac;
	(void)av;
	return spank_remote(sp) == 1 ? -1 : 0;
}
