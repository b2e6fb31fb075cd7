/* The control daemon's parts: the loop (mps_daemon.c), its one server (mps_supervise.c), its commands. */
#ifndef MPS_DAEMON_H
#define MPS_DAEMON_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "mps_log.h"
#include "mps_wire.h"
#include "sim_units.h"

enum {
	MAX_CONNECTIONS = 1024,
	MAX_LIMITS = 64,
	MAX_KEY = 64,
	SILENCE_MS = 10000, /* a connection that has not said who it is by then is closed */
	START_ATTEMPTS = 3, /* O22's log shows the daemon try again at once */
};

enum connection_kind { PEER_UNKNOWN, PEER_UI, PEER_CLIENT };

/* Why a UI or a client still has no answer. */
enum waiting {
	WAIT_NOTHING,
	WAIT_CLOCK,     /* command.x=slow: run it at wake_ms */
	WAIT_FOREVER,   /* command.x=hang */
	WAIT_STATUS,    /* get_server_status: until the server has started */
	WAIT_TERMINATE, /* terminate_client: until the server has done it */
	WAIT_QUIT,
	WAIT_SERVER, /* a client in the pending list */
};

struct connection {
	int fd;
	enum connection_kind kind;
	enum waiting waiting;
	pid_t pid; /* from the kernel, not from the peer */
	uid_t uid;
	uint64_t since_ms, wake_ms;
	pid_t server; /* the one waited for */
	struct wire_client request;
	char command[WIRE_MAX_REQUEST + 1];
	struct wire_reader reader;
};

struct limit {
	char device[MAX_KEY]; /* as written: an ordinal and a UUID are two keys */
	uint64_t bytes;
};

struct limits {
	int count;
	struct limit list[MAX_LIMITS];
};

enum server_state { SERVER_NONE, SERVER_STARTING, SERVER_ACTIVE, SERVER_LEAVING };

struct server {
	enum server_state state;
	bool fault; /* a victim of a fatal GPU error is still there (O34) */
	pid_t pid;
	uid_t uid;
	int channel;
	double percentage;
	struct limits limits;
	uint64_t retry_ms, kill_ms; /* 0: not set */
	int backoff_ms;
	bool backs_off; /* the last try to shut down was one of the retries that come ever later */
};

struct daemon {
	struct sim_state *state;
	struct units_gpus gpus;     /* as CUDA_VISIBLE_DEVICES orders them: what device_query shows */
	struct units_gpus pci_gpus; /* as clients see them (O19) */
	char directory[sizeof((struct sockaddr_un){0}.sun_path)];
	int control, privileged, lock, fifo_in, fifo_out, control_log, server_log;
	bool multiuser, foreground;
	int driver; /* the branch that it was started of, also after an upgrade */
	double percentage;
	int priority;
	bool limits_ever_set;
	struct limits limits;
	struct server server;
	int failed_starts;
	bool wants_server; /* for wanted_uid: a client waits, or start_server was asked */
	uid_t wanted_uid;
	bool quitting;
	uint64_t force_ms; /* quit -t; 0: never */
	int exit_status;
	struct connection *connections[MAX_CONNECTIONS];
	int count;
};

#define SAY(daemon, ...) mps_log((daemon)->control_log, "Control", __VA_ARGS__)

/* mps_daemon.c: start and serve; returns only on errors of start, with the exit status. */
int daemon_run(bool foreground, bool multiuser);
void daemon_answer(struct daemon *daemon, struct connection *ui, const char *text);
void daemon_exit(struct daemon *daemon);

/* mps_commands.c */
void command_receive(struct daemon *daemon, struct connection *ui, const char *line);
/* Go on with what waits, now that the clock or the server has moved. */
void command_wake(struct daemon *daemon, struct connection *ui);
void command_terminated(struct daemon *daemon, int error);

/* mps_supervise.c */
void supervise_client(struct daemon *daemon, struct connection *client);
void supervise_want(struct daemon *daemon, uid_t uid);
/* Have the server leave if it is idle; one with clients stays. */
void supervise_shut_down(struct daemon *daemon);
/* Do what is due: start, replace, shut down, force. */
void supervise_step(struct daemon *daemon);
void supervise_hear(struct daemon *daemon);
void supervise_reap(struct daemon *daemon);
void supervise_values(struct daemon *daemon);
bool supervise_runs(const struct daemon *daemon, pid_t pid);

#endif
