/* Reads the state file's text into `state`. */
#include "state.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

struct state state;

struct fact {
	const char *name;
	size_t offset;
};
static const struct fact gpu_facts[] = {
#define X(fact) {#fact, offsetof(struct gpu, fact)},
	GPU_FACTS(X){NULL, 0}
#undef X
};
static const struct fact mig_facts[] = {
#define X(fact) {#fact, offsetof(struct mig, fact)},
	MIG_FACTS(X){NULL, 0}
#undef X
};
static const struct fact process_facts[] = {
#define X(fact) {#fact, offsetof(struct process, fact)},
	PROCESS_FACTS(X){NULL, 0}
#undef X
};
static const struct fact event_facts[] = {
#define X(fact) {#fact, offsetof(struct event, fact)},
	EVENT_FACTS(X){NULL, 0}
#undef X
};

static void set_fact(const struct fact *facts, void *of, const char *name, const char *text)
{
	for (; facts->name; facts++)
		if (strcmp(facts->name, name) == 0)
			*(uint64_t *)((char *)of + facts->offset) = *text ? strtoull(text, NULL, 0) : NOT_AVAILABLE;
}

static void unset_facts(const struct fact *facts, void *of)
{
	for (; facts->name; facts++)
		*(uint64_t *)((char *)of + facts->offset) = NOT_AVAILABLE;
}

/* Cuts what is too long, and always ends with a zero. */
static void set_text(char *to, size_t size, const char *text)
{
	snprintf(to, size, "%s", text);
}
#define TEXT(to, text) set_text(to, sizeof(to), text)

const struct gpu *gpu_by_uuid(const char *uuid)
{
	for (size_t i = 0; i < state.gpu_count; i++)
		if (strcmp(state.gpus[i].uuid, uuid) == 0)
			return &state.gpus[i];
	return NULL;
}

const struct mig *mig_by_uuid(const char *uuid)
{
	for (size_t i = 0; i < state.mig_count; i++)
		if (strcmp(state.migs[i].uuid, uuid) == 0)
			return &state.migs[i];
	return NULL;
}

const struct mig *mig_at(const struct gpu *gpu, uint64_t index)
{
	for (size_t i = 0; i < state.mig_count; i++)
		if (state.migs[i].index == index && strcmp(state.migs[i].gpu, gpu->uuid) == 0)
			return &state.migs[i];
	return NULL;
}

/* ---- sections. A second one of the same name goes on with the first: the later line holds. ---- */

enum kind { NOTHING, DRIVER, HANG, GPU, MIG, PROCESS, EVENT, FAILURE, LIMIT };
struct section {
	enum kind kind;
	void *of;
};

static void *next_of(void *array, size_t size, size_t *count, size_t max)
{
	if (*count == max)
		return NULL;
	void *next = (char *)array + size * (*count)++;
	memset(next, 0, size);
	return next;
}
#define NEXT(array, count, max) next_of(array, sizeof(*(array)), &(count), max)

static struct section open_process(const char *device, uint32_t pid)
{
	for (size_t i = 0; i < state.process_count; i++)
		if (state.processes[i].pid == pid && strcmp(state.processes[i].device, device) == 0)
			return (struct section){PROCESS, &state.processes[i]};
	struct process *process = NEXT(state.processes, state.process_count, MAX_PROCESSES);
	if (process) {
		unset_facts(process_facts, process);
		TEXT(process->device, device);
		TEXT(process->kind, "compute");
		process->pid = pid;
	}
	return (struct section){process ? PROCESS : NOTHING, process};
}

static struct section open_limit(const char *gpu, const char *cgroup)
{
	for (size_t i = 0; i < state.limit_count; i++)
		if (strcmp(state.limits[i].cgroup, cgroup) == 0 && strcmp(state.limits[i].gpu, gpu) == 0)
			return (struct section){LIMIT, &state.limits[i]};
	struct memory_limit *limit = NEXT(state.limits, state.limit_count, MAX_LIMITS);
	if (limit) {
		TEXT(limit->gpu, gpu);
		TEXT(limit->cgroup, cgroup);
	}
	return (struct section){limit ? LIMIT : NOTHING, limit};
}

static struct section open_gpu(const char *uuid)
{
	struct gpu *gpu = (struct gpu *)gpu_by_uuid(uuid);
	if (!gpu && (gpu = NEXT(state.gpus, state.gpu_count, MAX_GPUS))) {
		unset_facts(gpu_facts, gpu);
		TEXT(gpu->uuid, uuid);
		gpu->lost = gpu->denied = gpu->mig_enabled = 0;
	}
	return (struct section){gpu ? GPU : NOTHING, gpu};
}

static struct section open_mig(const char *uuid)
{
	struct mig *mig = (struct mig *)mig_by_uuid(uuid);
	if (!mig && (mig = NEXT(state.migs, state.mig_count, MAX_MIGS))) {
		unset_facts(mig_facts, mig);
		TEXT(mig->uuid, uuid);
	}
	return (struct section){mig ? MIG : NOTHING, mig};
}

static struct section open_event(uint64_t number)
{
	struct event *event = NEXT(state.events, state.event_count, MAX_EVENTS);
	if (event) {
		unset_facts(event_facts, event);
		event->number = number;
	}
	return (struct section){event ? EVENT : NOTHING, event};
}

static struct section open_failure(const char *call, const char *device)
{
	struct failure *failure = NEXT(state.failures, state.failure_count, MAX_FAILURES);
	if (failure) {
		TEXT(failure->call, call);
		TEXT(failure->device, device);
	}
	return (struct section){failure ? FAILURE : NOTHING, failure};
}

/* "kind first rest": the rest may hold spaces, as a cgroup's path may. */
static struct section open_section(char *head)
{
	char *rest = head;
	const char *kind = strsep(&rest, " "), *first = rest ? strsep(&rest, " ") : "";
	if (!rest)
		rest = "";
	if (strcmp(kind, "driver") == 0)
		return (struct section){DRIVER, &state};
	if (strcmp(kind, "hang") == 0)
		return (struct section){HANG, &state};
	if (strcmp(kind, "gpu") == 0)
		return open_gpu(first);
	if (strcmp(kind, "mig") == 0)
		return open_mig(first);
	if (strcmp(kind, "process") == 0)
		return open_process(first, (uint32_t)strtoul(rest, NULL, 10));
	if (strcmp(kind, "event") == 0)
		return open_event(strtoull(first, NULL, 10));
	if (strcmp(kind, "fail") == 0)
		return open_failure(first, rest);
	if (strcmp(kind, "memory_limit") == 0)
		return open_limit(first, rest);
	return (struct section){NOTHING, NULL};
}

/* ---- lines ---- */

/* "switch BUS", "gpu BUS" or "down". */
static void set_link(struct gpu *gpu, const char *number, char *text)
{
	unsigned long index = strtoul(number, NULL, 10);
	if (index >= MAX_LINKS)
		return;
	struct link *link = &gpu->links[index];
	char *rest = text;
	const char *to = strsep(&rest, " ");
	link->exists = 1;
	link->active = strcmp(to, "down") != 0;
	link->remote_type = strcmp(to, "switch") == 0 ? LINK_TO_SWITCH : strcmp(to, "gpu") == 0 ? LINK_TO_GPU : LINK_TO_UNKNOWN;
	TEXT(link->remote_bus_id, rest ? rest : "");
}

static void set_gpu(struct gpu *gpu, const char *key, char *text)
{
	if (strcmp(key, "name") == 0)
		TEXT(gpu->name, text);
	else if (strcmp(key, "bus_id") == 0)
		TEXT(gpu->bus_id, text);
	else if (strcmp(key, "serial") == 0)
		TEXT(gpu->serial, text);
	else if (strcmp(key, "pcie_switch") == 0)
		TEXT(gpu->pcie_switch, text);
	else if (strcmp(key, "cpus") == 0)
		TEXT(gpu->cpus, text);
	else if (strncmp(key, "nvlink.", 7) == 0)
		set_link(gpu, key + 7, text);
	else
		set_fact(gpu_facts, gpu, key, text);
}

static void set_driver(const char *key, const char *text)
{
	if (strcmp(key, "machine") == 0)
		TEXT(state.machine, text);
	else if (strcmp(key, "version") == 0)
		TEXT(state.version, text);
	else if (strcmp(key, "nvml_version") == 0)
		TEXT(state.nvml_version, text);
	else if (strcmp(key, "cuda_version") == 0)
		state.cuda_version = strtoull(text, NULL, 10);
	else if (strcmp(key, "init_error") == 0)
		state.init_error = strtoull(text, NULL, 10);
	else if (strcmp(key, "pid_namespace") == 0)
		state.pid_namespace = strtoull(text, NULL, 10);
}

static void set_in(struct section section, const char *key, char *text)
{
	struct mig *mig = section.of;
	struct process *process = section.of;
	struct event *event = section.of;
	struct memory_limit *limit = section.of;
	switch (section.kind) {
	case DRIVER:
		set_driver(key, text);
		break;
	case HANG:
		if (strcmp(key, "seconds") == 0)
			state.hang_seconds = strtod(text, NULL);
		else if (strcmp(key, "calls") == 0)
			TEXT(state.hang_calls, text);
		break;
	case GPU:
		set_gpu(section.of, key, text);
		break;
	case MIG:
		if (strcmp(key, "gpu") == 0)
			TEXT(mig->gpu, text);
		else if (strcmp(key, "profile") == 0)
			TEXT(mig->profile, text);
		else
			set_fact(mig_facts, mig, key, text);
		break;
	case PROCESS:
		if (strcmp(key, "kind") == 0)
			TEXT(process->kind, text);
		else if (strcmp(key, "cgroup") == 0)
			TEXT(process->cgroup, text);
		else
			set_fact(process_facts, process, key, text);
		break;
	case EVENT:
		if (strcmp(key, "gpu") == 0)
			TEXT(event->gpu, text);
		else
			set_fact(event_facts, event, key, text);
		break;
	case FAILURE:
		((struct failure *)section.of)->code = strtoull(text, NULL, 10);
		break;
	case LIMIT:
		*(strcmp(key, "soft_bytes") == 0 ? &limit->soft_bytes : &limit->hard_bytes) = strtoull(text, NULL, 10);
		break;
	case NOTHING:
		break;
	}
}

static char *trimmed(char *text)
{
	while (isspace((unsigned char)*text))
		text++;
	for (char *end = text + strlen(text); end > text && isspace((unsigned char)end[-1]);)
		*--end = 0;
	return text;
}

void state_read(FILE *file)
{
	struct section section = {NOTHING, NULL};
	char *line = NULL;
	size_t size = 0;
	memset(&state, 0, sizeof(state));
	while (getline(&line, &size, file) >= 0) {
		char *text = trimmed(line), *equals = strchr(text, '=');
		char *end = strrchr(text, ']');
		if (*text == '[' && end) {
			*end = 0;
			section = open_section(text + 1);
		} else if (*text != '#' && equals) {
			*equals = 0;
			set_in(section, trimmed(text), trimmed(equals + 1));
		}
	}
	free(line);
}
