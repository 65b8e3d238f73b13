/* What a privileged caller may set: compute mode and accounting. It holds for all processes. */
#include "calls.h"
#include "processes.h"

#include <stdio.h>
#include <string.h>

static nvml_code set_gpu_fact(const struct gpu *gpu, const char *fact, unsigned number)
{
	char head[UUID_SIZE + 8], body[64];
	if (!is_privileged())
		return NO_PERMISSION;
	snprintf(head, sizeof(head), "gpu %s", gpu->uuid);
	snprintf(body, sizeof(body), "%s=%u", fact, number);
	return state_add(head, body);
}

/* ---- compute mode ---- */

enum { COMPUTE_DEFAULT = 0, COMPUTE_EXCLUSIVE_THREAD = 1, COMPUTE_EXCLUSIVE_PROCESS = 3 };

nvml_code nvmlDeviceGetComputeMode(nvml_device device, unsigned *mode)
{
	CALL_ON(device);
	TELL(mode, on.gpu->mig_enabled == 1 ? COMPUTE_DEFAULT : on.gpu->compute_mode);
}

/* "On MIG-enabled GPUs, compute mode would be set to DEFAULT and changing it is not supported" (nvml.h). EXCLUSIVE_THREAD is gone
 * since CUDA 8. */
nvml_code nvmlDeviceSetComputeMode(nvml_device device, unsigned mode)
{
	CALL_ON(device);
	if (mode > COMPUTE_EXCLUSIVE_PROCESS)
		return INVALID_ARGUMENT;
	if (on.gpu->mig_enabled == 1 || mode == COMPUTE_EXCLUSIVE_THREAD || on.gpu->compute_mode == NOT_AVAILABLE)
		return NOT_SUPPORTED;
	return set_gpu_fact(on.gpu, "compute_mode", mode);
}

/* ---- accounting ---- */

enum { ACCOUNTING_BUFFER_SIZE = 4000 };

/* Forced off, and not to be changed, while MIG is on. */
nvml_code nvmlDeviceGetAccountingMode(nvml_device device, unsigned *mode)
{
	CALL_ON_GPU(device);
	TELL(mode, on.gpu->mig_enabled == 1 ? 0 : on.gpu->accounting_mode);
}

nvml_code nvmlDeviceSetAccountingMode(nvml_device device, unsigned mode)
{
	CALL_ON_GPU(device);
	if (mode > 1)
		return INVALID_ARGUMENT;
	if (on.gpu->mig_enabled == 1 || on.gpu->accounting_mode == NOT_AVAILABLE)
		return NOT_SUPPORTED;
	return set_gpu_fact(on.gpu, "accounting_mode", mode);
}

nvml_code nvmlDeviceGetAccountingBufferSize(nvml_device device, unsigned *size)
{
	CALL_ON_GPU(device);
	TELL(size, on.gpu->accounting_mode == NOT_AVAILABLE ? NOT_AVAILABLE : ACCOUNTING_BUFFER_SIZE);
}

/* Those that came while accounting was on: driver.py marks them. They stay after their end. */
static int is_accounted(const struct process *process, const struct target *on)
{
	return process->accounted == 1 && on->gpu->accounting_mode == 1 && on->gpu->mig_enabled != 1 && is_on(process, on);
}

nvml_code nvmlDeviceGetAccountingPids(nvml_device device, unsigned *count, unsigned *pids)
{
	CALL_ON_GPU(device);
	unsigned found = 0;
	if (!count)
		return INVALID_ARGUMENT;
	if (on.gpu->accounting_mode == NOT_AVAILABLE)
		return NOT_SUPPORTED;
	for (size_t i = 0; i < state.process_count; i++)
		if (is_accounted(&state.processes[i], &on)) {
			if (pids && found < *count)
				pids[found] = state.processes[i].pid;
			found++;
		}
	unsigned room = pids ? *count : 0;
	*count = found;
	return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

nvml_code nvmlDeviceGetAccountingStats(nvml_device device, unsigned pid, accounting_stats *stats)
{
	CALL_ON_GPU(device);
	if (!stats)
		return INVALID_ARGUMENT;
	if (on.gpu->accounting_mode != 1 || on.gpu->mig_enabled == 1)
		return NOT_SUPPORTED;
	for (size_t i = 0; i < state.process_count; i++) {
		const struct process *process = &state.processes[i];
		if (process->pid != pid || !is_accounted(process, &on))
			continue;
		int runs = is_here(process);
		memset(stats, 0, sizeof(*stats));
		stats->gpu_percent = process->sm_percent == NOT_AVAILABLE ? 0 : (uint32_t)process->sm_percent;
		stats->memory_percent = process->memory_percent == NOT_AVAILABLE ? 0 : (uint32_t)process->memory_percent;
		stats->peak_bytes = process->peak_bytes;
		stats->started_microseconds = process->started_microseconds;
		/* "0 while running" (nvml.h). A process that ended by itself leaves no time of its end. */
		if (!runs && process->ended_microseconds != NOT_AVAILABLE)
			stats->time_milliseconds = (process->ended_microseconds - process->started_microseconds) / 1000;
		stats->is_running = (uint32_t)runs;
		return SUCCESS;
	}
	return NOT_FOUND;
}
