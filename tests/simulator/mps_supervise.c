/* The control daemon and its server: started for the uid of a client, replaced for another uid when idle. */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "mps_daemon.h"

enum { FIRST_BACKOFF_MS = 200, LAST_BACKOFF_MS = 3200, KILL_AFTER_MS = 200, CUDA_CONNECTION_FAILED = 805 };

/* ---- Starting ---- */

static int compare_ints(const void *a, const void *b)
{
	return *(const int *)a - *(const int *)b;
}

static void fill_values(const struct daemon *daemon, struct wire_welcome *values)
{
	struct units_gpus sorted = daemon->gpus;
	qsort(sorted.index, (size_t)sorted.count, sizeof *sorted.index, compare_ints);
	memset(values, 0, sizeof *values);
	values->gpu_count = sorted.count;
	memcpy(values->gpus, sorted.index, sizeof values->gpus);
	values->percentage = daemon->server.percentage;
	/* In the order they were set: of an ordinal and a UUID for one device the last one counts. */
	for (int i = 0; i < daemon->server.limits.count; i++) {
		const struct limit *limit = &daemon->server.limits.list[i];
		int place = units_place(daemon->state, &sorted, limit->device);
		if (place >= 0)
			values->limit_bytes[place] = limit->bytes;
	}
}

/* The server lies beside this program, or on PATH. */
static void exec_server(void)
{
	char path[4096], *no_arguments[] = {(char *)"nvidia-cuda-mps-server", NULL};
	ssize_t length = readlink("/proc/self/exe", path, sizeof path - 32);
	if (length > 0) {
		path[length] = '\0';
		char *slash = strrchr(path, '/');
		if (slash) {
			strcpy(slash + 1, "nvidia-cuda-mps-server");
			execv(path, no_arguments);
		}
	}
	execvp("nvidia-cuda-mps-server", no_arguments);
}

/* Its group stays root's, whoever it is for (O51). */
static bool become(uid_t uid)
{
	return (getuid() != 0 || setgroups(0, NULL) == 0) && setuid(uid) == 0;
}

static _Noreturn void be_server(const struct daemon *daemon, int channel, uid_t uid)
{
	sigset_t none;
	SAY(daemon, "Starting new server %d for user %d", (int)getpid(), (int)uid);
	if (!become(uid)) {
		SAY(daemon, "Failed to start server using uid %d, error: %s", (int)uid, strerror(errno));
		_exit(1);
	}
	char socket_path[sizeof(struct sockaddr_un)];
	snprintf(socket_path, sizeof socket_path, "%s/control", wire_pipe_directory());
	if (access(socket_path, W_OK) != 0) /* a real one connects to it, with the user's rights (O68) */
		_exit(1);
	/* Neither may be overwritten by the other's dup2. */
	int high_channel = fcntl(channel, F_DUPFD, 10), high_log = fcntl(daemon->fifo_out, F_DUPFD, 10);
	dup2(high_channel, SERVER_CHANNEL_FD);
	if (high_log >= 0)
		dup2(high_log, SERVER_LOG_FD);
	else
		close(SERVER_LOG_FD);
	for (int fd = SERVER_LOG_FD + 1; fd < 1024; fd++)
		close(fd);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGTERM, SIG_DFL);
	exec_server();
	_exit(1);
}

static void start_server(struct daemon *daemon, uid_t uid)
{
	int pair[2];
	struct server_message config = {.type = SERVER_CONFIG, .uid = (int32_t)uid};
	struct server *server = &daemon->server;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
		return;
	pid_t pid = fork();
	if (pid == 0)
		be_server(daemon, pair[1], uid);
	close(pair[1]);
	if (pid < 0) {
		close(pair[0]);
		return;
	}
	*server = (struct server){.state = SERVER_STARTING, .pid = pid, .uid = uid, .channel = pair[0]};
	server->percentage = daemon->percentage; /* its own from here on (O14) */
	server->limits = daemon->limits;
	fill_values(daemon, &config.values);
	server_message_send(server->channel, &config, -1);
}

/* ---- Clients ---- */

static uid_t server_uid_for(const struct daemon *daemon, uid_t client)
{
	return daemon->multiuser ? 0 : client;
}

static bool serves(const struct daemon *daemon, uid_t uid)
{
	return daemon->server.state == SERVER_ACTIVE && daemon->server.uid == uid;
}

static void hang_up(struct connection *client)
{
	close(client->fd);
	client->fd = -1; /* the loop drops it */
}

static void fail_client(struct connection *client)
{
	struct wire_welcome no = {.status = CUDA_CONNECTION_FAILED};
	wire_send(client->fd, WIRE_WELCOME, &no, sizeof no, false);
	hang_up(client);
}

static void hand_over(struct daemon *daemon, struct connection *client)
{
	struct server_message message = {.type = SERVER_CLIENT, .pid = client->pid, .uid = (int32_t)client->uid};
	message.client = client->request;
	client->waiting = WAIT_NOTHING;
	if (server_message_send(daemon->server.channel, &message, client->fd))
		hang_up(client);
	else
		fail_client(client);
}

void supervise_client(struct daemon *daemon, struct connection *client)
{
	bool ready = serves(daemon, server_uid_for(daemon, client->uid));
	SAY(daemon, "NEW CLIENT %d from user %d: %s", (int)client->pid, (int)server_uid_for(daemon, client->uid),
	    ready ? "Server already exists" : "Server is not ready, push client to pending list");
	if (ready) {
		hand_over(daemon, client);
		return;
	}
	client->waiting = WAIT_SERVER;
	supervise_step(daemon);
}

void supervise_want(struct daemon *daemon, uid_t uid)
{
	if (serves(daemon, server_uid_for(daemon, uid)))
		return;
	daemon->wants_server = true;
	daemon->wanted_uid = uid;
	daemon->failed_starts = 0;
	supervise_step(daemon);
}

static void serve_pending(struct daemon *daemon)
{
	for (int i = 0; i < daemon->count; i++) {
		struct connection *client = daemon->connections[i];
		if (client->fd >= 0 && client->waiting == WAIT_SERVER &&
		    serves(daemon, server_uid_for(daemon, client->uid)))
			hand_over(daemon, client);
	}
}

static void fail_pending(struct daemon *daemon, uid_t uid)
{
	for (int i = 0; i < daemon->count; i++) {
		struct connection *client = daemon->connections[i];
		if (client->fd >= 0 && client->waiting == WAIT_SERVER && server_uid_for(daemon, client->uid) == uid)
			fail_client(client);
	}
}

/* ---- Leaving ---- */

static void try_shutdown(struct daemon *daemon, bool backoff)
{
	struct server_message message = {.type = SERVER_SHUTDOWN};
	SAY(daemon, "Try shutting down server %d, backoff is %s", (int)daemon->server.pid,
	    backoff ? "enabled" : "disabled");
	daemon->server.retry_ms = 0;
	daemon->server.backs_off = backoff;
	daemon->server.state = SERVER_LEAVING;
	server_message_send(daemon->server.channel, &message, -1);
}

void supervise_shut_down(struct daemon *daemon)
{
	if (daemon->server.state == SERVER_ACTIVE)
		try_shutdown(daemon, false);
}

static void force_shutdown(struct daemon *daemon)
{
	struct server_message message = {.type = SERVER_FORCE};
	SAY(daemon, "Force shutting down server %d", (int)daemon->server.pid);
	server_message_send(daemon->server.channel, &message, -1);
}

/* The time of quit -t is over: a last try, and force when the server still refuses, or says nothing. */
static void end_patience(struct daemon *daemon)
{
	daemon->server.kill_ms = sim_now_ms() + KILL_AFTER_MS; /* one that hangs reads nothing */
	try_shutdown(daemon, false);
}

static bool patience_is_over(const struct daemon *daemon)
{
	return daemon->quitting && daemon->force_ms && sim_now_ms() >= daemon->force_ms;
}

static void wake_uis(struct daemon *daemon, enum waiting waiting)
{
	for (int i = 0; i < daemon->count; i++)
		if (daemon->connections[i]->fd >= 0 && daemon->connections[i]->waiting == waiting)
			command_wake(daemon, daemon->connections[i]);
}

/* A client that waits for a server of another uid than the one that runs. */
static bool somebody_waits(const struct daemon *daemon, uid_t *uid)
{
	for (int i = 0; i < daemon->count; i++) {
		const struct connection *client = daemon->connections[i];
		if (client->fd < 0 || client->waiting != WAIT_SERVER)
			continue;
		*uid = server_uid_for(daemon, client->uid);
		return true;
	}
	*uid = server_uid_for(daemon, daemon->wanted_uid);
	return daemon->wants_server;
}

static bool another_waits(const struct daemon *daemon)
{
	uid_t uid;
	return somebody_waits(daemon, &uid) && uid != daemon->server.uid;
}

void supervise_step(struct daemon *daemon)
{
	uid_t uid;
	uint64_t now = sim_now_ms();
	struct server *server = &daemon->server;
	if (server->state == SERVER_NONE) {
		if (daemon->quitting)
			daemon_exit(daemon);
		if (somebody_waits(daemon, &uid))
			start_server(daemon, uid);
		return;
	}
	if (server->kill_ms && now >= server->kill_ms)
		kill(server->pid, SIGKILL);
	if (patience_is_over(daemon)) {
		if (!server->kill_ms)
			end_patience(daemon);
		return;
	}
	if (server->state != SERVER_ACTIVE)
		return;
	if ((daemon->quitting || another_waits(daemon)) && (server->retry_ms == 0 || now >= server->retry_ms))
		try_shutdown(daemon, server->retry_ms > 0);
}

/* ---- What the server says, and how it ends ---- */

static void server_stays(struct daemon *daemon, int workers)
{
	struct server *server = &daemon->server;
	SAY(daemon, "Server %d has %d active worker threads. Server will not shutdown.", (int)server->pid, workers);
	server->state = SERVER_ACTIVE;
	if (patience_is_over(daemon)) {
		force_shutdown(daemon);
		return;
	}
	if (!daemon->quitting && !another_waits(daemon)) {
		serve_pending(daemon); /* shutdown_server: it was asked once */
		return;
	}
	if (server->backoff_ms == 0)
		server->backoff_ms = FIRST_BACKOFF_MS;
	else if (server->backs_off)
		server->backoff_ms *= 2;
	if (server->backoff_ms > LAST_BACKOFF_MS)
		server->backoff_ms = LAST_BACKOFF_MS;
	server->retry_ms = sim_now_ms() + (uint64_t)server->backoff_ms;
	SAY(daemon, "Control will try shutting down server %d again in at most %dms", (int)server->pid,
	    server->backoff_ms);
	serve_pending(daemon);
}

static void server_ready(struct daemon *daemon)
{
	SAY(daemon, "NEW SERVER %d: Ready", (int)daemon->server.pid);
	daemon->server.state = SERVER_ACTIVE;
	daemon->failed_starts = 0;
	daemon->wants_server = false;
	wake_uis(daemon, WAIT_STATUS);
	serve_pending(daemon);
}

void supervise_hear(struct daemon *daemon)
{
	struct server_message message = {0};
	struct server *server = &daemon->server;
	int fd, got = 0;
	while (server->state != SERVER_NONE && server->channel >= 0 &&
	       (got = server_message_receive(server->channel, &message, &fd)) == 1) {
		if (fd >= 0)
			close(fd);
		if (message.type == SERVER_READY) {
			SAY(daemon, "Accepting connection...");
			server_ready(daemon);
		} else if (message.type == SERVER_STATUS) {
			server->fault = message.number != 0;
		} else if (message.type == SERVER_BUSY) {
			server_stays(daemon, message.number);
		} else if (message.type == SERVER_IDLE) {
			server->retry_ms = 0; /* "at most": when the last client leaves, sooner */
		} else if (message.type == SERVER_TERMINATED) {
			command_terminated(daemon, message.number);
		}
	}
	if (got < 0) { /* it is dead or dying: its exit status follows */
		close(server->channel);
		server->channel = -1;
	}
	supervise_step(daemon);
}

static void server_ended(struct daemon *daemon, int status)
{
	struct server ended = daemon->server;
	int code = WEXITSTATUS(status); /* 0 for one that a signal ended, too (O65) */
	bool starting = ended.state == SERVER_STARTING;
	SAY(daemon, "Server %d exited with status %d", (int)ended.pid, code);
	if (ended.channel >= 0)
		close(ended.channel);
	daemon->server = (struct server){.state = SERVER_NONE, .channel = -1};
	if (code != 0)
		daemon->exit_status = 1; /* a later quit then exits 1, as seen once on the real card */
	command_terminated(daemon, 1);
	wake_uis(daemon, WAIT_STATUS);
	if (starting && ++daemon->failed_starts >= START_ATTEMPTS) {
		daemon->failed_starts = 0;
		daemon->wants_server = false;
		fail_pending(daemon, ended.uid);
	}
	supervise_step(daemon);
}

void supervise_reap(struct daemon *daemon)
{
	int status;
	pid_t pid;
	supervise_hear(daemon); /* its last words come before its end */
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		if (daemon->server.state != SERVER_NONE && pid == daemon->server.pid)
			server_ended(daemon, status);
}

void supervise_values(struct daemon *daemon)
{
	struct server_message message = {.type = SERVER_VALUES};
	fill_values(daemon, &message.values);
	server_message_send(daemon->server.channel, &message, -1);
}

bool supervise_runs(const struct daemon *daemon, pid_t pid)
{
	return daemon->server.state != SERVER_NONE && daemon->server.pid == pid;
}
