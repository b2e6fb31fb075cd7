/*
 * What the prolog decided about this job on this node, as it left it in /run/slurm-mps/jobs/<job>/verdict, or, where
 * the node could keep nothing of the job there, in /var/log/slurm-mps/<job>/verdict.
 * Only root can write there; the job's user can read (the directory's ACL).
 */
#ifndef SLURM_MPS_VERDICT_H
#define SLURM_MPS_VERDICT_H

#include <stdbool.h>
#include <stdint.h>

#include "options.h"

#ifndef STATE_DIRECTORY
#define STATE_DIRECTORY "/run/slurm-mps"
#endif

/* The newest version that is read here, as slurm_mps/job/verdict.py writes it (docs/decisions/0018). */
#define VERDICT_VERSION 1

#define VERDICT_MESSAGE_MAX 512
#define VERDICT_PATH_MAX 104 /* a pipe directory whose socket fits sun_path */
#define VERDICT_PROGRAM_MAX 256

/* How the tasks of a job that is refused end; the prolog gives other statuses for other reasons (job/verdict.py). */
#define EXIT_REFUSED 80
#define EXIT_NO_GPU 81    /* the job has no GPU on this node */
#define EXIT_NO_SERVER 88 /* of a job that has MPS: its control daemon is gone, or its server takes no programs */

#define UNSAID UINT32_MAX

enum verdict_status {
	VERDICT_NONE,    /* the prolog left nothing: the job did not ask, or no prolog ran */
	VERDICT_READY,   /* the job has its control daemon */
	VERDICT_REFUSED, /* it has not, and `message` says why */
	VERDICT_WITHOUT, /* it runs without MPS, and `message` says why */
};

struct verdict_gpu {
	unsigned int slurm_index; /* what Slurm calls it in SLURM_JOB_GPUS and CUDA_VISIBLE_DEVICES */
	unsigned int minor;       /* of its device node (gpus.c) */
	uint64_t mib_for_clients; /* how much of its memory they can share out */
	uint64_t mib;             /* all of it */
	char uuid[48];
};

/* A control daemon, and what it gives each of its clients on each GPU by itself. */
struct verdict_daemon {
	char pipe_directory[VERDICT_PATH_MAX];
	char log_directory[VERDICT_PATH_MAX];
	uint64_t mib; /* 0: no limit */
	char joined_directory[VERDICT_PATH_MAX]; /* of a daemon that serves other jobs, too; empty for the job's own */
};

struct verdict {
	enum verdict_status status;
	char message[VERDICT_MESSAGE_MAX];
	char python[VERDICT_PROGRAM_MAX];
	char probe[VERDICT_PROGRAM_MAX];   /* tests whether a server takes programs */
	char explain[VERDICT_PROGRAM_MAX]; /* explains why tasks ended badly */
	unsigned int threads_tenths;     /* of a percent; what the daemon gives each client */
	unsigned int threads_tenths_min; /* what the site wants no client to be below */
	uint64_t mib_min;                /* the same of memory */
	uint64_t context_mib;            /* what a CUDA context costs with all threads; 0: not known */
	unsigned int clients_per_gpu;    /* as many contexts as a server takes on one GPU */
	int priority;                    /* of each client: 0 normal, 1 low */
	bool auto_threads, auto_memory;  /* divide by the tasks that share a GPU */
	unsigned int share_tenths;       /* how much of a GPU Slurm gave the job, as the prolog knows it; 1000: all */
	unsigned int shards_per_gpu;     /* 0: shards say nothing of it */
	bool share_memory;               /* a part of a GPU is the same part of its memory */
	bool joined;                     /* the daemon serves other jobs, too: all limits are the clients' own */
	bool ordinals;                   /* name the task's GPUs by the daemon's ordinals instead of UUIDs */
	bool unguarded;                  /* a program can run without MPS: the compute mode was left alone */
	bool per_gpu;                    /* each GPU has a daemon of its own, in the same order; else one serves all */
	unsigned int daemon_count;
	unsigned int gpu_count; /* in the order in which a daemon counts them (O19) */
	struct verdict_daemon daemons[GPUS_MAX];
	struct verdict_gpu gpus[GPUS_MAX];
	int exit_status; /* of the tasks of a job that is refused; 0: the prolog gave none */
	uint32_t uid; /* whose job it is; UNSAID where the prolog did not know */
};

/* The control daemon that serves a GPU of the verdict. */
const struct verdict_daemon *verdict_daemon_of(const struct verdict *verdict, const struct verdict_gpu *gpu);

/*
 * Read the verdict on `job_id`. A file that is there but cannot be read or understood, or that a newer slurm-mps wrote,
 * is a refusal that says so: a job is never taken for one that did not ask because its verdict was damaged.
 */
void verdict_read(uint32_t job_id, struct verdict *verdict);

/*
 * The same of a job of which nothing is in the state directory, because that is what is broken. For jobs that asked:
 * this place outlives the boot.
 */
void verdict_read_elsewhere(uint32_t job_id, struct verdict *verdict);

#endif
