/* nvidia-cuda-mps-control of a simulated node: its options, and the user interface that talks to a daemon. */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mps_daemon.h"
#include "mps_usage.h"

static char answer[WIRE_MAX_ANSWER + 1];

static bool is_before_580(void)
{
	const struct sim_state *state = sim_open();
	return state && state->driver < 580;
}

/* Print the answer to one line. Returns -1 to go on, otherwise an exit status. */
static int await_answer(int fd)
{
	uint32_t type = 0;
	int32_t status = 1;
	ssize_t length = wire_receive(fd, &type, answer, WIRE_MAX_ANSWER);
	if (length < 0) { /* the daemon died, or talks to another (O40) */
		if (is_before_580() && getpid() % 4) /* nearly always without a word, and at times with success (O90) */
			return getpid() % 4 == 1;
		fprintf(stderr, "Cannot send command to MPS control daemon process\n");
		return 1;
	}
	if (type == WIRE_ANSWER) {
		fwrite(answer, 1, (size_t)length, stdout);
		fflush(stdout);
		return -1;
	}
	if (type == WIRE_EXIT && length == (ssize_t)sizeof status)
		memcpy(&status, answer, sizeof status);
	return status;
}

/* After quit: wait for the daemon to be gone, not only for its word. */
static void await_end(int fd)
{
	while (recv(fd, answer, sizeof answer, 0) > 0)
		continue;
}

static int talk(void)
{
	char line[WIRE_MAX_REQUEST];
	int fd = wire_connect();
	if (fd < 0 || !wire_send(fd, WIRE_UI, NULL, 0, true)) {
		fprintf(stderr, "Cannot find MPS control daemon process\n");
		return 1;
	}
	sim_latency(1); /* a connection costs that much, a further line a fiftieth of it */
	while (fgets(line, sizeof line, stdin)) {
		line[strcspn(line, "\n")] = '\0';
		if (line[strspn(line, " \t\r")] == '\0')
			continue;
		if (!wire_send(fd, WIRE_COMMAND, line, (uint32_t)strlen(line), true)) {
			fprintf(stderr, "Cannot send command to MPS control daemon process\n");
			return 1;
		}
		int status = await_answer(fd);
		if (status < 0)
			continue;
		if (strncmp(line, "quit", 4) == 0 && !sim_fault("command.quit", answer))
			await_end(fd);
		return status;
	}
	return 0;
}

int main(int count, char **arguments)
{
	static const struct option options[] = {{"help", no_argument, NULL, 'h'},
						{"daemon", no_argument, NULL, 'd'},
						{"forground", no_argument, NULL, 'f'}, /* its spelling */
						{"multiuser-server", no_argument, NULL, 'M'},
						{"ready-devices", no_argument, NULL, 'q'},
						{NULL, 0, NULL, 0}};
	bool background = false, foreground = false, multiuser = false;
	int option;
	opterr = 0;
	while ((option = getopt_long(count, arguments, "hdfMq", options, NULL)) != -1) {
		switch (option) {
		case 'd':
			background = true;
			break;
		case 'f':
			foreground = true;
			break;
		case 'M':
			multiuser = true;
			break;
		case 'q':
			break;
		case 'h':
			fputs(is_before_580() ? MPS_BANNER : MPS_USAGE, stdout);
			return 0;
		default: /* and no daemon, and success (O5) */
			if (is_before_580()) /* which take it for a wish to talk to a daemon (O83) */
				return talk();
			printf("Unrecognized option  \n%s", MPS_USAGE);
			return 0;
		}
	}
	if (multiuser && is_before_580())
		return talk(); /* which know no such option (O96) */
	if (multiuser && getuid() != 0) {
		printf("Only root user may enable -multiuser-server!\n");
		return 1;
	}
	if (background || foreground)
		return daemon_run(foreground, multiuser);
	if (optind < count && !is_before_580())
		return 0; /* a command as an argument is taken in silence (O7) */
	return talk();
}
