/*
 * What the prolog decided about this job on this node, as it left it in /run/slurm-mps/jobs/<job>/verdict.
 * Only root can write there; the job's user can read (the directory's ACL).
 */
#ifndef SLURM_MPS_VERDICT_H
#define SLURM_MPS_VERDICT_H

#include <stdbool.h>
#include <stdint.h>

#define VERDICT_MESSAGE_MAX 512
#define VERDICT_PATH_MAX 104 /* a pipe directory whose socket fits sun_path */
#define VERDICT_GPUS_MAX 64

enum verdict_status {
	VERDICT_NONE,    /* the prolog left nothing: the job did not ask, or no prolog ran */
	VERDICT_READY,   /* the job has its control daemon */
	VERDICT_REFUSED, /* it has not, and `message` says why */
};

struct verdict_gpu {
	unsigned int slurm_index; /* what Slurm calls it in SLURM_JOB_GPUS and CUDA_VISIBLE_DEVICES */
	unsigned int minor;       /* its device node is /dev/nvidia<minor> */
	char uuid[48];
};

struct verdict {
	enum verdict_status status;
	char message[VERDICT_MESSAGE_MAX];
	char pipe_directory[VERDICT_PATH_MAX];
	char log_directory[VERDICT_PATH_MAX];
	char thread_percentage[8];  /* as CUDA_MPS_ACTIVE_THREAD_PERCENTAGE takes it */
	char memory_limit[24];      /* for every device, such as 8192M; empty: no limit */
	uint64_t context_mib;       /* what a CUDA context costs with all threads; 0: not known */
	int priority;               /* of each client: 0 normal, 1 low */
	bool ordinals;              /* name the task's GPUs by the daemon's ordinals instead of UUIDs */
	unsigned int gpu_count;     /* in the daemon's order: index here == the daemon's device ordinal */
	struct verdict_gpu gpus[VERDICT_GPUS_MAX];
};

/*
 * Read the verdict on `job_id`. A file that is there but cannot be read or understood is a refusal that says so:
 * a job is never taken for one that did not ask because its verdict was damaged.
 */
void verdict_read(uint32_t job_id, struct verdict *verdict);

/* Whether root's control daemon takes connections in the verdict's pipe directory; waits a second at most. */
bool verdict_daemon_answers(const struct verdict *verdict);

#endif
