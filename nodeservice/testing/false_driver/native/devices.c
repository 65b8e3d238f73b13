/* Which devices there are and what they are: count, handles, names, addresses. */
#include "calls.h"

#include <stdio.h>
#include <string.h>

/* Counts all GPUs, those that are lost or that this process may not open too (nvml.h at nvmlDeviceGetHandleByIndex_v2). */
nvml_code nvmlDeviceGetCount_v2(unsigned *count)
{
	CALL();
	TELL(count, state.gpu_count);
}

/* Getting a handle is what makes NVML open the GPU. */
static nvml_code open_gpu(const char *call, const struct gpu *gpu, const struct mig *mig, nvml_device *device)
{
	nvml_code code = give_handle(gpu, mig, device);
	if (code != SUCCESS)
		return code;
	if (gpu->denied == 1)
		return NO_PERMISSION;
	struct target unused;
	return find_target(call, *device, &unused);
}

nvml_code nvmlDeviceGetHandleByIndex_v2(unsigned index, nvml_device *device)
{
	CALL();
	if (!device || index >= state.gpu_count)
		return INVALID_ARGUMENT;
	return open_gpu(__func__, &state.gpus[index], NULL, device);
}

/* Takes MIG UUIDs as well. nvml.h knows "a GPU is lost" here when *any* GPU is: we say so only where the search met no match. It
 * does not list NO_PERMISSION: a GPU that may not be opened cannot tell its UUID, so it is not found. */
nvml_code nvmlDeviceGetHandleByUUID(const char *uuid, nvml_device *device)
{
	CALL();
	if (!uuid || !device)
		return INVALID_ARGUMENT;
	const struct mig *mig = mig_by_uuid(uuid);
	const struct gpu *gpu = gpu_by_uuid(mig ? mig->gpu : uuid);
	if (gpu)
		return gpu->denied == 1 ? NOT_FOUND : open_gpu(__func__, gpu, mig, device);
	for (size_t i = 0; i < state.gpu_count; i++)
		if (state.gpus[i].lost == 1)
			return GPU_IS_LOST;
	return NOT_FOUND;
}

/* "DOMAIN:BUS:DEVICE.FUNCTION" with a domain of any length, or without one. */
static int read_bus_id(const char *text, unsigned *domain, unsigned *bus, unsigned *device)
{
	unsigned function;
	if (sscanf(text, "%x:%x:%x.%x", domain, bus, device, &function) == 4)
		return 1;
	*domain = 0;
	return sscanf(text, "%x:%x.%x", bus, device, &function) == 3;
}

nvml_code nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvml_device *device)
{
	CALL();
	unsigned asked[3], has[3];
	if (!bus_id || !device || !read_bus_id(bus_id, &asked[0], &asked[1], &asked[2]))
		return INVALID_ARGUMENT;
	for (size_t i = 0; i < state.gpu_count; i++)
		if (read_bus_id(state.gpus[i].bus_id, &has[0], &has[1], &has[2]) && memcmp(asked, has, sizeof(has)) == 0)
			return open_gpu(__func__, &state.gpus[i], NULL, device);
	return NOT_FOUND;
}

/* Of a MIG device, the index under its GPU. */
nvml_code nvmlDeviceGetIndex(nvml_device device, unsigned *index)
{
	CALL_ON(device);
	TELL(index, on.mig ? on.mig->index : (uint64_t)(on.gpu - state.gpus));
}

nvml_code nvmlDeviceGetMinorNumber(nvml_device device, unsigned *minor)
{
	CALL_ON_GPU(device);
	TELL(minor, on.gpu->minor);
}

nvml_code nvmlDeviceGetUUID(nvml_device device, char *uuid, unsigned length)
{
	CALL_ON(device);
	return tell_text(uuid, length, on.mig ? on.mig->uuid : on.gpu->uuid);
}

/* Of a MIG device, "NVIDIA H200 MIG 1g.18gb". */
nvml_code nvmlDeviceGetName(nvml_device device, char *name, unsigned length)
{
	CALL_ON(device);
	char full[NAME_SIZE + 48];
	snprintf(full, sizeof(full), on.mig ? "%s MIG %s" : "%s", on.gpu->name, on.mig ? on.mig->profile : "");
	return tell_text(name, length, full);
}

nvml_code nvmlDeviceGetSerial(nvml_device device, char *serial, unsigned length)
{
	CALL_ON_GPU(device);
	return *on.gpu->serial ? tell_text(serial, length, on.gpu->serial) : NOT_SUPPORTED;
}

nvml_code nvmlDeviceGetBrand(nvml_device device, unsigned *brand)
{
	CALL_ON_GPU(device);
	TELL(brand, on.gpu->brand);
}

nvml_code nvmlDeviceGetArchitecture(nvml_device device, unsigned *architecture)
{
	CALL_ON(device);
	TELL(architecture, on.gpu->architecture);
}

nvml_code nvmlDeviceGetCudaComputeCapability(nvml_device device, int *major, int *minor)
{
	CALL_ON(device);
	if (!major)
		return INVALID_ARGUMENT;
	*major = (int)on.gpu->cuda_major;
	TELL(minor, on.gpu->cuda_minor);
}

nvml_code nvmlDeviceGetPciInfo_v3(nvml_device device, pci_info *pci)
{
	CALL_ON_GPU(device);
	if (!pci)
		return INVALID_ARGUMENT;
	memset(pci, 0, sizeof(*pci));
	read_bus_id(on.gpu->bus_id, &pci->domain, &pci->bus, &pci->device);
	pci->device_id = (uint32_t)on.gpu->pci_device_id;
	pci->subsystem_id = (uint32_t)on.gpu->pci_subsystem_id;
	snprintf(pci->bus_id_legacy, sizeof(pci->bus_id_legacy), "%04X:%02X:%02X.0", pci->domain & 0xFFFF, pci->bus & 0xFF, pci->device & 0xFF);
	snprintf(pci->bus_id, sizeof(pci->bus_id), "%08X:%02X:%02X.0", pci->domain, pci->bus, pci->device);
	return SUCCESS;
}

nvml_code nvmlDeviceGetPersistenceMode(nvml_device device, unsigned *mode)
{
	CALL_ON_GPU(device);
	TELL(mode, on.gpu->persistence_mode);
}
