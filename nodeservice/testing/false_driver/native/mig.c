/* Multi-instance GPUs: their mode and their devices. */
#include "calls.h"

/* NOT_SUPPORTED on a GPU that cannot be split; the pending mode is the one after a reset. */
nvml_code nvmlDeviceGetMigMode(nvml_device device, unsigned *current, unsigned *pending)
{
	CALL_ON_GPU(device);
	if (!current || !pending)
		return INVALID_ARGUMENT;
	if (on.gpu->mig_max_count == NOT_AVAILABLE)
		return NOT_SUPPORTED;
	*current = (unsigned)on.gpu->mig_enabled;
	*pending = on.gpu->mig_pending == NOT_AVAILABLE ? *current : (unsigned)on.gpu->mig_pending;
	return SUCCESS;
}

/* "Returns zero if MIG is not supported or enabled" (nvml.h). */
nvml_code nvmlDeviceGetMaxMigDeviceCount(nvml_device device, unsigned *count)
{
	CALL_ON_GPU(device);
	TELL(count, on.gpu->mig_enabled == 1 && on.gpu->mig_max_count != NOT_AVAILABLE ? on.gpu->mig_max_count : 0);
}

/* The indices have holes, which are NOT_FOUND. */
nvml_code nvmlDeviceGetMigDeviceHandleByIndex(nvml_device device, unsigned index, nvml_device *mig_device)
{
	CALL_ON_GPU(device);
	if (on.gpu->mig_max_count == NOT_AVAILABLE)
		return NOT_SUPPORTED;
	if (!mig_device || index >= on.gpu->mig_max_count)
		return INVALID_ARGUMENT;
	const struct mig *mig = on.gpu->mig_enabled == 1 ? mig_at(on.gpu, index) : NULL;
	return mig ? give_handle(on.gpu, mig, mig_device) : NOT_FOUND;
}

nvml_code nvmlDeviceIsMigDeviceHandle(nvml_device device, unsigned *is_mig)
{
	CALL_ON(device);
	TELL(is_mig, on.mig != NULL);
}

nvml_code nvmlDeviceGetGpuInstanceId(nvml_device device, unsigned *id)
{
	CALL_ON(device);
	TELL(id, on.mig ? on.mig->gpu_instance : NOT_AVAILABLE);
}

nvml_code nvmlDeviceGetComputeInstanceId(nvml_device device, unsigned *id)
{
	CALL_ON(device);
	TELL(id, on.mig ? on.mig->compute_instance : NOT_AVAILABLE);
}

nvml_code nvmlDeviceGetDeviceHandleFromMigDeviceHandle(nvml_device mig_device, nvml_device *device)
{
	CALL_ON(mig_device);
	if (!on.mig || !device)
		return INVALID_ARGUMENT;
	return give_handle(on.gpu, NULL, device);
}

/* Only for MIG devices. */
nvml_code nvmlDeviceGetAttributes_v2(nvml_device device, mig_attributes *attributes)
{
	CALL_ON(device);
	if (!attributes)
		return INVALID_ARGUMENT;
	if (!on.mig)
		return NOT_SUPPORTED;
	const struct mig *mig = on.mig;
	*attributes = (mig_attributes){
		.multiprocessors = (uint32_t)mig->multiprocessors,
		.copy_engines = (uint32_t)mig->copy_engines,
		.decoders = (uint32_t)mig->decoders,
		.encoders = (uint32_t)mig->encoders,
		.jpegs = (uint32_t)mig->jpegs,
		.ofas = (uint32_t)mig->ofas,
		.gpu_slices = (uint32_t)mig->gpu_slices,
		.compute_slices = (uint32_t)mig->compute_slices,
		.memory_mib = mig->memory_total_bytes / (1024 * 1024),
	};
	return SUCCESS;
}
