#include "health.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "gpus.h"
#include "helper.h"
#include "jobdir.h"

#define MARK "suspect"
#define MARK_SIZE (sizeof(MARK) + 12)
#define PROBE_SECONDS 4
#define TAKES_NOBODY 3 /* of the server, in slurm_mps/task/probe.py */

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

void health_clear(uint32_t job_id, const struct verdict *verdict, const struct health *health)
{
	struct timespec now;
	char name[MARK_SIZE];

	for (unsigned int gpu = 0; gpu < verdict->gpu_count; gpu++) {
		const struct timespec *then = &health->since[gpu];
		bool good = health->probed[gpu] && health->of[gpu] == HEALTH_GOOD;
		int directory = good ? open_marks(job_id, verdict, gpu) : -1;

		if (directory < 0)
			continue;
		mark_name(name, sizeof(name), verdict, gpu);
		if (jobdir_read_mark(directory, name, &now) && now.tv_sec == then->tv_sec && now.tv_nsec == then->tv_nsec)
			(void)unlinkat(directory, name, 0);
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

static void probe(const struct verdict *verdict, struct health *health)
{
	static struct task_gpus gpus[GPUS_MAX];
	pid_t probes[GPUS_MAX];
	/* The driver brings the GPUs of all servers up one after the other, 0.4 to 0.5 s each (O79). */
	int seconds = PROBE_SECONDS + (int)verdict->gpu_count / 2, tries_left = (seconds + 1) * 1000 / HELPER_PAUSE_MS;

	for (unsigned int i = 0; i < verdict->daemon_count; i++) {
		gpus_of_daemon(verdict, i, health, &gpus[i]);
		probes[i] = gpus[i].count ? start_probe(verdict, &verdict->daemons[i], &gpus[i], seconds) : 0;
	}
	for (unsigned int i = 0; i < verdict->daemon_count; i++) {
		int status = gpus[i].count ? helper_end(probes[i], &tries_left) : 0;

		for (unsigned int j = 0; j < gpus[i].count; j++)
			health->of[gpus[i].gpus[j] - verdict->gpus] = health_by(status);
	}
}

void health_look(uint32_t job_id, const struct verdict *verdict, struct health *health)
{
	bool any = false;

	memset(health, 0, sizeof(*health));
	for (unsigned int gpu = 0; gpu < verdict->gpu_count; gpu++) {
		health->probed[gpu] = read_mark(job_id, verdict, gpu, &health->since[gpu]) &&
				      device_may_open(&verdict->gpus[gpu]);
		any |= health->probed[gpu];
	}
	if (any)
		probe(verdict, health);
}
