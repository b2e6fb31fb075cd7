/* LD_PRELOAD for a program of root's: it stays as it is, with its name and environment, and does nothing of its own. */
#include <signal.h>
#include <unistd.h>

__attribute__((constructor)) static void stay(void)
{
	(void)signal(SIGTERM, SIG_IGN);
	for (;;)
		(void)pause();
}
