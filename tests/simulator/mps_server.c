/* nvidia-cuda-mps-server of a simulated node: holds the GPUs for its clients, and passes their faults on.
 *
 * The control daemon starts it with a channel on fd 3 and its `log` fifo on fd 4, and hands it the clients'
 * connections. When the daemon dies, the server serves the clients it has and leaves after the last. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mps_log.h"
#include "mps_wire.h"
#include "sim_fault.h"
#include "sim_state.h"

enum { MAX_CONNECTIONS = 2048 };

enum {
	CUDA_ILLEGAL_ADDRESS = 700,
	CUDA_LAUNCH_FAILED = 719,
	CUDA_SERVER_NOT_READY = 807,
	CUDA_MAX_CLIENTS_REACHED = 808,
	CUDA_CLIENT_TERMINATED = 810,
};

struct connection {
	int fd, pid;
	int context_id; /* 0: the one of cuInit */
	int gpu;        /* -1: none */
	int next_context_id;
	bool spinning, terminated, victim;
	struct wire_reader reader;
};

static struct {
	struct sim_state *state;
	struct wire_welcome values;
	struct connection *connections[MAX_CONNECTIONS];
	int count;
	int sequence;
	bool faulty[SIM_MAX_GPUS], destroyed[SIM_MAX_GPUS];
	bool poisoned[SIM_MAX_GPUS]; /* a client died in an endless kernel: the next one pays (O35, O46) */
	bool in_fault, daemon_gone;
	int last_pid, last_context_id;
	uint64_t active_again_ms[SIM_MAX_GPUS]; /* a reset runs until then; 0: none */
} server = {.last_pid = -1333654781};

#define SAY(...) mps_log(SERVER_LOG_FD, "Server", __VA_ARGS__)

static void tell_daemon(int type, int pid, int number)
{
	struct server_message message = {.type = type, .pid = pid, .number = number};
	server_message_send(SERVER_CHANNEL_FD, &message, -1);
}

/* What clients know a GPU by. */
static int ordinal_of(int gpu)
{
	for (int i = 0; i < server.values.gpu_count; i++)
		if (server.values.gpus[i] == gpu)
			return i;
	return -1;
}

static int active_contexts(int gpu)
{
	int active = 0;
	for (int i = 0; i < server.count; i++)
		if (server.connections[i]->context_id > 0 && server.connections[i]->gpu == gpu)
			active++;
	return active;
}

static struct connection *attached(int pid)
{
	for (int i = 0; i < server.count; i++)
		if (server.connections[i]->pid == pid && server.connections[i]->context_id == 0)
			return server.connections[i];
	return NULL;
}

static void report_status(void)
{
	bool fault = false;
	for (int gpu = 0; gpu < SIM_MAX_GPUS; gpu++)
		fault = fault || server.faulty[gpu];
	if (fault == server.in_fault)
		return;
	server.in_fault = fault;
	tell_daemon(SERVER_STATUS, 0, fault);
}

/* A fatal error on a GPU reaches every client on it, and no other (O30, O33). culprit: NULL for a trap. */
static void fault_gpu(int gpu, const struct connection *culprit, int error)
{
	if (culprit)
		SAY("Client {PID: %d, Context: %d} encountered a fatal GPU error.", culprit->pid, culprit->context_id);
	SAY("Server is handling a fatal GPU error.");
	server.faulty[gpu] = true;
	report_status(); /* the daemon hears of it before any client does */
	for (int pass = 0; pass < 3; pass++) {
		if (pass == 2) {
			SAY("The following devices will be reset:");
			SAY("%d", ordinal_of(gpu));
			SAY("The following client process have a sticky error set:");
		}
		for (int i = 0; i < server.count; i++) {
			struct connection *one = server.connections[i];
			if (one->gpu != gpu || one->context_id == 0)
				continue;
			if (pass == 0) {
				SAY("Client {PID: %d, Context ID: %d} on device %d to be torn down", one->pid,
				    one->context_id, ordinal_of(gpu));
			} else if (pass == 1) {
				SAY("All clients belonging to error trigging process %d will be torn down", one->pid);
				SAY("Client {PID: %d, Context ID: %d} on the error-trigging process %d to be torn down",
				    one->pid, one->context_id, one->pid);
			} else {
				SAY("%d", one->pid);
				one->victim = true;
				wire_send_number(one->fd, WIRE_ERROR, error);
			}
		}
	}
}

/* The last victim left: the GPU is reset. On the real card that takes 0.3 s (O34). */
static void begin_reset(int gpu)
{
	if (!server.faulty[gpu] || server.active_again_ms[gpu] || active_contexts(gpu) > 0)
		return;
	SAY("Destroy server context on device %d (%s)", ordinal_of(gpu), server.state->gpus[gpu].name);
	server.destroyed[gpu] = true;
	server.active_again_ms[gpu] = sim_now_ms() + (sim_latency_observed() ? 300 : 0);
}

/* Returns how long to wait for the next reset to end, -1: none runs. */
static int end_resets(void)
{
	int wait = -1;
	for (int gpu = 0; gpu < SIM_MAX_GPUS; gpu++) {
		if (!server.active_again_ms[gpu])
			continue;
		if (sim_now_ms() < server.active_again_ms[gpu]) {
			wait = 10;
			continue;
		}
		server.active_again_ms[gpu] = 0;
		server.faulty[gpu] = false;
	}
	report_status();
	return wait;
}

static void recreate_contexts(void)
{
	for (int gpu = 0; gpu < SIM_MAX_GPUS; gpu++)
		if (server.destroyed[gpu]) {
			SAY("Creating server context on device %d (%s)", ordinal_of(gpu), server.state->gpus[gpu].name);
			server.destroyed[gpu] = false;
		}
}

static void forget(struct connection *gone)
{
	for (int i = 0; i < server.count; i++)
		if (server.connections[i] == gone) {
			server.count--;
			memmove(&server.connections[i], &server.connections[i + 1],
				(size_t)(server.count - i) * sizeof *server.connections);
			break;
		}
	close(gone->fd);
	free(gone);
}

/* A client died in an endless kernel, of whatever signal: who else is on its GPU pays at once (O47), otherwise whoever
 * comes there next (O46). */
static void suffer_killed_kernel(int gpu, int pid)
{
	for (int i = 0; i < server.count; i++) {
		const struct connection *one = server.connections[i];
		if (one->context_id > 0 && one->gpu == gpu && one->pid != pid) {
			fault_gpu(gpu, one, CUDA_ILLEGAL_ADDRESS); /* the log has it as that one's own (O100) */
			return;
		}
	}
	server.poisoned[gpu] = true;
}

static void close_connection(struct connection *gone)
{
	int gpu = gone->gpu, id = gone->context_id, pid = gone->pid;
	SAY("Server failed to recevie command with status 806, assuming client {PID: %d, Context ID: %d} exit", pid, id);
	bool killed_kernel = gone->spinning && !gone->terminated && !gone->victim; /* terminated first: no harm (O48) */
	forget(gone);
	if (id > 0) {
		SAY("Client {PID: %d, Context ID: %d} exiting. Number of active client contexts is %d.", pid, id,
		    active_contexts(gpu));
		if (killed_kernel)
			suffer_killed_kernel(gpu, pid);
		begin_reset(gpu);
		end_resets();
	} else {
		SAY("Client process %d disconnected", pid);
	}
	if (server.count > 0)
		return;
	if (server.daemon_gone)
		_exit(0);
	tell_daemon(SERVER_IDLE, 0, 0);
}

/* How many contexts a GPU of this server takes (O42), by card, driver and what the client asks for (M5). */
static int most_contexts(const struct wire_client *client)
{
	if (server.state->gpus[client->gpu].compute_capability < 70)
		return 16;
	bool few_connections = client->connections == 1 || client->connections == 2;
	int most = server.state->cuda_version >= 13010 && few_connections ? 60 : 48, parts = server.state->gpus[client->gpu].parts;
	return parts ? most * parts / SIM_MIG_PARTS : most; /* "lowered proportionally" (NVIDIA's MIG guide) */
}

/* Whether a new connection is let in; a CUDA error otherwise. */
static int admit(const struct wire_client *client)
{
	int gpu = client->gpu;
	if (server.in_fault)
		return CUDA_SERVER_NOT_READY;
	if (gpu >= 0 && ordinal_of(gpu) < 0)
		return 101;
	if (gpu >= 0 && active_contexts(gpu) >= most_contexts(client))
		return CUDA_MAX_CLIENTS_REACHED;
	return server.count < MAX_CONNECTIONS ? 0 : CUDA_MAX_CLIENTS_REACHED;
}

static void greet(int fd, int status, int context_id)
{
	struct wire_welcome welcome = server.values;
	welcome.status = status;
	welcome.server_pid = getpid();
	welcome.context_id = context_id;
	welcome.sequence = context_id > 0 ? ++server.sequence : 0;
	wire_send(fd, WIRE_WELCOME, &welcome, sizeof welcome, false);
}

static int next_context_id(int pid)
{
	struct connection *init = attached(pid);
	return init ? ++init->next_context_id : 1;
}

static void say_connected(int pid, int context_id, int gpu)
{
	SAY("Client {PID: %d, Context ID: %d} connected", pid, context_id);
	SAY("Creating worker thread for client {PID: %d, Context ID: %d}", pid, context_id);
	if (context_id > 0)
		SAY("Device %s (uuid %s) is associated", server.state->gpus[gpu].name, server.state->gpus[gpu].uuid);
}

static void refuse_client(int fd, int pid, int context_id, const struct wire_client *client, int status)
{
	if (status == CUDA_MAX_CLIENTS_REACHED && client->gpu >= 0) { /* it says how many, and not whom (O63) */
		say_connected(pid, context_id, client->gpu);
		SAY("Failed to accept new client. Maximum number of clients (%d) reached.", most_contexts(client));
	} else {
		if (status == CUDA_SERVER_NOT_READY)
			SAY("Server teardown in progress. Refusing to accept new client {PID: %d, Context ID: %d}", pid,
			    context_id);
		SAY("Failed to accept client {PID: %d, Context ID: %d} with status %d", pid, context_id, status);
	}
	greet(fd, status, 0);
	close(fd);
}

static void add_client(const struct server_message *message, int fd)
{
	int gpu = message->client.gpu, pid = message->pid;
	SAY("Received new client request for {PID: %d, Context ID: %d}", server.last_pid, server.last_context_id);
	int id = gpu >= 0 ? next_context_id(pid) : 0;
	server.last_pid = pid; /* the real log, too, names the client before */
	server.last_context_id = id;
	int status = admit(&message->client);
	struct connection *fresh = status ? NULL : calloc(1, sizeof *fresh);
	if (!fresh) {
		refuse_client(fd, pid, id, &message->client, status ? status : 2);
		return;
	}
	recreate_contexts();
	*fresh = (struct connection){.fd = fd, .pid = pid, .context_id = id, .gpu = gpu};
	server.connections[server.count++] = fresh;
	say_connected(pid, id, gpu);
	if (id > 0)
		SAY("Status of client {PID: %d, Context ID: %d} is ACTIVE", pid, id);
	if (id > 0 && server.poisoned[gpu]) {
		server.poisoned[gpu] = false;
		server.faulty[gpu] = true;
		report_status();
		greet(fd, CUDA_LAUNCH_FAILED, id);
		fault_gpu(gpu, fresh, CUDA_LAUNCH_FAILED);
		return;
	}
	greet(fd, 0, id);
}

static void terminate_client(int pid)
{
	int found = 0;
	for (int i = 0; i < server.count; i++) {
		struct connection *one = server.connections[i];
		if (one->pid != pid)
			continue;
		found++;
		one->terminated = true;
		if (one->context_id > 0)
			SAY("MPS server requesting client {PID: %d, Context ID: %d} to exit", pid, one->context_id);
		wire_send_number(one->fd, WIRE_ERROR, CUDA_CLIENT_TERMINATED);
	}
	if (found)
		SAY("Client termination succeeded.");
	tell_daemon(SERVER_TERMINATED, pid, found ? 0 : 1);
}

static void shut_down(void)
{
	SAY("Server has been notified to shutdown");
	if (server.count > 0) {
		SAY("Server was unable to shutdown due to %d active clients", server.count);
		tell_daemon(SERVER_BUSY, 0, server.count);
		return;
	}
	SAY("Waiting for current clients to finish");
	SAY("Exiting");
	sim_latency(65 + 45 * (server.values.gpu_count - 1));
	_exit(0);
}

static void set_values(const struct wire_welcome *values)
{
	server.values.percentage = values->percentage;
	memcpy(server.values.limit_bytes, values->limit_bytes, sizeof values->limit_bytes);
}

static void obey_daemon(void)
{
	struct server_message message = {0};
	int fd, got;
	while ((got = server_message_receive(SERVER_CHANNEL_FD, &message, &fd)) == 1) {
		switch (message.type) {
		case SERVER_CLIENT:
			if (fd >= 0)
				add_client(&message, fd);
			continue;
		case SERVER_VALUES:
			set_values(&message.values);
			break;
		case SERVER_TERMINATE:
			terminate_client(message.pid);
			break;
		case SERVER_SHUTDOWN:
			shut_down();
			break;
		case SERVER_FORCE:
			_exit(0);
		default:
			break;
		}
		if (fd >= 0)
			close(fd);
	}
	if (got == 0)
		return;
	server.daemon_gone = true;
	if (server.count == 0 || !sim_fault_is("server.alone", "stay"))
		_exit(0); /* at once, and without a word (O65) */
}

static void hear_client(struct connection *from)
{
	struct wire_frame frame;
	int32_t kind = 0;
	int got = 0;
	for (int turn = 0; turn < 16; turn++) { /* one that floods takes turns with the others */
		got = wire_read(from->fd, &from->reader, &frame);
		if (got != 1)
			break;
		if (frame.length == sizeof kind)
			memcpy(&kind, frame.payload, sizeof kind);
		if (from->context_id == 0)
			continue;
		if (frame.type == WIRE_SPIN)
			from->spinning = true;
		else if (frame.type == WIRE_FAULT && !server.faulty[from->gpu])
			fault_gpu(from->gpu, kind == SIM_FAULT_TRAP ? NULL : from,
				  kind == SIM_FAULT_TRAP ? CUDA_LAUNCH_FAILED : CUDA_ILLEGAL_ADDRESS);
	}
	if (got < 0)
		close_connection(from);
}

static volatile sig_atomic_t sigterm_came;
static sigset_t no_signals; /* SIGTERM is let in only where nothing is half done */

static void on_sigterm(int signal_number)
{
	sigterm_came = signal_number;
}

static void obey_sigterm(void)
{
	if (!sigterm_came)
		return;
	sigterm_came = 0;
	if (sim_fault_is("server.sigterm", "ignore"))
		return;
	signal(SIGTERM, SIG_DFL);
	raise(SIGTERM);
	sigprocmask(SIG_SETMASK, &no_signals, NULL);
}

static void hold_sigterm(void)
{
	struct sigaction action = {.sa_handler = on_sigterm};
	sigset_t held;
	sigemptyset(&no_signals);
	sigemptyset(&held);
	sigaddset(&held, SIGTERM);
	sigprocmask(SIG_SETMASK, &held, NULL);
	sigaction(SIGTERM, &action, NULL);
}

static void serve(void)
{
	for (;;) {
		struct pollfd polled[MAX_CONNECTIONS + 1];
		int count = server.count; /* grows and shrinks below */
		polled[0] = (struct pollfd){.fd = server.daemon_gone ? -1 : SERVER_CHANNEL_FD, .events = POLLIN};
		for (int i = 0; i < count; i++)
			polled[i + 1] = (struct pollfd){.fd = server.connections[i]->fd, .events = POLLIN};
		int wait = end_resets();
		struct timespec soon = {.tv_nsec = wait * 1000000};
		if (ppoll(polled, (nfds_t)count + 1, wait < 0 ? NULL : &soon, &no_signals) < 0) {
			obey_sigterm();
			continue;
		}
		/* Clients first and from the end, so that those that left are gone when the daemon asks. */
		for (int i = count; i-- > 0;)
			if (polled[i + 1].revents && i < server.count)
				hear_client(server.connections[i]);
		if (polled[0].revents)
			obey_daemon();
	}
}

static bool take_gpus(void)
{
	for (int i = 0; i < server.values.gpu_count; i++) {
		int gpu = server.values.gpus[i], slot;
		struct sim_context mine = {.kind = SIM_SERVER,
					   .pid = getpid(),
					   .started = sim_process_started(getpid()),
					   .gpu = gpu,
					   .bytes = SIM_SERVER_CONTEXT_MIB * SIM_MIB};
		SAY("Creating server context on device %d (%s)", i, server.state->gpus[gpu].name);
		sim_lock(server.state);
		int error = sim_context_add(server.state, &mine, &slot);
		sim_unlock(server.state);
		if (error) {
			SAY("Failed to create server context on device %d with status %d", i, error);
			return false;
		}
	}
	return true;
}

static bool receive_config(uid_t *uid)
{
	struct server_message message = {0};
	struct pollfd channel = {.fd = SERVER_CHANNEL_FD, .events = POLLIN};
	int fd;
	while (poll(&channel, 1, -1) < 0 && errno == EINTR)
		continue;
	if (server_message_receive(SERVER_CHANNEL_FD, &message, &fd) != 1 || message.type != SERVER_CONFIG)
		return false;
	if (message.values.gpu_count < 0 || message.values.gpu_count > SIM_MAX_GPUS)
		return false;
	server.values = message.values;
	*uid = (uid_t)message.uid;
	return true;
}

/* The driver brings one GPU up after the other, whichever servers they are for (O79). */
static void bring_gpus_up(void)
{
	long each = sim_fault_number("server.start", "slow:");
	int driver = open(SIM_STATE_FILE, O_RDONLY | O_CLOEXEC);
	flock(driver, LOCK_EX);
	if (each >= 0)
		sim_sleep(each * server.values.gpu_count);
	else /* never there before start_server has returned, as on the real card (O26) */
		sim_sleep(sim_latency_observed() ? 150 + 170 * (server.values.gpu_count - 1) : 3);
	close(driver);
}

static void start(void)
{
	uid_t uid;
	char told[SIM_FAULT_SIZE];
	struct sockaddr_un address;
	wire_address(&address, wire_pipe_directory(), "control");
	mps_log(SERVER_LOG_FD, "Other", "Startup");
	mps_log(SERVER_LOG_FD, "Other", "Connecting to control daemon on socket: %s", address.sun_path);
	mps_log(SERVER_LOG_FD, "Other", "Initializing server process");
	if (!receive_config(&uid))
		_exit(1);
	bool fault = sim_fault("server.start", told);
	if (fault && strcmp(told, "fail") == 0)
		_exit(1);
	while (fault && strcmp(told, "hang") == 0) {
		sigsuspend(&no_signals);
		obey_sigterm();
	}
	bring_gpus_up();
	server.state = sim_open();
	if (!server.state || !take_gpus())
		_exit(1);
	SAY("Created anonymous shared memory region mps.shm.%d.%d", (int)uid, (int)getpid());
	SAY("CUDA MPS Server for Linux/Unix. Binary version: %d", server.state->cuda_version);
	SAY("Display Driver version: %d", (int)server.state->driver);
	SAY("Active Threads Percentage set to %.1f", server.values.percentage);
	for (int i = 0; i < server.values.gpu_count; i++)
		if (server.values.limit_bytes[i])
			SAY("Device pinned memory limit for device %d set to 0x%llx bytes", i,
			    (unsigned long long)server.values.limit_bytes[i]);
	SAY("Server Priority set to 0");
	SAY("Server has started");
	tell_daemon(SERVER_READY, 0, 0);
}

int main(void)
{
	int type = 0;
	socklen_t size = sizeof type;
	if (getsockopt(SERVER_CHANNEL_FD, SOL_SOCKET, SO_TYPE, &type, &size) != 0 || type != SOCK_SEQPACKET) {
		fprintf(stderr, "nvidia-cuda-mps-server is started by nvidia-cuda-mps-control\n");
		return 1;
	}
	fcntl(SERVER_CHANNEL_FD, F_SETFD, FD_CLOEXEC);
	signal(SIGPIPE, SIG_IGN);
	hold_sigterm();
	start();
	serve();
}
