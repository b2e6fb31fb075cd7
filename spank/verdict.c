#include "verdict.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef FALLBACK_DIRECTORY
#define FALLBACK_DIRECTORY "/var/log/slurm-mps" /* slurm_mps/job/logs.py */
#endif
#define VERDICT_SIZE_MAX 32768
#define VERDICT_HEAD "slurm-mps verdict "

static void refuse(struct verdict *verdict, const char *message)
{
	verdict->status = VERDICT_REFUSED;
	(void)snprintf(verdict->message, sizeof(verdict->message), "%s", message);
}

/* Copy a value whole, or not at all: a cut path or UUID would name something else. */
static bool take(char *out, size_t size, const char *value)
{
	size_t length = strlen(value);

	if (!length || length >= size)
		return false;
	memcpy(out, value, length + 1);
	return true;
}

/* Cut the next word off `rest`; NULL when there is none, or it is as long as `size`. */
static const char *next_word(char **rest, size_t size)
{
	char *word = strsep(rest, " ");

	return word && *word && strlen(word) < size ? word : NULL;
}

/* "<pipe directory> <log directory> <limit or ->" */
static bool take_daemon(struct verdict *verdict, char *value)
{
	struct verdict_daemon *daemon;
	const char *pipe = next_word(&value, VERDICT_PATH_MAX);
	const char *log = next_word(&value, VERDICT_PATH_MAX);
	const char *limit = next_word(&value, OPTION_MAX);

	if (verdict->daemon_count == GPUS_MAX || !pipe || !log || !limit || value)
		return false;
	daemon = &verdict->daemons[verdict->daemon_count++];
	daemon->mib = mem_mib(limit);
	return take(daemon->pipe_directory, sizeof(daemon->pipe_directory), pipe) &&
	       take(daemon->log_directory, sizeof(daemon->log_directory), log) &&
	       (daemon->mib || !strcmp(limit, "-"));
}

/* Of the first daemon that has none yet. */
static bool take_joined(struct verdict *verdict, const char *value)
{
	for (unsigned int i = 0; i < verdict->daemon_count; i++) {
		struct verdict_daemon *daemon = &verdict->daemons[i];

		if (!daemon->joined_directory[0])
			return verdict->joined = take(daemon->joined_directory, sizeof(daemon->joined_directory), value);
	}
	return false;
}

/* "<slurm index> <minor> <uuid> <MiB for clients> <MiB in all>" */
static bool take_gpu(struct verdict *verdict, const char *value)
{
	struct verdict_gpu *gpu;

	if (verdict->gpu_count == GPUS_MAX)
		return false;
	gpu = &verdict->gpus[verdict->gpu_count++];
	return sscanf(value, "%9u %9u %47s %9" SCNu64 " %9" SCNu64, &gpu->slurm_index, &gpu->minor, gpu->uuid,
		      &gpu->mib_for_clients, &gpu->mib) == 5 &&
	       gpu->mib && !strchr(gpu->uuid, ',');
}

/* "<python> <script>" */
static bool take_probe(struct verdict *verdict, char *value)
{
	const char *python = next_word(&value, VERDICT_PROGRAM_MAX);
	const char *script = next_word(&value, VERDICT_PROGRAM_MAX);

	return python && script && !value && take(verdict->python, sizeof(verdict->python), python) &&
	       take(verdict->probe, sizeof(verdict->probe), script);
}

static bool take_auto(struct verdict *verdict, const char *value)
{
	if (!strcmp(value, "threads"))
		verdict->auto_threads = true;
	else if (!strcmp(value, "memory"))
		verdict->auto_memory = true;
	else
		return false;
	return true;
}

static bool take_status(struct verdict *verdict, const char *value)
{
	if (!strcmp(value, "ready"))
		verdict->status = VERDICT_READY;
	else if (!strcmp(value, "refused"))
		verdict->status = VERDICT_REFUSED;
	else if (!strcmp(value, "without"))
		verdict->status = VERDICT_WITHOUT;
	else
		return false;
	return true;
}

/* One "key value" line; unknown keys belong to a newer prolog and are not for us. */
static bool take_line(struct verdict *verdict, char *line)
{
	char *value = strchr(line, ' ');

	if (!value)
		return false;
	*value++ = '\0';
	if (!strcmp(line, "uid"))
		return sscanf(value, "%10" SCNu32, &verdict->uid) == 1;
	if (!strcmp(line, "status"))
		return take_status(verdict, value);
	if (!strcmp(line, "message"))
		return take(verdict->message, sizeof(verdict->message), value);
	if (!strcmp(line, "daemon"))
		return take_daemon(verdict, value);
	if (!strcmp(line, "daemons")) {
		verdict->per_gpu = !strcmp(value, "per-gpu");
		return true;
	}
	if (!strcmp(line, "thread_percentage"))
		return (verdict->threads_tenths = threads_tenths(value)) != 0;
	if (!strcmp(line, "thread_percentage_min"))
		return (verdict->threads_tenths_min = threads_tenths(value)) != 0;
	if (!strcmp(line, "memory_min"))
		return (verdict->mib_min = mem_mib(value)) != 0;
	if (!strcmp(line, "context_mib"))
		return sscanf(value, "%5" SCNu64, &verdict->context_mib) == 1;
	if (!strcmp(line, "clients_per_gpu"))
		return sscanf(value, "%4u", &verdict->clients_per_gpu) == 1;
	if (!strcmp(line, "probe"))
		return take_probe(verdict, value);
	if (!strcmp(line, "explain"))
		return take(verdict->explain, sizeof(verdict->explain), value);
	if (!strcmp(line, "auto"))
		return take_auto(verdict, value);
	if (!strcmp(line, "share"))
		return (verdict->share_tenths = threads_tenths(value)) != 0;
	if (!strcmp(line, "shards_per_gpu"))
		return sscanf(value, "%4u", &verdict->shards_per_gpu) == 1;
	if (!strcmp(line, "share_memory")) {
		verdict->share_memory = !strcmp(value, "even");
		return true;
	}
	if (!strcmp(line, "joined"))
		return take_joined(verdict, value);
	if (!strcmp(line, "client_priority")) {
		verdict->priority = !strcmp(value, "1");
		return true;
	}
	if (!strcmp(line, "compute_mode")) {
		verdict->unguarded = !strcmp(value, "unchanged");
		return true;
	}
	if (!strcmp(line, "visible_devices")) {
		verdict->ordinals = !strcmp(value, "ordinal");
		return true;
	}
	if (!strcmp(line, "exit"))
		return sscanf(value, "%3d", &verdict->exit_status) == 1 && verdict->exit_status > 0 &&
		       verdict->exit_status < 128;
	if (!strcmp(line, "gpu"))
		return take_gpu(verdict, value);
	return true;
}

static bool is_complete(const struct verdict *verdict)
{
	const struct verdict_daemon *first = &verdict->daemons[0];

	if (verdict->status == VERDICT_REFUSED || verdict->status == VERDICT_WITHOUT)
		return verdict->message[0];
	return verdict->status == VERDICT_READY && verdict->threads_tenths && verdict->clients_per_gpu &&
	       verdict->gpu_count && verdict->probe[0] && verdict->explain[0] && first->pipe_directory[0] &&
	       first->log_directory[0] && verdict->daemon_count == (verdict->per_gpu ? verdict->gpu_count : 1);
}

/* The number in a verdict's first line; 0 where it is not such a line. */
static unsigned int version_of(const char *line)
{
	const char *number = line + strlen(VERDICT_HEAD);

	if (strncmp(line, VERDICT_HEAD, strlen(VERDICT_HEAD)) || *number == '0' || strlen(number) > 9 ||
	    strspn(number, "0123456789") != strlen(number))
		return 0;
	return (unsigned int)strtoul(number, NULL, 10);
}

static void refuse_newer(struct verdict *verdict, unsigned int version)
{
	char message[VERDICT_MESSAGE_MAX];

	(void)snprintf(message, sizeof(message),
		       "the prolog on this node is of a newer slurm-mps than spank_mps.so (verdict version %u, and the plugin "
		       "reads up to %d); tell your admin to run slurm-mps install there", version, VERDICT_VERSION);
	refuse(verdict, message);
}

/* First line "slurm-mps verdict 1", last line "end ..."; between them one key and value a line. */
static bool parse(struct verdict *verdict, char *text)
{
	char *save = NULL;
	char *line = strtok_r(text, "\n", &save);
	unsigned int version = line ? version_of(line) : 0;

	verdict->share_tenths = WHOLE_GPU;
	if (!version)
		return false;
	if (version > VERDICT_VERSION) {
		refuse_newer(verdict, version);
		return true;
	}
	while ((line = strtok_r(NULL, "\n", &save))) {
		if (!strncmp(line, "end ", 4))
			return !strtok_r(NULL, "\n", &save) && is_complete(verdict);
		if (!take_line(verdict, line))
			return false;
	}
	return false;
}

/* Only root writes verdicts; anything else under that name is not one. */
static bool is_roots_file(int fd)
{
	struct stat st;

	return !fstat(fd, &st) && S_ISREG(st.st_mode) && st.st_uid == 0 && !(st.st_mode & (S_IWGRP | S_IWOTH));
}

static ssize_t read_whole(int fd, char *text, size_t size)
{
	size_t length = 0;

	while (length < size) {
		ssize_t got = read(fd, text + length, size - length);

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -1;
		if (got == 0)
			return (ssize_t)length;
		length += (size_t)got;
	}
	return -1; /* longer than any verdict is */
}

static void read_verdict(const char *path, struct verdict *verdict)
{
	char text[VERDICT_SIZE_MAX + 1];
	ssize_t length;
	int fd;

	memset(verdict, 0, sizeof(*verdict));
	verdict->uid = UNSAID;
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (fd < 0) {
		if (errno != ENOENT && errno != ENOTDIR)
			refuse(verdict, "the prolog's verdict on this node cannot be read; tell your admin to run slurm-mps doctor there");
		return;
	}
	length = is_roots_file(fd) ? read_whole(fd, text, VERDICT_SIZE_MAX) : -1;
	(void)close(fd);
	if (length >= 0)
		text[length] = '\0';
	if (length < 0 || !parse(verdict, text))
		refuse(verdict, "the prolog's verdict on this node cannot be understood; tell your admin to run slurm-mps doctor "
				"there: spank_mps.so and the prolog may be of different versions");
}

void verdict_read(uint32_t job_id, struct verdict *verdict)
{
	char path[128];

	(void)snprintf(path, sizeof(path), STATE_DIRECTORY "/jobs/%u/verdict", job_id);
	read_verdict(path, verdict);
}

void verdict_read_elsewhere(uint32_t job_id, struct verdict *verdict)
{
	char path[128];

	(void)snprintf(path, sizeof(path), FALLBACK_DIRECTORY "/%u/verdict", job_id);
	read_verdict(path, verdict);
}

const struct verdict_daemon *verdict_daemon_of(const struct verdict *verdict, const struct verdict_gpu *gpu)
{
	return &verdict->daemons[verdict->per_gpu ? gpu - verdict->gpus : 0];
}
