#include "rollcall.h"

#include <poll.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>

#define WHOLE 720720ULL /* divides by each number of GPUs up to 16 */
#define WAIT_TRIES 400
#define WAIT_PAUSE_MS 5

struct rollcall {
	atomic_uint answered;
	atomic_bool spoken;
	atomic_ullong parts[GPUS_MAX];
};

struct rollcall *rollcall_new(void)
{
	void *memory = mmap(NULL, sizeof(struct rollcall), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	return memory == MAP_FAILED ? NULL : memory; /* the kernel gives it zeroed: nobody has answered */
}

bool rollcall_answer(struct rollcall *rollcall, const struct verdict *verdict, const struct task_gpus *task,
		     unsigned int tasks, unsigned int tasks_on[GPUS_MAX])
{
	if (!rollcall)
		return false;
	for (unsigned int i = 0; i < task->count; i++)
		(void)atomic_fetch_add(&rollcall->parts[task->gpus[i] - verdict->gpus],
				       WHOLE / task->count);
	(void)atomic_fetch_add(&rollcall->answered, 1);
	for (int tries = 0; atomic_load(&rollcall->answered) < tasks; tries++) {
		if (tries == WAIT_TRIES)
			return false;
		(void)poll(NULL, 0, WAIT_PAUSE_MS);
	}
	for (unsigned int gpu = 0; gpu < GPUS_MAX; gpu++)
		tasks_on[gpu] = (unsigned int)((atomic_load(&rollcall->parts[gpu]) + WHOLE - 1) / WHOLE);
	return true;
}

bool rollcall_first(struct rollcall *rollcall)
{
	return !rollcall || !atomic_exchange(&rollcall->spoken, true);
}

bool rollcall_failed(struct rollcall *rollcall)
{
	return rollcall && atomic_load(&rollcall->spoken);
}
