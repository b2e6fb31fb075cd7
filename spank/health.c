#include "health.h"

#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gpus.h"
#include "helper.h"
#include "jobdir.h"

#define MARK "suspect"
#define MARK_SIZE (sizeof(MARK) + 12)
#define PROBE_SECONDS 4
#define TAKES_NOBODY 3 /* of the server, in slurm_mps/task/probe.py */
#define TRIES_OF(seconds) ((int)((seconds) * 1000 / HELPER_PAUSE_MS))
#define STOP_TRIES TRIES_OF(0.3) /* as long as a probe of a good server takes */

/* Of each control daemon's probe; shared with the processes that wait for them and with the tasks. */
struct probes {
	bool begun[GPUS_MAX];
	atomic_int found[GPUS_MAX]; /* enum server_health */
	atomic_int tries_left[GPUS_MAX];
	struct timespec ended[GPUS_MAX];
};

static const char *joined_directory_of(const struct verdict *verdict, unsigned int gpu)
{
	return verdict_daemon_of(verdict, &verdict->gpus[gpu])->joined_directory;
}

/* Beside a daemon that serves other jobs, too, all of them have one name for it. */
static void mark_name(char *name, size_t size, const struct verdict *verdict, unsigned int gpu)
{
	(void)snprintf(name, size, MARK "-%u", *joined_directory_of(verdict, gpu) ? 0 : gpu);
}

/* Where a GPU's mark is: beside a daemon that serves other jobs, too, or in the job's directory. */
static int open_marks(uint32_t job_id, const struct verdict *verdict, unsigned int gpu)
{
	const char *joined = joined_directory_of(verdict, gpu);

	return *joined ? open(joined, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC) : jobdir_open(job_id);
}

static bool read_mark(uint32_t job_id, const struct verdict *verdict, unsigned int gpu, struct timespec *when)
{
	int directory = open_marks(job_id, verdict, gpu);
	char name[MARK_SIZE];
	bool marked;

	if (directory < 0)
		return false;
	mark_name(name, sizeof(name), verdict, gpu);
	marked = jobdir_read_mark(directory, name, when);
	(void)close(directory);
	return marked;
}

void health_mark(uint32_t job_id, const struct verdict *verdict)
{
	char name[MARK_SIZE];

	for (unsigned int gpu = 0; gpu < verdict->gpu_count; gpu++) {
		int directory = device_may_open(&verdict->gpus[gpu]) ? open_marks(job_id, verdict, gpu) : -1;

		if (directory < 0)
			continue; /* another's GPU, or the epilog was faster */
		mark_name(name, sizeof(name), verdict, gpu);
		jobdir_write_mark(directory, name);
		(void)close(directory);
	}
}

/* Start the probe of one control daemon's GPUs, which tries for so many seconds. */
static pid_t start_probe(const struct verdict *verdict, const struct verdict_daemon *daemon,
			 const struct task_gpus *gpus, int seconds)
{
	static char visible_variable[GPUS_MAX * sizeof(gpus->gpus[0]->uuid) + 32];
	static char pipe_variable[VERDICT_PATH_MAX + 32], log_variable[VERDICT_PATH_MAX + 32], time[12];
	char *const argv[] = { (char *)(uintptr_t)verdict->python, "-I", "-S", (char *)(uintptr_t)verdict->probe, time, NULL };
	char *const environment[] = { "PATH=/usr/bin:/bin", pipe_variable, log_variable, visible_variable, NULL };
	int length = snprintf(visible_variable, sizeof(visible_variable), "CUDA_VISIBLE_DEVICES=");

	task_gpus_list(gpus, false, visible_variable + length, sizeof(visible_variable) - (size_t)length);
	(void)snprintf(pipe_variable, sizeof(pipe_variable), "CUDA_MPS_PIPE_DIRECTORY=%s", daemon->pipe_directory);
	(void)snprintf(log_variable, sizeof(log_variable), "CUDA_MPS_LOG_DIRECTORY=%s", daemon->log_directory);
	(void)snprintf(time, sizeof(time), "%d", seconds);
	return helper_start(geteuid(), argv, environment, -1);
}

/* The noted GPUs of one control daemon. */
static void gpus_of_daemon(const struct verdict *verdict, unsigned int daemon, const struct health *health,
			   struct task_gpus *gpus)
{
	gpus->count = 0;
	for (unsigned int gpu = 0; gpu < verdict->gpu_count; gpu++)
		if (health->probed[gpu] && verdict_daemon_of(verdict, &verdict->gpus[gpu]) == &verdict->daemons[daemon])
			gpus->gpus[gpus->count++] = &verdict->gpus[gpu];
}

/* What the probe's end says of the server; HELPER_LATE: it hangs in the driver, as the server's clients would. */
static enum server_health health_by(int status)
{
	switch (status) {
	case 0:
		return HEALTH_GOOD;
	case TAKES_NOBODY:
	case HELPER_LATE:
		return HEALTH_REFUSES;
	case HELPER_DIED:
		return HEALTH_SILENT;
	default:
		return HEALTH_UNTRIED;
	}
}

/* A control daemon's probe. */
struct one_probe {
	uint32_t job_id;
	const struct verdict *verdict;
	const struct health *health;
	unsigned int daemon;
	struct task_gpus gpus;
};

/* Take a GPU's mark away, as root, unless it was renewed since it was read. */
static void clear_mark(const struct one_probe *one, unsigned int gpu)
{
	const struct timespec *then = &one->health->since[gpu];
	int directory = open_marks(one->job_id, one->verdict, gpu);
	char name[MARK_SIZE];
	struct timespec now;

	if (directory < 0)
		return;
	mark_name(name, sizeof(name), one->verdict, gpu);
	if (jobdir_read_mark(directory, name, &now) && now.tv_sec == then->tv_sec && now.tv_nsec == then->tv_nsec)
		(void)unlinkat(directory, name, 0);
	(void)close(directory);
}

/* What was found out about the server; where it is good, the marks of its GPUs go. */
static void conclude(const struct one_probe *one, int status)
{
	struct probes *probes = one->health->probes;

	if (health_by(status) == HEALTH_GOOD && !seteuid(0))
		for (unsigned int i = 0; i < one->gpus.count; i++)
			clear_mark(one, (unsigned int)(one->gpus.gpus[i] - one->verdict->gpus));
	(void)clock_gettime(CLOCK_REALTIME, &probes->ended[one->daemon]);
	atomic_store(&probes->found[one->daemon], (int)health_by(status));
}

/* The driver brings the GPUs of all servers up one after the other, 0.4 to 0.5 s each (O79). */
static int seconds_of_probe(const struct verdict *verdict)
{
	return PROBE_SECONDS + (int)verdict->gpu_count / 2;
}

/* In a process beside slurmstepd, which waits for one probe: the tasks of the other daemons' GPUs need not. */
static void probe(const void *argument)
{
	const struct one_probe *one = argument;

	conclude(one, helper_end(start_probe(one->verdict, &one->verdict->daemons[one->daemon], &one->gpus,
					       seconds_of_probe(one->verdict)),
				   &one->health->probes->tries_left[one->daemon]));
}

static void begin(uint32_t job_id, const struct verdict *verdict, const struct health *health, unsigned int daemon)
{
	static struct one_probe one;

	one = (struct one_probe){ .job_id = job_id, .verdict = verdict, .health = health, .daemon = daemon };
	gpus_of_daemon(verdict, daemon, health, &one.gpus);
	if (!one.gpus.count)
		return;
	health->probes->begun[daemon] = true;
	atomic_store(&health->probes->tries_left[daemon], TRIES_OF(seconds_of_probe(verdict) + 1));
	if (!helper_beside(probe, &one))
		conclude(&one, HELPER_DIED);
}

static bool any_probed(const struct health *health)
{
	for (unsigned int gpu = 0; gpu < GPUS_MAX; gpu++)
		if (health->probed[gpu])
			return true;
	return false;
}

void health_try(uint32_t job_id, const struct verdict *verdict, struct health *health)
{
	void *memory;

	memset(health, 0, sizeof(*health));
	for (unsigned int gpu = 0; gpu < verdict->gpu_count; gpu++)
		health->probed[gpu] = read_mark(job_id, verdict, gpu, &health->since[gpu]) &&
				      device_may_open(&verdict->gpus[gpu]);
	if (!any_probed(health))
		return;
	memory = mmap(NULL, sizeof(*health->probes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return;
	health->probes = memory; /* the kernel gives it zeroed: nothing is known */
	for (unsigned int i = 0; i < verdict->daemon_count; i++)
		begin(job_id, verdict, health, i);
}

static enum server_health found_of(const struct health *health, unsigned int daemon)
{
	return (enum server_health)atomic_load(&health->probes->found[daemon]);
}

enum server_health health_wait(const struct verdict *verdict, const struct health *health, unsigned int gpu)
{
	unsigned int daemon = (unsigned int)(verdict_daemon_of(verdict, &verdict->gpus[gpu]) - verdict->daemons);

	if (!health->probes)
		return health->probed[gpu] ? HEALTH_SILENT : HEALTH_GOOD;
	if (!health->probes->begun[daemon])
		return HEALTH_GOOD;
	for (int tries = TRIES_OF(seconds_of_probe(verdict) + 2); tries; tries--) {
		if (found_of(health, daemon) != HEALTH_UNKNOWN)
			return health->probed[gpu] ? found_of(health, daemon) : HEALTH_GOOD;
		(void)poll(NULL, 0, HELPER_PAUSE_MS);
	}
	return HEALTH_SILENT;
}

bool health_probed_until(const struct health *health, unsigned int daemon, struct timespec *when)
{
	if (!health->probes || !health->probes->begun[daemon])
		return false;
	if (found_of(health, daemon) == HEALTH_UNKNOWN)
		(void)clock_gettime(CLOCK_REALTIME, when);
	else
		*when = health->probes->ended[daemon];
	return true;
}

void health_stop(const struct health *health)
{
	unsigned int daemon = 0;

	if (!health->probes)
		return;
	for (unsigned int i = 0; i < GPUS_MAX; i++)
		atomic_store(&health->probes->tries_left[i], STOP_TRIES);
	for (int tries = 2 * STOP_TRIES; daemon < GPUS_MAX && tries; tries--) {
		while (daemon < GPUS_MAX && (!health->probes->begun[daemon] || found_of(health, daemon) != HEALTH_UNKNOWN))
			daemon++;
		if (daemon < GPUS_MAX)
			(void)poll(NULL, 0, HELPER_PAUSE_MS);
	}
}
