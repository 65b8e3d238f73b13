/* What ails a GPU: ECC errors, remapped rows, retired pages, and the action that the driver asks for. */
#include "calls.h"

#include <time.h>

nvml_code nvmlDeviceGetEccMode(nvml_device device, unsigned *current, unsigned *pending)
{
	CALL_ON_GPU(device);
	if (!current)
		return INVALID_ARGUMENT;
	*current = (unsigned)on.gpu->ecc_enabled;
	TELL(pending, on.gpu->ecc_enabled);
}

static uint64_t sum(uint64_t since_load, uint64_t before)
{
	return since_load == NOT_AVAILABLE ? NOT_AVAILABLE : since_load + (before == NOT_AVAILABLE ? 0 : before);
}

/* Volatile counters start with the driver, aggregate ones are kept in the board's memory for its lifetime. */
nvml_code nvmlDeviceGetTotalEccErrors(nvml_device device, unsigned type, unsigned counter, uint64_t *count)
{
	CALL_ON_GPU(device);
	if (type > ECC_UNCORRECTED || counter > ECC_AGGREGATE)
		return INVALID_ARGUMENT;
	if (on.gpu->ecc_enabled != 1)
		return NOT_SUPPORTED;
	uint64_t since_load = type == ECC_CORRECTED ? on.gpu->ecc_corrected : on.gpu->ecc_uncorrected;
	uint64_t before = type == ECC_CORRECTED ? on.gpu->ecc_corrected_before : on.gpu->ecc_uncorrected_before;
	TELL(count, counter == ECC_VOLATILE ? since_load : sum(since_load, before));
}

/* Ampere and newer; not while MIG is on. */
nvml_code nvmlDeviceGetRemappedRows(nvml_device device, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failure)
{
	CALL_ON_GPU(device);
	if (!corrected || !uncorrected || !pending || !failure)
		return INVALID_ARGUMENT;
	if (on.gpu->mig_enabled == 1 || on.gpu->remapped_corrected == NOT_AVAILABLE)
		return NOT_SUPPORTED;
	*corrected = (unsigned)on.gpu->remapped_corrected;
	*uncorrected = (unsigned)on.gpu->remapped_uncorrected;
	*pending = (unsigned)on.gpu->remapped_pending;
	*failure = (unsigned)on.gpu->remapped_failure;
	return SUCCESS;
}

/* What came before row remapping: before Ampere. */
nvml_code nvmlDeviceGetRetiredPagesPendingStatus(nvml_device device, unsigned *pending)
{
	CALL_ON_GPU(device);
	TELL(pending, on.gpu->retired_pending);
}

/* ---- field values ---- */

enum {
	FIELD_ECC_CURRENT = 1,
	FIELD_ENERGY = 83,
	FIELD_NVLINK_COUNT = 91,
	FIELD_REMAPPED_CORRECTED = 142,
	FIELD_REMAPPED_UNCORRECTED = 143,
	FIELD_REMAPPED_PENDING = 144,
	FIELD_REMAPPED_FAILURE = 145,
	FIELD_POWER_AVERAGE = 185,
	FIELD_POWER_INSTANT = 186,
	FIELD_RECOVERY_ACTION = 230,
};

static uint64_t count_links(const struct gpu *gpu)
{
	uint64_t count = 0;
	for (size_t i = 0; i < MAX_LINKS; i++)
		count += (uint64_t)gpu->links[i].exists;
	return count;
}

static uint64_t field_of(const struct gpu *gpu, uint32_t field, uint32_t *type)
{
	uint64_t remapped[] = {gpu->remapped_corrected, gpu->remapped_uncorrected, gpu->remapped_pending, gpu->remapped_failure};
	*type = VALUE_U32;
	switch (field) {
	case FIELD_ECC_CURRENT:
		return gpu->ecc_enabled;
	case FIELD_ENERGY:
		*type = VALUE_U64;
		return gpu->energy_millijoules;
	case FIELD_NVLINK_COUNT:
		return count_links(gpu);
	case FIELD_REMAPPED_CORRECTED:
	case FIELD_REMAPPED_UNCORRECTED:
	case FIELD_REMAPPED_PENDING:
	case FIELD_REMAPPED_FAILURE:
		return gpu->mig_enabled == 1 ? NOT_AVAILABLE : remapped[field - FIELD_REMAPPED_CORRECTED];
	case FIELD_POWER_AVERAGE:
	case FIELD_POWER_INSTANT:
		return gpu->power_milliwatts;
	case FIELD_RECOVERY_ACTION:
		return gpu->recovery_action;
	default:
		return NOT_AVAILABLE;
	}
}

/* The call succeeds although a field is not supported: each value has its own code (nvml.h). */
nvml_code nvmlDeviceGetFieldValues(nvml_device device, int count, field_value *values)
{
	CALL_ON_GPU(device);
	struct timespec now;
	if (!values || count < 0)
		return INVALID_ARGUMENT;
	clock_gettime(CLOCK_REALTIME, &now);
	for (int i = 0; i < count; i++) {
		uint64_t number = field_of(on.gpu, values[i].field, &values[i].type);
		values[i].at_microseconds = (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
		values[i].latency_microseconds = 0;
		values[i].code = number == NOT_AVAILABLE ? NOT_SUPPORTED : SUCCESS;
		values[i].value.u64 = number == NOT_AVAILABLE ? 0 : number;
	}
	return SUCCESS;
}
