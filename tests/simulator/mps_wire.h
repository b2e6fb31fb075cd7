/* What the simulated MPS parts say to each other. NVIDIA's protocol is private; this is our own.
 *
 * On the `control` socket (SOCK_SEQPACKET, as NVIDIA's is: O39): one frame a packet. A client's connection is handed on to the server by the daemon, so that
 * a client talks to its server directly and sees its death as an end of file.
 * Between daemon and server: a SOCK_SEQPACKET pair, one struct server_message a packet. */
#ifndef MPS_WIRE_H
#define MPS_WIRE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/un.h>

#include "sim_state.h"

enum {
	WIRE_MAGIC = 0x4d505331,
	WIRE_MAX_REQUEST = 4096,  /* what a peer may send to the daemon or server */
	WIRE_MAX_ANSWER = 262144, /* what the daemon may answer */
	SERVER_CHANNEL_FD = 3,    /* where a server finds its end of the pair */
	SERVER_LOG_FD = 4,        /* and the daemon's `log` fifo */
};

enum wire_type {
	WIRE_UI = 1,  /* UI to daemon: no payload */
	WIRE_COMMAND, /* UI to daemon: a line */
	WIRE_ANSWER,  /* daemon to UI: text */
	WIRE_EXIT,    /* daemon to UI: int32, exit with this */
	WIRE_CLIENT,  /* client to daemon: struct wire_client */
	WIRE_WELCOME, /* server or daemon to client: struct wire_welcome */
	WIRE_ERROR,   /* server to client: int32, a CUDA error that stays */
	WIRE_FAULT,   /* client to server: int32, enum sim_fault_kind */
	WIRE_SPIN,    /* client to server: an endless kernel runs */
};

struct wire_header {
	uint32_t magic, type, length;
};

struct wire_client {
	int32_t gpu;         /* a context on this GPU; -1: cuInit */
	int32_t connections; /* its CUDA_DEVICE_MAX_CONNECTIONS; 0: not set */
};

struct wire_welcome {
	int32_t status; /* a CUDA error */
	int32_t server_pid;
	int32_t context_id, sequence;
	int32_t gpu_count;
	int32_t gpus[SIM_MAX_GPUS]; /* in PCI order (O19) */
	double percentage;
	uint64_t limit_bytes[SIM_MAX_GPUS]; /* by the client's ordinal, 0: none (O13) */
};

struct wire_frame {
	uint32_t type, length;
	const unsigned char *payload; /* a NUL follows */
};

struct wire_reader {
	unsigned char bytes[sizeof(struct wire_header) + WIRE_MAX_REQUEST + 1];
};

/* Fill *address with <pipe directory>/<name>; false when it does not fit. */
bool wire_address(struct sockaddr_un *address, const char *directory, const char *name);
const char *wire_pipe_directory(void);
/* Connect to the control daemon; -1 when it cannot be reached for whatever reason. */
int wire_connect(void);
/* Send a whole frame. Never raises SIGPIPE; with wait false, never blocks. */
bool wire_send(int fd, uint32_t type, const void *payload, uint32_t length, bool wait);
/* The same for one number; never blocks. */
bool wire_send_number(int fd, uint32_t type, int32_t number);
/* Block for one frame of at most size bytes. Returns its length, or -1 on an end or on nonsense. */
ssize_t wire_receive(int fd, uint32_t *type, void *payload, uint32_t size);
/* Take the next packet without waiting. 1: *frame holds one, 0: not yet, -1: closed or nonsense. */
int wire_read(int fd, struct wire_reader *reader, struct wire_frame *frame);

enum server_message_type {
	SERVER_CONFIG = 1,  /* to the server, first: welcome holds devices and limits, uid */
	SERVER_VALUES,      /* to the server: percentage and limits as now set */
	SERVER_CLIENT,      /* to the server: a client's connection rides along */
	SERVER_SHUTDOWN,    /* to the server: leave if idle */
	SERVER_FORCE,       /* to the server: leave */
	SERVER_TERMINATE,   /* to the server: pid's contexts; answered with SERVER_TERMINATED */
	SERVER_READY,       /* to the daemon */
	SERVER_STATUS,      /* to the daemon: number 0 ACTIVE, 1 FAULT */
	SERVER_BUSY,        /* to the daemon: number of worker threads; it stays */
	SERVER_IDLE,        /* to the daemon: the last client left */
	SERVER_TERMINATED,  /* to the daemon: pid, number 0 or an error */
};

struct server_message {
	int32_t type, pid, uid, number;
	struct wire_client client;
	struct wire_welcome values;
};

/* fd -1: none rides along. False when it could not be sent. */
bool server_message_send(int channel, const struct server_message *message, int fd);
/* 1: got one (*fd is -1 or the connection), 0: none now, -1: the other side is gone. */
int server_message_receive(int channel, struct server_message *message, int *fd);

#endif
