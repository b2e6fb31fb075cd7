/* The control daemon's commands, with the real one's manners: it says yes to nearly everything (O1–O5). */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <fcntl.h>
#include <unistd.h>

#include "mps_daemon.h"

enum { MAX_WORDS = 8 };

struct words {
	int count;
	const char *word[MAX_WORDS]; /* word[0] is the command; beyond count: "" */
	char text[WIRE_MAX_REQUEST + 1];
};

/* A growing answer; what does not fit is left off. */
struct answer {
	size_t used;
	char text[WIRE_MAX_ANSWER];
};

static void add(struct answer *answer, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void add(struct answer *answer, const char *format, ...)
{
	va_list values;
	size_t room = sizeof answer->text - answer->used;
	va_start(values, format);
	int length = vsnprintf(answer->text + answer->used, room, format, values);
	va_end(values);
	if (length > 0 && (size_t)length < room)
		answer->used += (size_t)length;
	else
		answer->text[answer->used] = '\0';
}

static void split(struct words *words, const char *line)
{
	char *rest = words->text, *word;
	snprintf(words->text, sizeof words->text, "%s", line);
	words->count = 0;
	while ((word = strsep(&rest, " \t\r")) && words->count < MAX_WORDS)
		if (*word)
			words->word[words->count++] = word;
	for (int i = words->count; i < MAX_WORDS; i++)
		words->word[i] = "";
}

static struct limit *find_limit(struct limits *limits, const char *device)
{
	for (int i = 0; i < limits->count; i++)
		if (strcmp(limits->list[i].device, device) == 0)
			return &limits->list[i];
	return NULL;
}

static void remove_limit(struct limits *limits, const struct limit *limit)
{
	size_t at = (size_t)(limit - limits->list);
	limits->count--;
	memmove(&limits->list[at], &limits->list[at + 1], ((size_t)limits->count - at) * sizeof *limit);
}

/* Set or, with 0, unset. Nothing is checked: not the device, not the size (O2). */
static void set_limit(const struct daemon *daemon, struct limits *limits, const char *device, const char *value)
{
	uint64_t bytes = *value || daemon->driver >= 580 ? units_read_limit(value) : 0;
	const struct limit *old = find_limit(limits, device);
	if (old)
		remove_limit(limits, old);
	if (bytes == 0 || limits->count == MAX_LIMITS)
		return;
	struct limit *fresh = &limits->list[limits->count++];
	snprintf(fresh->device, sizeof fresh->device, "%.*s", MAX_KEY - 1, device);
	fresh->bytes = bytes;
}

static void add_limit(struct answer *answer, struct limits *limits, const char *device)
{
	char text[32] = "";
	const struct limit *limit = find_limit(limits, device);
	if (!limit)
		return;
	units_write_limit(text, sizeof text, limit->bytes);
	add(answer, "%s\n", text);
}

/* ---- Who may ---- */

static bool is_owner(const struct connection *ui)
{
	return ui->uid == 0 || ui->uid == geteuid();
}

/* Driver 535 lets everybody (O89). */
static bool may_change(const struct daemon *daemon, const struct connection *ui, struct answer *answer)
{
	if (is_owner(ui) || daemon->driver < 550)
		return true;
	add(answer,
	    "Insufficient privileges for UID %u. Control deamon settings can only be modified by the user %sstarted it "
	    "or by the root user.\n",
	    ui->uid, daemon->driver < 580 ? "" : "who ");
	return false;
}

/* The server a command names, or an answer that there is none. */
static bool named_server(const struct daemon *daemon, const char *word, struct answer *answer)
{
	int pid = atoi(word);
	if (supervise_runs(daemon, pid))
		return true;
	add(answer, "Server %d not found\n", pid);
	return false;
}

/* ---- Commands: each adds to the answer, or returns false when the answer comes later ---- */

typedef bool command(struct daemon *daemon, struct connection *ui, const struct words *words, struct answer *answer);

static bool get_default_percentage(struct daemon *daemon, struct connection *ui, const struct words *words,
				   struct answer *answer)
{
	(void)ui;
	(void)words;
	add(answer, "%.1f\n", daemon->percentage);
	return true;
}

static bool set_default_percentage(struct daemon *daemon, struct connection *ui, const struct words *words,
				   struct answer *answer)
{
	if (!may_change(daemon, ui, answer))
		return true;
	if (!units_read_percentage(words->word[1], &daemon->percentage))
		SAY(daemon, "Invalid percentage, expected between (0.0, 100.0]");
	add(answer, "%.1f\n", daemon->percentage); /* the old one, when the new one is nonsense (O1) */
	return true;
}

static bool get_percentage(struct daemon *daemon, struct connection *ui, const struct words *words,
			   struct answer *answer)
{
	(void)ui;
	if (named_server(daemon, words->word[1], answer))
		add(answer, "%.1f\n", daemon->server.percentage);
	return true;
}

static bool set_percentage(struct daemon *daemon, struct connection *ui, const struct words *words,
			   struct answer *answer)
{
	if (!may_change(daemon, ui, answer) || !named_server(daemon, words->word[1], answer))
		return true;
	if (units_read_percentage(words->word[2], &daemon->server.percentage))
		supervise_values(daemon);
	add(answer, "%.1f\n", daemon->server.percentage);
	return true;
}

static bool get_default_limit(struct daemon *daemon, struct connection *ui, const struct words *words,
			      struct answer *answer)
{
	(void)ui;
	if (!daemon->limits_ever_set && daemon->driver >= 580)
		add(answer, "No default pinned memory limit set for the device!\n");
	else
		add_limit(answer, &daemon->limits, words->word[1]);
	return true;
}

static bool set_default_limit(struct daemon *daemon, struct connection *ui, const struct words *words,
			      struct answer *answer)
{
	if (!may_change(daemon, ui, answer))
		return true;
	set_limit(daemon, &daemon->limits, words->word[1], words->word[2]);
	daemon->limits_ever_set = true;
	return true;
}

static bool get_limit(struct daemon *daemon, struct connection *ui, const struct words *words, struct answer *answer)
{
	(void)ui;
	if (named_server(daemon, words->word[1], answer))
		add_limit(answer, &daemon->server.limits, words->word[2]);
	return true;
}

static bool set_server_limit(struct daemon *daemon, struct connection *ui, const struct words *words,
			     struct answer *answer)
{
	if (!may_change(daemon, ui, answer) || !named_server(daemon, words->word[1], answer))
		return true;
	set_limit(daemon, &daemon->server.limits, words->word[2], words->word[3]);
	supervise_values(daemon);
	return true;
}

static bool get_priority(struct daemon *daemon, struct connection *ui, const struct words *words,
			 struct answer *answer)
{
	(void)ui;
	(void)words;
	add(answer, "%d\n", daemon->priority);
	return true;
}

static bool set_priority(struct daemon *daemon, struct connection *ui, const struct words *words,
			 struct answer *answer)
{
	if (!may_change(daemon, ui, answer))
		return true;
	if (strcmp(words->word[1], "0") != 0 && strcmp(words->word[1], "1") != 0)
		add(answer, "Invalid priority value - must be 0 or 1!\n");
	else
		daemon->priority = atoi(words->word[1]);
	return true;
}

static bool get_server_list(struct daemon *daemon, struct connection *ui, const struct words *words,
			    struct answer *answer)
{
	(void)ui;
	(void)words;
	if (daemon->server.state != SERVER_NONE)
		add(answer, "%d\n", (int)daemon->server.pid);
	return true;
}

/* It waits for a server that starts (O26). */
static bool get_server_status(struct daemon *daemon, struct connection *ui, const struct words *words,
			      struct answer *answer)
{
	if (!named_server(daemon, words->word[1], answer))
		return true;
	if (daemon->server.state == SERVER_STARTING) {
		ui->waiting = WAIT_STATUS;
		ui->server = daemon->server.pid;
		return false;
	}
	add(answer, "%s\n", daemon->server.fault ? "FAULT" : "ACTIVE");
	return true;
}

static bool start_server(struct daemon *daemon, struct connection *ui, const struct words *words,
			 struct answer *answer)
{
	char *end;
	if (words->count < 2) {
		add(answer, "A user id (UID) is required to start a new server\n");
		return true;
	}
	long uid = strtol(words->word[2], &end, 10);
	if (strcmp(words->word[1], "-uid") != 0 || end == words->word[2] || *end || uid < 0) {
		add(answer, "Invalid start_server cmd. Expected cmd: start_server -uid <user id>\n");
		return true;
	}
	if (daemon->driver < 580) {
		if (ui->uid == 0 || (uid_t)uid == ui->uid)
			supervise_want(daemon, (uid_t)uid);
		else
			add(answer, "Insufficient privileges for UID %u%s\n", ui->uid,
			    daemon->driver < 550 ? "" : ". Only the root user may start server for another user.");
		return true;
	}
	/* A user's own daemon starts nothing for others: refused in these words, though it is the owner who asks. */
	if (ui->uid != 0 && is_owner(ui) && (uid_t)uid != ui->uid)
		add(answer,
		    "Insufficient privileges for UID %u. Control deamon settings can only be modified by the user who "
		    "started it or by the root user.\n",
		    ui->uid);
	else if (may_change(daemon, ui, answer))
		supervise_want(daemon, (uid_t)uid);
	return true;
}

/* Silent, and open to whom queries are open (O45), but on a server of all users (O74). */
static bool shutdown_server(struct daemon *daemon, struct connection *ui, const struct words *words,
			    struct answer *answer)
{
	if (daemon->multiuser && !may_change(daemon, ui, answer))
		return true;
	if (named_server(daemon, words->word[1], answer))
		supervise_shut_down(daemon);
	return true;
}

/* ---- Clients, as the driver's own table has them ---- */

static bool is_client_of(const struct sim_context *entry, pid_t server)
{
	return (entry->kind == SIM_CLIENT || entry->kind == SIM_ATTACHED) && entry->server_pid == server;
}

static int by_sequence(const void *a, const void *b)
{
	return ((const struct sim_context *)a)->sequence - ((const struct sim_context *)b)->sequence;
}

/* Copy the contexts of the running server, in the order they came. */
static int copy_contexts(const struct daemon *daemon, struct sim_context *copies)
{
	int count = 0;
	sim_lock(daemon->state);
	for (int i = 0; i < SIM_MAX_CONTEXTS; i++)
		if (daemon->server.state != SERVER_NONE &&
		    is_client_of(&daemon->state->contexts[i], daemon->server.pid))
			copies[count++] = daemon->state->contexts[i];
	sim_unlock(daemon->state);
	qsort(copies, (size_t)count, sizeof *copies, by_sequence);
	return count;
}

static bool get_client_list(struct daemon *daemon, struct connection *ui, const struct words *words,
			    struct answer *answer)
{
	static struct sim_context copies[SIM_MAX_CONTEXTS];
	(void)ui;
	if (!named_server(daemon, words->word[1], answer))
		return true;
	int count = copy_contexts(daemon, copies);
	for (int i = 0; i < count; i++) {
		int j = 0;
		while (copies[j].pid != copies[i].pid)
			j++;
		if (j == i)
			add(answer, "%d\n", copies[i].pid);
	}
	return true;
}

static bool get_device_client_list(struct daemon *daemon, struct connection *ui, const struct words *words,
				   struct answer *answer)
{
	static struct sim_context copies[SIM_MAX_CONTEXTS];
	(void)ui;
	if (words->count > 1 && !named_server(daemon, words->word[1], answer))
		return true;
	int count = copy_contexts(daemon, copies);
	for (int d = 0; d < daemon->pci_gpus.count; d++) {
		int gpu = daemon->pci_gpus.index[d];
		add(answer, "[%d] 00:00.0, %s\n", d, daemon->state->gpus[gpu].name); /* the real one's zeros, too */
		for (int i = 0; i < count; i++)
			if (copies[i].gpu == gpu)
				add(answer, "%d.%d\n", copies[i].pid, copies[i].context_id);
	}
	return true;
}

static void read_command(pid_t pid, char *command, size_t size)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/cmdline", (int)pid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, command, size - 1);
	if (fd >= 0)
		close(fd);
	command[length > 0 ? length : 0] = '\0'; /* up to the first NUL: argv[0] */
}

static unsigned long pid_namespace(pid_t pid)
{
	char path[64];
	struct stat about;
	snprintf(path, sizeof path, "/proc/%d/ns/pid", (int)pid);
	return stat(path, &about) == 0 ? (unsigned long)about.st_ino : 4026531836ul;
}

static bool ps(struct daemon *daemon, struct connection *ui, const struct words *words, struct answer *answer)
{
	static struct sim_context copies[SIM_MAX_CONTEXTS];
	char program[256], device[23];
	int only = strcmp(words->word[1], "-p") == 0 ? atoi(words->word[2]) : 0;
	(void)ui;
	if (daemon->driver < 580 && daemon->server.state == SERVER_NONE) {
		add(answer, "Server not found\n"); /* O83 */
		return true;
	}
	add(answer, "%-10s%-10s%-15s%-26s%-15s%-15s\n", "PID", "ID", "SERVER", "DEVICE", "NAMESPACE", "COMMAND");
	int count = copy_contexts(daemon, copies);
	for (int i = 0; i < count; i++) {
		if (copies[i].kind != SIM_CLIENT || (only && copies[i].pid != only))
			continue;
		read_command(copies[i].pid, program, sizeof program);
		snprintf(device, sizeof device, "%.22s", daemon->state->gpus[copies[i].gpu].uuid);
		add(answer, "%-10d%-10d%-15d%-26s%-15lu%s\n", copies[i].pid, copies[i].sequence, copies[i].server_pid,
		    device, pid_namespace(copies[i].pid), program);
	}
	return true;
}

/* Open to whom queries are open: the job's user, of a daemon of root's (O45); on a server of all users only root (O74). */
static bool terminate_client(struct daemon *daemon, struct connection *ui, const struct words *words,
			     struct answer *answer)
{
	struct server_message message = {.type = SERVER_TERMINATE, .pid = atoi(words->word[2])};
	if (daemon->multiuser && !may_change(daemon, ui, answer)) {
		add(answer, "800\n");
		return true;
	}
	if (!named_server(daemon, words->word[1], answer))
		return true;
	ui->waiting = WAIT_TERMINATE;
	server_message_send(daemon->server.channel, &message, -1);
	return false;
}

void command_terminated(struct daemon *daemon, int error)
{
	char text[16];
	snprintf(text, sizeof text, "%d\n", error);
	for (int i = 0; i < daemon->count; i++)
		if (daemon->connections[i]->fd >= 0 && daemon->connections[i]->waiting == WAIT_TERMINATE) {
			daemon_answer(daemon, daemon->connections[i], text);
			return; /* they are answered in the order they were asked */
		}
}

/* ---- The rest ---- */

static bool device_query(struct daemon *daemon, struct connection *ui, const struct words *words,
			 struct answer *answer)
{
	bool csv = false;
	(void)ui;
	for (int i = 1; i < words->count; i++) {
		if (strcmp(words->word[i], "--csv") == 0)
			csv = true;
		else if (!named_server(daemon, words->word[i], answer))
			return true;
	}
	add(answer, "Default\n"); /* the name space that the table is of */
	if (csv)
		add(answer, "Device Ordinal,PCI IDs,UUID,Name,Attributes\n");
	else
		add(answer, "%-14s  %-13s  %-40s  %-32s  %-s\n", "Device Ordinal", "PCI IDs", "UUID", "Name", "Attributes");
	for (int d = 0; d < daemon->gpus.count; d++) {
		const struct sim_gpu *gpu = &daemon->state->gpus[daemon->gpus.index[d]];
		if (csv)
			add(answer, "%d,%04x:%02x.%02x.00,%s,%s,N/A\n", d, gpu->domain, gpu->bus, gpu->device, gpu->uuid,
			    gpu->name);
		else
			add(answer, "%-14d  %04x:%02x.%02x.00  %-40s  %-32s  %-s\n", d, gpu->domain, gpu->bus, gpu->device,
			    gpu->uuid, gpu->name, "N/A");
	}
	return true;
}

static bool quit(struct daemon *daemon, struct connection *ui, const struct words *words, struct answer *answer)
{
	if (!is_owner(ui)) {
		add(answer, "Not enough privilege to execute quit command\n");
		return true;
	}
	if (strcmp(words->word[1], "-t") == 0 && words->count > 2) {
		int seconds = atoi(words->word[2]);
		SAY(daemon, "quit command issued with timeout of %d", seconds);
		daemon->force_ms = sim_now_ms() + (uint64_t)(seconds > 0 ? seconds : 0) * 1000;
	}
	daemon->quitting = true;
	daemon->server.retry_ms = 0; /* a try at once; an earlier quit's interval is kept */
	ui->waiting = WAIT_QUIT;
	supervise_step(daemon); /* with no server, it does not come back */
	return false;
}

static const struct {
	const char *name;
	command *run;
	int since; /* the first driver of those seen that knows it (O83); 0 for all */
} commands[] = {
    {"start_server", start_server, 0},
    {"shutdown_server", shutdown_server, 0},
    {"quit", quit, 0},
    {"get_server_list", get_server_list, 0},
    {"get_server_status", get_server_status, 550},
    {"get_client_list", get_client_list, 0},
    {"get_device_client_list", get_device_client_list, 0},
    {"ps", ps, 0},
    {"set_default_active_thread_percentage", set_default_percentage, 0},
    {"get_default_active_thread_percentage", get_default_percentage, 0},
    {"set_active_thread_percentage", set_percentage, 0},
    {"get_active_thread_percentage", get_percentage, 0},
    {"set_default_device_pinned_mem_limit", set_default_limit, 0},
    {"get_default_device_pinned_mem_limit", get_default_limit, 0},
    {"set_device_pinned_mem_limit", set_server_limit, 0},
    {"get_device_pinned_mem_limit", get_limit, 0},
    {"set_default_client_priority", set_priority, 0},
    {"get_default_client_priority", get_priority, 0},
    {"terminate_client", terminate_client, 0},
    {"device_query", device_query, 580},
};

static void run(struct daemon *daemon, struct connection *ui)
{
	static struct answer answer; /* one at a time, and too big for the stack */
	static struct words words;
	command *found = NULL;
	answer.used = 0;
	answer.text[0] = '\0';
	ui->waiting = WAIT_NOTHING;
	split(&words, ui->command);
	for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
		if (strcmp(words.word[0], commands[i].name) == 0 && daemon->driver >= commands[i].since)
			found = commands[i].run;
	bool answered = true;
	if (found)
		answered = found(daemon, ui, &words, &answer);
	else if (words.count > 0)
		add(&answer, "Unknown command \"%s\"\n", words.word[0]);
	if (answered)
		daemon_answer(daemon, ui, answer.text);
}

/* Do what this node was told of a command, if anything. Returns true when that was all. */
static bool misbehave(struct daemon *daemon, struct connection *ui)
{
	struct words *words = malloc(sizeof *words);
	char key[128], told[SIM_FAULT_SIZE];
	if (!words)
		return false;
	split(words, ui->command);
	snprintf(key, sizeof key, "command.%.100s", words->word[0]);
	free(words);
	if (!sim_fault(key, told) && !sim_fault("command.*", told))
		return false;
	if (strcmp(told, "hang") == 0) {
		ui->waiting = WAIT_FOREVER;
	} else if (strcmp(told, "ignore") == 0) {
		daemon_answer(daemon, ui, "");
	} else if (strncmp(told, "wrong:", 6) == 0) {
		char text[SIM_FAULT_SIZE + 1];
		snprintf(text, sizeof text, "%s\n", told + 6);
		daemon_answer(daemon, ui, text);
	} else if (strncmp(told, "exit:", 5) == 0) {
		wire_send_number(ui->fd, WIRE_EXIT, atoi(told + 5));
	} else if (strncmp(told, "slow:", 5) == 0) {
		ui->waiting = WAIT_CLOCK;
		ui->wake_ms = sim_now_ms() + (uint64_t)atoi(told + 5);
	} else {
		return false;
	}
	return true;
}

void command_receive(struct daemon *daemon, struct connection *ui, const char *line)
{
	snprintf(ui->command, sizeof ui->command, "%s", line);
	SAY(daemon, "Cmd:%s", ui->command);
	if (!misbehave(daemon, ui))
		run(daemon, ui);
}

void command_wake(struct daemon *daemon, struct connection *ui)
{
	run(daemon, ui); /* what it waited for is so now; asking again finds out what */
}
