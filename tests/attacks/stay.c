/* LD_PRELOAD for a program of root's: it stays as it is, with its environment, or calls itself STAY_NAME, and does nothing. */
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

__attribute__((constructor)) static void stay(void)
{
	const char *name = getenv("STAY_NAME");

	(void)signal(SIGTERM, SIG_IGN);
	if (name)
		(void)prctl(PR_SET_NAME, name);
	for (;;)
		(void)pause();
}
