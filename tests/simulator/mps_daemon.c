/* The control daemon: one poll loop over sockets that never block, so that a silent peer stops nobody. */
#include "mps_daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { NO_DEVICES_STATUS = 100 };

/* ---- Files of the pipe and log directories ---- */

static void path_in(const struct daemon *daemon, char path[256], const char *name)
{
	snprintf(path, 256, "%s/%s", daemon->directory, name);
}

static int open_log(const char *name)
{
	char path[4096];
	const char *directory = getenv("CUDA_MPS_LOG_DIRECTORY");
	if (!directory || !*directory) {
		directory = "/var/log/nvidia-mps";
		mkdir(directory, 0755);
	}
	snprintf(path, sizeof path, "%s/%s", directory, name);
	return open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644); /* -1: it goes on without */
}

static int listen_on(const struct daemon *daemon, const char *name, mode_t mode)
{
	struct sockaddr_un address;
	if (!wire_address(&address, daemon->directory, name))
		return -1;
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	unlink(address.sun_path); /* a dead daemon's (O25) */
	if (bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && chmod(address.sun_path, mode) == 0 &&
	    listen(fd, 512) == 0)
		return fd;
	close(fd);
	return -1;
}

static void open_fifo(struct daemon *daemon)
{
	char path[256];
	path_in(daemon, path, "log");
	unlink(path);
	daemon->fifo_in = daemon->fifo_out = -1;
	if (mkfifo(path, 0777) != 0)
		return;
	chmod(path, 0777); /* a server of any uid may write */
	daemon->fifo_in = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	daemon->fifo_out = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
}

static void write_pid_file(const struct daemon *daemon)
{
	char path[256];
	path_in(daemon, path, "nvidia-cuda-mps-control.pid");
	FILE *file = fopen(path, "we");
	if (!file)
		return;
	fprintf(file, "%d\n", (int)getpid());
	fchmod(fileno(file), 0666); /* whatever the umask (O37) */
	fclose(file);
}

void daemon_exit(struct daemon *daemon)
{
	char path[256];
	path_in(daemon, path, "log");
	unlink(path);
	path_in(daemon, path, "nvidia-cuda-mps-control.pid");
	unlink(path); /* sockets and lock stay (O25) */
	SAY(daemon, "Exit with status %d", daemon->exit_status);
	/* At exit files are let go in any order: the next daemon must find the lock free once quit has returned. */
	close(daemon->control);
	close(daemon->privileged);
	close(daemon->lock);
	for (int i = 0; i < daemon->count; i++)
		if (daemon->connections[i]->fd >= 0 && daemon->connections[i]->waiting == WAIT_QUIT)
			wire_send_number(daemon->connections[i]->fd, WIRE_EXIT, daemon->exit_status);
	_exit(daemon->exit_status);
}

/* ---- Connections ---- */

void daemon_answer(struct daemon *daemon, struct connection *ui, const char *text)
{
	char line[1024];
	for (const char *at = text; *at;) {
		size_t length = strcspn(at, "\n");
		snprintf(line, sizeof line, "%.*s", (int)(length < sizeof line ? length : sizeof line - 1), at);
		SAY(daemon, "%s", line);
		at += length + (at[length] == '\n');
	}
	ui->waiting = WAIT_NOTHING;
	if (wire_send(ui->fd, WIRE_ANSWER, text, (uint32_t)strlen(text), false))
		return;
	close(ui->fd);
	ui->fd = -1;
}

static void lose(struct daemon *daemon, struct connection *peer)
{
	if (peer->kind == PEER_UI)
		SAY(daemon, "UI closed");
	else if (peer->kind == PEER_UNKNOWN)
		SAY(daemon, "User did not send valid credentials");
	close(peer->fd);
	peer->fd = -1;
}

static void sweep(struct daemon *daemon)
{
	int kept = 0;
	for (int i = 0; i < daemon->count; i++) {
		if (daemon->connections[i]->fd >= 0)
			daemon->connections[kept++] = daemon->connections[i];
		else
			free(daemon->connections[i]);
	}
	daemon->count = kept;
}

/* Make room by closing who has been silent longest; false when all have said who they are. */
static bool drop_silent(struct daemon *daemon)
{
	for (int i = 0; i < daemon->count; i++)
		if (daemon->connections[i]->fd >= 0 && daemon->connections[i]->kind == PEER_UNKNOWN) {
			lose(daemon, daemon->connections[i]);
			return true;
		}
	return false;
}

static void accept_one(struct daemon *daemon, int listener)
{
	struct ucred who;
	socklen_t size = sizeof who;
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (fd < 0) {
		if (errno == EMFILE)
			drop_silent(daemon); /* or the listener would be ready for ever */
		return;
	}
	SAY(daemon, "Accepting connection...");
	if (daemon->count == MAX_CONNECTIONS && drop_silent(daemon))
		sweep(daemon);
	struct connection *fresh = daemon->count < MAX_CONNECTIONS ? calloc(1, sizeof *fresh) : NULL;
	if (!fresh || getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) != 0) {
		free(fresh);
		close(fd);
		return;
	}
	fresh->fd = fd;
	fresh->pid = who.pid;
	fresh->uid = who.uid;
	fresh->since_ms = sim_now_ms();
	daemon->connections[daemon->count++] = fresh;
}

static bool talks_to_another(const struct daemon *daemon)
{
	for (int i = 0; i < daemon->count; i++)
		if (daemon->connections[i]->fd >= 0 && daemon->connections[i]->kind == PEER_UI)
			return true;
	return false;
}

/* Act on one frame; false when the peer talks nonsense. */
static bool obey(struct daemon *daemon, struct connection *peer, const struct wire_frame *frame)
{
	if (peer->kind == PEER_UNKNOWN && frame->type == WIRE_UI) {
		if (talks_to_another(daemon))
			return false; /* one at a time (O40) */
		peer->kind = PEER_UI;
		SAY(daemon, "NEW UI");
		return true;
	}
	if (peer->kind == PEER_UNKNOWN && frame->type == WIRE_CLIENT && frame->length == sizeof peer->request) {
		peer->kind = PEER_CLIENT;
		memcpy(&peer->request, frame->payload, sizeof peer->request);
		supervise_client(daemon, peer);
		return true;
	}
	if (peer->kind != PEER_UI || frame->type != WIRE_COMMAND || peer->waiting != WAIT_NOTHING)
		return false;
	command_receive(daemon, peer, (const char *)frame->payload);
	return true;
}

static void hear(struct daemon *daemon, struct connection *peer)
{
	struct wire_frame frame;
	/* A few at a time: one that floods takes turns with the others. */
	for (int turn = 0; turn < 4 && peer->fd >= 0; turn++) {
		int got = wire_read(peer->fd, &peer->reader, &frame);
		if (got == 0)
			return;
		if (got < 0 || !obey(daemon, peer, &frame)) {
			if (peer->fd >= 0)
				lose(daemon, peer);
			return;
		}
	}
}

/* ---- The loop ---- */

static volatile sig_atomic_t child_ended, told_to_end;

static void on_signal(int number)
{
	if (number == SIGCHLD)
		child_ended = 1;
	else
		told_to_end = 1;
}

static void die_of_sigterm(void)
{
	sigset_t only;
	told_to_end = 0;
	if (sim_fault_is("daemon.sigterm", "ignore"))
		return;
	signal(SIGTERM, SIG_DFL);
	raise(SIGTERM); /* at once, files and all (O28) */
	sigemptyset(&only);
	sigaddset(&only, SIGTERM);
	sigprocmask(SIG_UNBLOCK, &only, NULL);
}

static void copy_server_log(const struct daemon *daemon)
{
	char bytes[16384];
	ssize_t got = read(daemon->fifo_in, bytes, sizeof bytes);
	if (got > 0 && daemon->server_log >= 0 && write(daemon->server_log, bytes, (size_t)got) < 0)
		return; /* a full disk: the lines are lost, the daemon goes on */
}

static uint64_t sooner(uint64_t a, uint64_t b)
{
	return b != 0 && b < a ? b : a;
}

/* The time of the next thing to do by the clock. */
static uint64_t next_wake(const struct daemon *daemon)
{
	uint64_t next = UINT64_MAX;
	for (int i = 0; i < daemon->count; i++) {
		const struct connection *peer = daemon->connections[i];
		if (peer->waiting == WAIT_CLOCK)
			next = sooner(next, peer->wake_ms);
		if (peer->kind == PEER_UNKNOWN)
			next = sooner(next, peer->since_ms + SILENCE_MS);
	}
	if (daemon->server.state != SERVER_NONE) {
		next = sooner(next, daemon->server.kill_ms);
		next = sooner(next, daemon->server.retry_ms);
		if (daemon->quitting && !daemon->server.kill_ms)
			next = sooner(next, daemon->force_ms);
	}
	return next;
}

static void run_clock(struct daemon *daemon)
{
	uint64_t now = sim_now_ms();
	for (int i = 0; i < daemon->count; i++) {
		struct connection *peer = daemon->connections[i];
		if (peer->fd < 0)
			continue;
		if (peer->waiting == WAIT_CLOCK && now >= peer->wake_ms)
			command_wake(daemon, peer);
		else if (peer->kind == PEER_UNKNOWN && now >= peer->since_ms + SILENCE_MS)
			lose(daemon, peer);
	}
	supervise_step(daemon);
}

enum { POLL_CONTROL, POLL_PRIVILEGED, POLL_FIFO, POLL_SERVER, POLL_FIRST_PEER };

static void act(struct daemon *daemon, const struct pollfd *polled, int peers)
{
	if (polled[POLL_FIFO].revents)
		copy_server_log(daemon);
	/* The server's word before the UI's question, so that an answer is as new as can be. */
	if (polled[POLL_SERVER].revents)
		supervise_hear(daemon);
	for (int i = 0; i < peers; i++) {
		struct connection *peer = daemon->connections[i];
		if (peer->fd >= 0 && polled[POLL_FIRST_PEER + i].revents)
			hear(daemon, peer);
	}
	if (polled[POLL_CONTROL].revents)
		accept_one(daemon, daemon->control);
	if (polled[POLL_PRIVILEGED].revents)
		accept_one(daemon, daemon->privileged);
}

static void serve(struct daemon *daemon)
{
	sigset_t none;
	static struct pollfd polled[POLL_FIRST_PEER + MAX_CONNECTIONS];
	sigemptyset(&none);
	for (;;) {
		sweep(daemon);
		int peers = daemon->count;
		uint64_t now = sim_now_ms(), next = next_wake(daemon);
		uint64_t left = next > now ? next - now : 0;
		struct timespec wait = {.tv_sec = (time_t)(left / 1000), .tv_nsec = (long)(left % 1000) * 1000000};
		polled[POLL_CONTROL] = (struct pollfd){.fd = daemon->control, .events = POLLIN};
		polled[POLL_PRIVILEGED] = (struct pollfd){.fd = daemon->privileged, .events = POLLIN};
		polled[POLL_FIFO] = (struct pollfd){.fd = daemon->fifo_in, .events = POLLIN};
		polled[POLL_SERVER] = (struct pollfd){.fd = daemon->server.channel, .events = POLLIN};
		for (int i = 0; i < peers; i++)
			polled[POLL_FIRST_PEER + i] = (struct pollfd){.fd = daemon->connections[i]->fd, .events = POLLIN};
		int ready = ppoll(polled, (nfds_t)(POLL_FIRST_PEER + peers), next == UINT64_MAX ? NULL : &wait, &none);
		if (told_to_end)
			die_of_sigterm();
		if (ready > 0)
			act(daemon, polled, peers);
		if (child_ended) {
			child_ended = 0;
			supervise_reap(daemon);
		}
		run_clock(daemon);
	}
}

/* ---- Starting ---- */

static void hold_signals(void)
{
	struct sigaction action = {.sa_handler = on_signal};
	sigset_t held;
	sigemptyset(&held);
	sigaddset(&held, SIGCHLD);
	sigaddset(&held, SIGTERM);
	sigprocmask(SIG_SETMASK, &held, NULL);
	sigaction(SIGCHLD, &action, NULL);
	sigaction(SIGTERM, &action, NULL);
	signal(SIGPIPE, SIG_IGN);
}

static int compare_ints(const void *a, const void *b)
{
	return *(const int *)a - *(const int *)b;
}

static void raise_file_limit(void)
{
	struct rlimit files;
	if (getrlimit(RLIMIT_NOFILE, &files) != 0 || files.rlim_cur >= 2 * MAX_CONNECTIONS)
		return;
	files.rlim_cur = files.rlim_max < 2 * MAX_CONNECTIONS ? files.rlim_max : 2 * MAX_CONNECTIONS;
	setrlimit(RLIMIT_NOFILE, &files);
}

static bool find_gpus(struct daemon *daemon)
{
	daemon->state = sim_open();
	if (!daemon->state)
		return false;
	struct units_gpus open_ones = units_openable(daemon->state, units_all(daemon->state));
	daemon->gpus = units_visible(daemon->state, open_ones, getenv("CUDA_VISIBLE_DEVICES"));
	daemon->pci_gpus = daemon->gpus;
	qsort(daemon->pci_gpus.index, (size_t)daemon->pci_gpus.count, sizeof(int), compare_ints);
	return daemon->gpus.count > 0;
}

/* Hold the lock of the pipe directory; an exit status when that fails. */
static int take_directory(struct daemon *daemon)
{
	char path[4096];
	const char *directory = wire_pipe_directory();
	mkdir(directory, 0755);
	snprintf(path, sizeof path, "%s/control_lock", directory);
	daemon->lock = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
	if (daemon->lock < 0) {
		printf("Cannot access CUDA_MPS_PIPE_DIRECTORY=%s\n", directory);
		return 1;
	}
	fchmod(daemon->lock, 0666); /* whatever the umask (O37) */
	if (flock(daemon->lock, LOCK_EX | LOCK_NB) == 0)
		return 0;
	printf("An instance of this daemon is already running\n");
	return 1;
}

static int open_everything(struct daemon *daemon)
{
	const char *directory = wire_pipe_directory();
	struct sockaddr_un address;
	daemon->control_log = open_log("control.log");
	daemon->server_log = open_log("server.log");
	SAY(daemon, "Starting control daemon using socket %s/control", directory);
	SAY(daemon, "To connect CUDA applications to this daemon, set env CUDA_MPS_PIPE_DIRECTORY=%s", directory);
	if (!wire_address(&address, directory, "control"))
		return 1; /* and no word why (O6) */
	snprintf(daemon->directory, sizeof daemon->directory, "%s", directory);
	daemon->control = listen_on(daemon, "control", 0666);
	daemon->privileged = listen_on(daemon, "control_privileged", 0755);
	if (daemon->control < 0)
		return 1;
	open_fifo(daemon);
	SAY(daemon, "CUDA MPS Control binary version: %d", daemon->state->cuda_version);
	return 0;
}

/* Leave the caller's terminal, session and pipes */
static void go_background(void)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	setsid();
	for (int fd = 0; fd < 3 && null >= 0; fd++)
		dup2(null, fd);
	if (null > 2)
		close(null);
}

/* Become two: the child goes on and gets the pipe to report on, the parent returns the child's word. */
static int fork_daemon(int *report)
{
	int pair[2], status = 1;
	if (pipe2(pair, O_CLOEXEC) != 0)
		return 1;
	fflush(stdout);
	pid_t pid = fork();
	if (pid < 0)
		return 1;
	if (pid == 0) {
		close(pair[0]);
		*report = pair[1];
		return -1;
	}
	close(pair[1]);
	ssize_t got = read(pair[0], &status, sizeof status);
	_exit(got == (ssize_t)sizeof status ? status : 1);
}

static void say_ready(int report, int status)
{
	if (report < 0)
		return;
	if (write(report, &status, sizeof status) < 0)
		return;
	close(report);
}

/* Returns an exit status when this node was told that daemons do not start, -1 otherwise. */
static int misbehave_at_start(void)
{
	char told[SIM_FAULT_SIZE];
	if (!sim_fault("daemon.start", told))
		return -1;
	if (strcmp(told, "noop") == 0)
		return 0;
	if (strncmp(told, "exit:", 5) == 0)
		return atoi(told + 5);
	if (strncmp(told, "slow:", 5) == 0)
		sim_sleep(atoi(told + 5));
	while (strcmp(told, "hang") == 0)
		pause();
	return -1;
}

static void set_defaults(struct daemon *daemon)
{
	const char *percentage = getenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE");
	daemon->percentage = 100.0;
	if (percentage)
		units_read_percentage(percentage, &daemon->percentage);
	/* The memory limit's variable sets nothing (O9), but with it a query prints nothing instead of a sentence. */
	daemon->limits_ever_set = getenv("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT") != NULL;
}

int daemon_run(bool foreground, bool multiuser)
{
	static struct daemon daemon;
	int report = -1, status = misbehave_at_start();
	if (status >= 0)
		return status;
	daemon.multiuser = multiuser;
	daemon.foreground = foreground;
	daemon.server.channel = -1;
	if (!find_gpus(&daemon))
		return NO_DEVICES_STATUS; /* no message, no log (O6) */
	daemon.driver = daemon.state->driver;
	sim_latency(14 * daemon.gpus.count);
	/* The lock belongs to the open file, which the child inherits: no second daemon slips in between. */
	status = take_directory(&daemon);
	if (status == 0 && !foreground)
		status = fork_daemon(&report);
	if (status > 0)
		return status;
	if (!foreground)
		go_background();
	hold_signals();
	raise_file_limit();
	set_defaults(&daemon);
	status = open_everything(&daemon);
	if (status == 0 && daemon.driver > 535) /* which writes none (O83) */
		write_pid_file(&daemon);
	say_ready(report, status);
	if (status != 0 || sim_fault_is("daemon.after_start", "die"))
		return status ? status : 1;
	serve(&daemon);
	return 0;
}
