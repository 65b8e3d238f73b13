/* The processes on a device: lists, utilisation, memory. */
#include "processes.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

/* ---- which processes ---- */

/* Field 22 of /proc/PID/stat; the second, the command, may hold spaces and parentheses. 0: there is no such process, or a zombie,
 * whose memory the driver has taken back. */
static uint64_t start_ticks(uint32_t pid)
{
	char path[64], line[1024];
	snprintf(path, sizeof(path), "/proc/%u/stat", pid);
	FILE *file = fopen(path, "re");
	char *rest = file && fgets(line, sizeof(line), file) ? strrchr(line, ')') : NULL;
	uint64_t ticks = 0;
	char status = 0;
	if (rest)
		sscanf(rest + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu", &status,
		       (unsigned long long *)&ticks);
	if (file)
		fclose(file);
	return status == 'Z' || status == 'X' ? 0 : ticks;
}

int is_here(const struct process *process)
{
	return process->ended != 1 && (process->start_ticks == NOT_AVAILABLE || process->start_ticks == start_ticks(process->pid));
}

int is_on(const struct process *process, const struct target *on)
{
	if (on->mig)
		return strcmp(process->device, on->mig->uuid) == 0;
	const struct mig *mig = mig_by_uuid(process->device);
	return strcmp(mig ? mig->gpu : process->device, on->gpu->uuid) == 0;
}

uint64_t bytes_of_processes(const struct target *on)
{
	uint64_t bytes = 0;
	for (size_t i = 0; i < state.process_count; i++) {
		const struct process *process = &state.processes[i];
		if (process->used_bytes != NOT_AVAILABLE && is_on(process, on) && is_here(process))
			bytes += process->used_bytes;
	}
	return bytes;
}

/* The driver names processes as the caller's PID namespace knows them and leaves out those outside of it, without an error (open
 * kernel modules since 545.23.06 and 535.113.01). The PIDs in the state file are those of the namespace that it names; a caller in
 * another one is taken to see none of them. */
static int sees_processes(void)
{
	struct stat own;
	return state.pid_namespace == 0 || stat("/proc/self/ns/pid", &own) != 0 || own.st_ino == state.pid_namespace;
}

/* ---- cgroups ---- */

static int is_below(const char *path, const char *directory)
{
	size_t length = strlen(directory);
	while (length > 0 && directory[length - 1] == '/')
		length--;
	return strncmp(path, directory, length) == 0 && (path[length] == 0 || path[length] == '/');
}

/* The path of /proc/PID/cgroup's line of cgroup v2, below the mount. */
static int read_cgroup(uint32_t pid, char *path, size_t size)
{
	char name[64], line[PATH_SIZE];
	int found = 0;
	snprintf(name, sizeof(name), "/proc/%u/cgroup", pid);
	FILE *file = fopen(name, "re");
	while (file && !found && fgets(line, sizeof(line), file))
		if ((found = strncmp(line, "0::", 3) == 0))
			snprintf(path, size, "%s", strtok(line + 3, "\n"));
	if (file)
		fclose(file);
	return found;
}

static const char *const mounts[CGROUP_MOUNTS] = {"/sys/fs/cgroup/unified", "/sys/fs/cgroup"};

int cgroup_directory(uint32_t pid, size_t mount, char directory[PATH_SIZE])
{
	char own[PATH_SIZE];
	if (!read_cgroup(pid, own, sizeof(own)))
		return 0;
	int length = snprintf(directory, PATH_SIZE, "%s%s", mounts[mount], strcmp(own, "/") == 0 ? "" : own);
	return length < PATH_SIZE;
}

int is_in_cgroup(const struct process *process, const char *directory)
{
	char own[PATH_SIZE];
	if (*process->cgroup)
		return is_below(process->cgroup, directory);
	for (size_t i = 0; i < CGROUP_MOUNTS; i++)
		if (cgroup_directory(process->pid, i, own) && is_below(own, directory))
			return 1;
	return 0;
}

/* ---- lists ---- */

static uint32_t instance(uint64_t number)
{
	return number == NOT_AVAILABLE ? NO_INSTANCE : (uint32_t)number;
}

/* A first call with a count of 0 asks how many there are: INSUFFICIENT_SIZE with the number, or SUCCESS where there are none. */
static nvml_code list(const struct target *on, const char *kind, unsigned *count, process_info *infos)
{
	unsigned found = 0, room;
	if (!count)
		return INVALID_ARGUMENT;
	if (!on->mig && on->gpu->mig_enabled == 1 && !is_privileged())
		return NO_PERMISSION;
	room = *count;
	if (room > 0 && !infos)
		return INVALID_ARGUMENT;
	for (size_t i = 0; i < state.process_count && sees_processes(); i++) {
		const struct process *process = &state.processes[i];
		if (strcmp(process->kind, kind) != 0 || !is_on(process, on) || !is_here(process))
			continue;
		if (found < room) {
			const struct mig *mig = mig_by_uuid(process->device);
			infos[found] = (process_info){process->pid, process->used_bytes, mig ? instance(mig->gpu_instance) : NO_INSTANCE,
						      mig ? instance(mig->compute_instance) : NO_INSTANCE};
		}
		found++;
	}
	*count = found;
	return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

#define LIST(function, kind) \
	nvml_code function(nvml_device device, unsigned *count, process_info *infos) \
	{ \
		CALL_ON(device); \
		return list(&on, kind, count, infos); \
	}
LIST(nvmlDeviceGetComputeRunningProcesses_v2, "compute")
LIST(nvmlDeviceGetComputeRunningProcesses_v3, "compute")
LIST(nvmlDeviceGetGraphicsRunningProcesses_v2, "graphics")
LIST(nvmlDeviceGetGraphicsRunningProcesses_v3, "graphics")
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v2, "mps")
LIST(nvmlDeviceGetMPSComputeRunningProcesses_v3, "mps")

/* ---- utilisation ---- */

/* The driver keeps some samples of each process; here there is one, of now. None that is newer than asked for is NOT_FOUND. */
nvml_code nvmlDeviceGetProcessUtilization(nvml_device device, process_sample *samples, unsigned *count, uint64_t last_seen_microseconds)
{
	CALL_ON_GPU(device);
	struct timespec now;
	unsigned found = 0;
	if (!count)
		return INVALID_ARGUMENT;
	if (on.gpu->mig_enabled == 1)
		return NOT_SUPPORTED;
	clock_gettime(CLOCK_REALTIME, &now);
	uint64_t at = (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
	for (size_t i = 0; i < state.process_count && at > last_seen_microseconds && sees_processes(); i++) {
		const struct process *process = &state.processes[i];
		if (process->sm_percent == NOT_AVAILABLE || !is_on(process, &on) || !is_here(process))
			continue;
		if (samples && found < *count) {
			uint64_t memory = process->memory_percent;
			samples[found] = (process_sample){process->pid, at, (uint32_t)process->sm_percent,
							  memory == NOT_AVAILABLE ? 0 : (uint32_t)memory, 0, 0};
		}
		found++;
	}
	unsigned room = samples ? *count : 0;
	*count = found;
	return found == 0 ? NOT_FOUND : found > room ? INSUFFICIENT_SIZE : SUCCESS;
}
