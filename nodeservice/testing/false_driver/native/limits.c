/* Memory limits of cgroups, since R615. */
#include "limits.h"

#include "processes.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* The nearest limited ancestor holds for a cgroup without a limit of its own ("MPS v3 memory partitioning"). */
const struct memory_limit *limit_of(const struct gpu *gpu, const char *cgroup)
{
	char path[PATH_SIZE];
	snprintf(path, sizeof(path), "%s", cgroup);
	for (char *slash; *path; *slash = 0) {
		for (size_t i = 0; i < state.limit_count; i++)
			if (strcmp(state.limits[i].cgroup, path) == 0 && strcmp(state.limits[i].gpu, gpu->uuid) == 0 &&
			    (state.limits[i].soft_bytes != 0 || state.limits[i].hard_bytes != NOT_AVAILABLE))
				return &state.limits[i];
		if (!(slash = strrchr(path, '/')))
			break;
	}
	return NULL;
}

uint64_t bytes_in(const struct target *on, const char *cgroup)
{
	uint64_t bytes = 0;
	for (size_t i = 0; i < state.process_count; i++) {
		const struct process *process = &state.processes[i];
		if (process->used_bytes != NOT_AVAILABLE && is_on(process, on) && is_here(process) && is_in_cgroup(process, cgroup))
			bytes += process->used_bytes;
	}
	return bytes;
}

const struct memory_limit *limit_of_caller(const struct gpu *gpu)
{
	char directory[PATH_SIZE];
	for (size_t i = 0; i < CGROUP_MOUNTS && state.limit_count > 0; i++) {
		const struct memory_limit *limit = cgroup_directory((uint32_t)getpid(), i, directory) ? limit_of(gpu, directory) : NULL;
		if (limit)
			return limit;
	}
	return NULL;
}

/* The driver opens the cgroup's directory; one that is not there is "not found". Here any directory will do, so that a host
 * without cgroup v2 can try it. MIG is refused. */
static nvml_code check_cgroup(const struct target *on, const char *cgroup)
{
	struct stat directory;
	if (on->mig || on->gpu->mig_enabled == 1)
		return NOT_SUPPORTED;
	if (!cgroup || *cgroup != '/' || strlen(cgroup) >= PATH_SIZE || strpbrk(cgroup, "\n]"))
		return INVALID_ARGUMENT;
	return stat(cgroup, &directory) == 0 && S_ISDIR(directory.st_mode) ? SUCCESS : NOT_FOUND;
}

/* A soft limit of 0 with a hard limit of all ones lifts it. */
nvml_code nvmlDeviceSetMemoryLimits_v1(nvml_device device, const set_memory_limits *limits)
{
	CALL_ON(device);
	char head[UUID_SIZE + PATH_SIZE + 16], body[96];
	if (!limits)
		return INVALID_ARGUMENT;
	nvml_code code = check_cgroup(&on, limits->cgroup);
	if (code != SUCCESS)
		return code;
	if (limits->soft_bytes > limits->hard_bytes)
		return INVALID_ARGUMENT;
	if (!is_privileged())
		return NO_PERMISSION;
	snprintf(head, sizeof(head), "memory_limit %s %s", on.gpu->uuid, limits->cgroup);
	snprintf(body, sizeof(body), "soft_bytes=%" PRIu64 "\nhard_bytes=%" PRIu64, limits->soft_bytes, limits->hard_bytes);
	return state_add(head, body);
}

nvml_code nvmlDeviceGetMemoryLimits_v1(nvml_device device, get_memory_limits *limits)
{
	CALL_ON(device);
	if (!limits)
		return INVALID_ARGUMENT;
	nvml_code code = check_cgroup(&on, limits->cgroup);
	if (code != SUCCESS)
		return code;
	const struct memory_limit *limit = limit_of(on.gpu, limits->cgroup);
	limits->soft_bytes = limit ? limit->soft_bytes : 0;
	limits->hard_bytes = limit ? limit->hard_bytes : NOT_AVAILABLE;
	limits->used_bytes = bytes_in(&on, limits->cgroup);
	return SUCCESS;
}
