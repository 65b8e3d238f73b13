/* The lock, the faults and the handles. */
#include "calls.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Between two looks at the state file of a call that waits: seldom enough to cost a caller nothing. */
enum { NAP_NANOSECONDS = 20 * 1000 * 1000 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
unsigned init_count;

double seconds_now(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

void nap(void)
{
	nanosleep(&(struct timespec){0, NAP_NANOSECONDS}, NULL);
}

int is_privileged(void)
{
	return geteuid() == 0;
}

/* ---- faults ---- */

/* "nvmlDeviceGetCount" means nvmlDeviceGetCount_v2 too, and "*" every call. */
static int is_call(const char *named, const char *call)
{
	size_t length = strlen(named);
	if (strcmp(named, "*") == 0)
		return 1;
	if (strncmp(named, call, length) != 0)
		return 0;
	const char *rest = call + length;
	return *rest == 0 || (strncmp(rest, "_v", 2) == 0 && rest[2] >= '1' && rest[2] <= '9' && rest[3] == 0);
}

static int hangs(const char *call)
{
	char names[sizeof(state.hang_calls)];
	char *rest = names, *name;
	if (state.hang_seconds <= 0)
		return 0;
	snprintf(names, sizeof(names), "%s", state.hang_calls);
	while ((name = strsep(&rest, ",")))
		if (is_call(name, call))
			return 1;
	return 0;
}

static nvml_code failure_of(const char *call, const char *device)
{
	for (size_t i = 0; i < state.failure_count; i++)
		if (is_call(state.failures[i].call, call) && strcmp(state.failures[i].device, device) == 0)
			return (nvml_code)state.failures[i].code;
	return SUCCESS;
}

/* A call that hangs does not hold the lock: it stands for a thread that waits in the kernel. It looks at the state meanwhile, and
 * goes on as soon as nothing tells it to hang any more. */
static struct call begin(const char *name, int initialized)
{
	struct call call = {name, SUCCESS};
	double began = seconds_now();
	pthread_mutex_lock(&lock);
	if (initialized && init_count == 0) {
		call.code = UNINITIALIZED;
		return call;
	}
	while ((call.code = state_refresh()) == SUCCESS && hangs(name) && seconds_now() - began < state.hang_seconds) {
		pthread_mutex_unlock(&lock);
		nap();
		pthread_mutex_lock(&lock);
	}
	if (call.code == SUCCESS)
		call.code = initialized && init_count == 0 ? UNINITIALIZED : failure_of(name, "");
	return call;
}

struct call call_begin(const char *name)
{
	return begin(name, 1);
}

struct call call_begin_uninitialized(const char *name)
{
	return begin(name, 0);
}

void call_end(struct call *call)
{
	(void)call;
	pthread_mutex_unlock(&lock);
}

/* ---- handles ---- */

/* A handle stays the same while its GPU is there. That of a MIG device belongs to its index: nvml.h says of
 * nvmlDeviceGetMigDeviceHandleByIndex that handles may be reused and their properties can change, once the compute instance is
 * destroyed. */
struct handle {
	char gpu[UUID_SIZE];
	uint64_t mig_index; /* NOT_AVAILABLE: the whole GPU */
};
static struct handle handles[MAX_GPUS + MAX_MIGS];
static size_t handle_count;

nvml_code give_handle(const struct gpu *gpu, const struct mig *mig, nvml_device *device)
{
	uint64_t index = mig ? mig->index : NOT_AVAILABLE;
	size_t i = 0;
	while (i < handle_count && (handles[i].mig_index != index || strcmp(handles[i].gpu, gpu->uuid) != 0))
		i++;
	if (i == sizeof(handles) / sizeof(*handles))
		return INSUFFICIENT_RESOURCES;
	if (i == handle_count) {
		snprintf(handles[i].gpu, sizeof(handles[i].gpu), "%s", gpu->uuid);
		handles[i].mig_index = index;
		handle_count++;
	}
	*device = &handles[i];
	return SUCCESS;
}

nvml_code find_target(const char *call, nvml_device device, struct target *target)
{
	size_t i = 0;
	while (i < handle_count && &handles[i] != device)
		i++;
	if (i == handle_count || !(target->gpu = gpu_by_uuid(device->gpu)))
		return INVALID_ARGUMENT;
	if (target->gpu->lost == 1)
		return GPU_IS_LOST;
	target->mig = device->mig_index == NOT_AVAILABLE ? NULL : mig_at(target->gpu, device->mig_index);
	if (device->mig_index != NOT_AVAILABLE && !target->mig)
		return INVALID_ARGUMENT;
	if (target->mig) {
		nvml_code code = failure_of(call, target->mig->uuid);
		if (code != SUCCESS)
			return code;
	}
	return failure_of(call, target->gpu->uuid);
}

/* ---- answers ---- */

nvml_code tell_text(char *out, unsigned length, const char *text)
{
	if (!out)
		return INVALID_ARGUMENT;
	if (strlen(text) >= length)
		return INSUFFICIENT_SIZE;
	memcpy(out, text, strlen(text) + 1);
	return SUCCESS;
}
