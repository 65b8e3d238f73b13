/* What changes while a GPU works: memory, load, power, temperature, clocks. */
#include "calls.h"
#include "limits.h"
#include "processes.h"

static int mig_is_on(const struct target *on)
{
	return on->gpu->mig_enabled == 1;
}

/* ---- memory ---- */

/* total = used + reserved + free */
struct memory {
	uint64_t total, reserved, used, free;
};

static nvml_code read_memory(const struct target *on, struct memory *memory)
{
	uint64_t total = on->mig ? on->mig->memory_total_bytes : on->gpu->memory_total_bytes;
	uint64_t reserved = on->mig ? on->mig->memory_reserved_bytes : on->gpu->memory_reserved_bytes;
	uint64_t used = on->mig ? on->mig->memory_used_bytes : on->gpu->memory_used_bytes;
	if (total == NOT_AVAILABLE)
		return NOT_SUPPORTED;
	/* "In MIG mode, if device handle is provided, the API returns aggregate information, only if the caller has appropriate
	 * privileges" (nvml.h). */
	if (!on->mig && mig_is_on(on) && !is_privileged())
		return NO_PERMISSION;
	if (reserved == NOT_AVAILABLE)
		reserved = 0;
	if (used == NOT_AVAILABLE)
		used = bytes_of_processes(on);
	if (used > total - reserved)
		used = total - reserved;
	*memory = (struct memory){total, reserved, used, total - reserved - used};
	return SUCCESS;
}

/* Version 1 counts what the driver reserves as used. */
nvml_code nvmlDeviceGetMemoryInfo(nvml_device device, memory_v1 *memory)
{
	CALL_ON(device);
	struct memory read;
	if (!memory)
		return INVALID_ARGUMENT;
	nvml_code code = read_memory(&on, &read);
	if (code == SUCCESS)
		*memory = (memory_v1){read.total, read.free, read.used + read.reserved};
	return code;
}

nvml_code nvmlDeviceGetMemoryInfo_v2(nvml_device device, memory_v2 *memory)
{
	CALL_ON(device);
	struct memory read;
	if (!memory)
		return INVALID_ARGUMENT;
	if (memory->version != STRUCT_VERSION(memory_v2, 2))
		return ARGUMENT_VERSION_MISMATCH;
	nvml_code code = read_memory(&on, &read);
	/* Since R615, a caller whose cgroup has a limit is told of its share ("MPS v3 memory partitioning"; how the driver splits what
	 * is left between reserved and free, the page does not say). */
	const struct memory_limit *limit = on.mig ? NULL : limit_of_caller(on.gpu);
	if (code == SUCCESS && limit && limit->hard_bytes < read.total) {
		uint64_t used = bytes_in(&on, limit->cgroup);
		used = used < limit->hard_bytes ? used : limit->hard_bytes;
		read = (struct memory){limit->hard_bytes, 0, used, limit->hard_bytes - used};
	}
	if (code == SUCCESS)
		*memory = (memory_v2){memory->version, read.total, read.reserved, read.free, read.used};
	return code;
}

/* ---- load, power, temperature ---- */

/* "On MIG-enabled GPUs, querying device utilization rates is not currently supported" (nvml.h). */
nvml_code nvmlDeviceGetUtilizationRates(nvml_device device, utilization *rates)
{
	CALL_ON_GPU(device);
	if (!rates)
		return INVALID_ARGUMENT;
	if (mig_is_on(&on) || on.gpu->utilization_percent == NOT_AVAILABLE)
		return NOT_SUPPORTED;
	uint64_t memory = on.gpu->memory_utilization_percent;
	*rates = (utilization){(uint32_t)on.gpu->utilization_percent, memory == NOT_AVAILABLE ? 0 : (uint32_t)memory};
	return SUCCESS;
}

nvml_code nvmlDeviceGetPowerUsage(nvml_device device, unsigned *milliwatts)
{
	CALL_ON_GPU(device);
	TELL(milliwatts, on.gpu->power_milliwatts);
}

nvml_code nvmlDeviceGetEnforcedPowerLimit(nvml_device device, unsigned *milliwatts)
{
	CALL_ON_GPU(device);
	TELL(milliwatts, on.gpu->power_limit_milliwatts);
}

nvml_code nvmlDeviceGetPowerManagementLimit(nvml_device device, unsigned *milliwatts)
{
	CALL_ON_GPU(device);
	TELL(milliwatts, on.gpu->power_limit_milliwatts);
}

/* Since the driver was loaded. Here it stands still unless it is set. */
nvml_code nvmlDeviceGetTotalEnergyConsumption(nvml_device device, uint64_t *millijoules)
{
	CALL_ON_GPU(device);
	TELL(millijoules, on.gpu->energy_millijoules);
}

nvml_code nvmlDeviceGetTemperature(nvml_device device, unsigned sensor, unsigned *celsius)
{
	CALL_ON_GPU(device);
	if (sensor != TEMPERATURE_GPU)
		return INVALID_ARGUMENT;
	TELL(celsius, on.gpu->temperature_celsius);
}

nvml_code nvmlDeviceGetTemperatureV(nvml_device device, temperature_v1 *temperature)
{
	CALL_ON_GPU(device);
	if (!temperature || temperature->sensor != TEMPERATURE_GPU)
		return INVALID_ARGUMENT;
	if (temperature->version != STRUCT_VERSION(temperature_v1, 1))
		return ARGUMENT_VERSION_MISMATCH;
	TELL(&temperature->celsius, on.gpu->temperature_celsius);
}

/* The old name and the new one, since R535. */
nvml_code nvmlDeviceGetCurrentClocksThrottleReasons(nvml_device device, uint64_t *reasons)
{
	CALL_ON_GPU(device);
	TELL(reasons, on.gpu->throttle_reasons);
}

nvml_code nvmlDeviceGetCurrentClocksEventReasons(nvml_device device, uint64_t *reasons)
{
	CALL_ON_GPU(device);
	TELL(reasons, on.gpu->throttle_reasons);
}
