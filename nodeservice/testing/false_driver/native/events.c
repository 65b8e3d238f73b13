/* Event sets: what happened to a GPU since it was registered, each thing once to each set. */
#include "calls.h"

#include <string.h>

enum { MAX_SETS = 64 };

struct registration {
	char gpu[UUID_SIZE];
	uint64_t types, seen; /* the number of the last event that was there at registration, or that was delivered */
};

struct event_set {
	int exists;
	size_t count;
	struct registration registrations[MAX_GPUS];
};
static struct event_set sets[MAX_SETS];

static int is_set(nvml_event_set set)
{
	for (size_t i = 0; i < MAX_SETS; i++)
		if (set == &sets[i])
			return sets[i].exists;
	return 0;
}

nvml_code nvmlEventSetCreate(nvml_event_set *set)
{
	CALL();
	if (!set)
		return INVALID_ARGUMENT;
	for (size_t i = 0; i < MAX_SETS; i++)
		if (!sets[i].exists) {
			memset(&sets[i], 0, sizeof(sets[i]));
			sets[i].exists = 1;
			*set = &sets[i];
			return SUCCESS;
		}
	return INSUFFICIENT_RESOURCES;
}

nvml_code nvmlEventSetFree(nvml_event_set set)
{
	CALL();
	if (!is_set(set))
		return INVALID_ARGUMENT;
	set->exists = 0;
	return SUCCESS;
}

nvml_code nvmlDeviceGetSupportedEventTypes(nvml_device device, uint64_t *types)
{
	CALL_ON_GPU(device);
	TELL(types, on.gpu->supported_events == NOT_AVAILABLE ? 0 : on.gpu->supported_events);
}

/* Events from before are not recorded. Where one type is not supported, none is registered, and the set can still be used. MIG
 * handles cannot be registered: their GPU's events name the instance. */
nvml_code nvmlDeviceRegisterEvents(nvml_device device, uint64_t types, nvml_event_set set)
{
	CALL_ON_GPU(device);
	if (!is_set(set) || (types & ~EVENTS_KNOWN))
		return INVALID_ARGUMENT;
	if (on.gpu->supported_events == NOT_AVAILABLE || (types & ~on.gpu->supported_events))
		return NOT_SUPPORTED;
	size_t i = 0;
	while (i < set->count && strcmp(set->registrations[i].gpu, on.gpu->uuid) != 0)
		i++;
	if (i == MAX_GPUS)
		return INSUFFICIENT_RESOURCES;
	struct registration *registration = &set->registrations[i];
	if (i == set->count) {
		set->count++;
		memcpy(registration->gpu, on.gpu->uuid, sizeof(registration->gpu));
		registration->types = 0;
		registration->seen = state.event_count ? state.events[state.event_count - 1].number : 0;
	}
	registration->types |= types;
	return SUCCESS;
}

static uint32_t instance(uint64_t number)
{
	return number == NOT_AVAILABLE ? NO_INSTANCE : (uint32_t)number;
}

static nvml_code deliver(nvml_event_set set, event_data *data)
{
	for (size_t e = 0; e < state.event_count; e++) {
		const struct event *event = &state.events[e];
		const struct gpu *gpu = gpu_by_uuid(event->gpu);
		for (size_t i = 0; gpu && i < set->count; i++) {
			struct registration *registration = &set->registrations[i];
			if (strcmp(registration->gpu, event->gpu) != 0 || event->number <= registration->seen)
				continue;
			registration->seen = event->number;
			if (!(registration->types & event->type))
				continue;
			*data = (event_data){NULL, event->type, event->data, instance(event->gpu_instance), instance(event->compute_instance)};
			return give_handle(gpu, NULL, &data->device);
		}
	}
	return TIMEOUT;
}

/* What is recorded comes first; then a lost GPU makes each wait fail, at once. */
static nvml_code look(const char *name, nvml_event_set set, event_data *data)
{
	__attribute__((cleanup(call_end))) struct call call = call_begin(name);
	if (call.code != SUCCESS)
		return call.code;
	if (!data || !is_set(set))
		return INVALID_ARGUMENT;
	nvml_code code = deliver(set, data);
	for (size_t i = 0; code == TIMEOUT && i < set->count; i++) {
		const struct gpu *gpu = gpu_by_uuid(set->registrations[i].gpu);
		if (!gpu || gpu->lost == 1)
			return GPU_IS_LOST;
	}
	return code;
}

nvml_code nvmlEventSetWait_v2(nvml_event_set set, event_data *data, unsigned timeout_milliseconds)
{
	double end = seconds_now() + timeout_milliseconds / 1000.0;
	for (;;) {
		nvml_code code = look(__func__, set, data);
		if (code != TIMEOUT || seconds_now() >= end)
			return code;
		nap();
	}
}
