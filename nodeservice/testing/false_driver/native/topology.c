/* Where a GPU sits: processors and memory near it, and its ways to other GPUs. */
#include "calls.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- processors and memory ---- */

static void set_bit(unsigned long *words, unsigned count, unsigned long bit)
{
	enum { BITS = sizeof(unsigned long) * CHAR_BIT };
	if (bit / BITS < count)
		words[bit / BITS] |= 1UL << (bit % BITS);
}

/* "0-3,8": what does not fit into the caller's array is left out. */
static nvml_code tell_cpus(const struct gpu *gpu, unsigned count, unsigned long *words)
{
	char list[sizeof(gpu->cpus)];
	char *rest = list, *range;
	if (count == 0 || !words)
		return INVALID_ARGUMENT;
	if (!*gpu->cpus)
		return NOT_SUPPORTED;
	memset(words, 0, count * sizeof(*words));
	snprintf(list, sizeof(list), "%s", gpu->cpus);
	while ((range = strsep(&rest, ","))) {
		char *end;
		unsigned long first = strtoul(range, &end, 10), last = *end == '-' ? strtoul(end + 1, NULL, 10) : first;
		for (unsigned long cpu = first; cpu <= last && cpu < 65536; cpu++)
			set_bit(words, count, cpu);
	}
	return SUCCESS;
}

nvml_code nvmlDeviceGetCpuAffinity(nvml_device device, unsigned count, unsigned long *words)
{
	CALL_ON_GPU(device);
	return tell_cpus(on.gpu, count, words);
}

/* Scope 0 is the NUMA node, 1 the socket; on the machines here they are the same. */
nvml_code nvmlDeviceGetCpuAffinityWithinScope(nvml_device device, unsigned count, unsigned long *words, unsigned scope)
{
	CALL_ON_GPU(device);
	return scope > 1 ? INVALID_ARGUMENT : tell_cpus(on.gpu, count, words);
}

nvml_code nvmlDeviceGetMemoryAffinity(nvml_device device, unsigned count, unsigned long *words, unsigned scope)
{
	CALL_ON_GPU(device);
	if (count == 0 || !words || scope > 1)
		return INVALID_ARGUMENT;
	if (on.gpu->numa_node == NOT_AVAILABLE)
		return NOT_SUPPORTED;
	memset(words, 0, count * sizeof(*words));
	set_bit(words, count, on.gpu->numa_node);
	return SUCCESS;
}

/* For GPUs that *are* a NUMA node, as with Grace; none is here. */
nvml_code nvmlDeviceGetNumaNodeId(nvml_device device, unsigned *node)
{
	CALL_ON_GPU(device);
	(void)node;
	return NOT_SUPPORTED;
}

/* ---- NVLink ---- */

static int has_links(const struct gpu *gpu, int active)
{
	for (size_t i = 0; i < MAX_LINKS; i++)
		if (gpu->links[i].exists && (!active || gpu->links[i].active))
			return 1;
	return 0;
}

/* A GPU without NVLink supports none; one with it knows the numbers of its links and no other. */
static nvml_code find_link(const struct gpu *gpu, unsigned number, const struct link **link)
{
	if (!has_links(gpu, 0))
		return NOT_SUPPORTED;
	if (number >= MAX_LINKS || !gpu->links[number].exists)
		return INVALID_ARGUMENT;
	*link = &gpu->links[number];
	return SUCCESS;
}

#define FIND_LINK(number) \
	const struct link *link; \
	if ((call.code = find_link(on.gpu, (number), &link)) != SUCCESS) \
	return call.code

nvml_code nvmlDeviceGetNvLinkState(nvml_device device, unsigned number, unsigned *active)
{
	CALL_ON_GPU(device);
	FIND_LINK(number);
	TELL(active, (uint64_t)link->active);
}

nvml_code nvmlDeviceGetNvLinkRemoteDeviceType(nvml_device device, unsigned number, unsigned *type)
{
	CALL_ON_GPU(device);
	FIND_LINK(number);
	TELL(type, link->active ? link->remote_type : NOT_AVAILABLE);
}

nvml_code nvmlDeviceGetNvLinkRemotePciInfo_v2(nvml_device device, unsigned number, pci_info *pci)
{
	CALL_ON_GPU(device);
	FIND_LINK(number);
	if (!pci)
		return INVALID_ARGUMENT;
	if (!link->active)
		return NOT_SUPPORTED;
	memset(pci, 0, sizeof(*pci));
	sscanf(link->remote_bus_id, "%x:%x:%x", &pci->domain, &pci->bus, &pci->device);
	snprintf(pci->bus_id_legacy, sizeof(pci->bus_id_legacy), "%04X:%02X:%02X.0", pci->domain & 0xFFFF, pci->bus & 0xFF, pci->device & 0xFF);
	snprintf(pci->bus_id, sizeof(pci->bus_id), "%s", link->remote_bus_id);
	return SUCCESS;
}

/* ---- the fabric of NVSwitches ---- */

static nvml_code tell_fabric(const struct gpu *gpu, fabric_v2 *fabric)
{
	uint32_t version = fabric->version;
	memset(fabric, 0, sizeof(*fabric));
	fabric->version = version;
	fabric->state = gpu->fabric_state == NOT_AVAILABLE ? FABRIC_NOT_SUPPORTED : (uint32_t)gpu->fabric_state;
	return SUCCESS;
}

/* Jobs that span GPUs work only when the state is "completed": the fabric manager has set the switches up. */
nvml_code nvmlDeviceGetGpuFabricInfoV(nvml_device device, fabric_v2 *fabric)
{
	CALL_ON_GPU(device);
	if (!fabric)
		return INVALID_ARGUMENT;
	if (fabric->version == STRUCT_VERSION(fabric_v3, 3))
		((fabric_v3 *)fabric)->health_summary = 0;
	else if (fabric->version != STRUCT_VERSION(fabric_v2, 2))
		return ARGUMENT_VERSION_MISMATCH;
	return tell_fabric(on.gpu, fabric);
}

/* ---- pairs ---- */

#define CALL_ON_PAIR(first, second) \
	CALL_ON_GPU(first); \
	struct target to; \
	if ((call.code = find_target(__func__, (second), &to)) != SUCCESS) \
		return call.code; \
	if (to.mig) \
	return NOT_SUPPORTED

static int share_node(const struct gpu *one, const struct gpu *two)
{
	return one->numa_node == two->numa_node && one->numa_node != NOT_AVAILABLE;
}

nvml_code nvmlDeviceGetTopologyCommonAncestor(nvml_device first, nvml_device second, unsigned *level)
{
	CALL_ON_PAIR(first, second);
	if (on.gpu == to.gpu)
		TELL(level, TOPOLOGY_INTERNAL);
	if (*on.gpu->pcie_switch && strcmp(on.gpu->pcie_switch, to.gpu->pcie_switch) == 0)
		TELL(level, TOPOLOGY_SINGLE);
	TELL(level, share_node(on.gpu, to.gpu) ? TOPOLOGY_NODE : TOPOLOGY_SYSTEM);
}

/* A simple rule: all that is linked reaches the other, PCIe carries reads and writes within a NUMA node, and MIG ends both (MIG user
 * guide, "no GPU to GPU P2P"). */
nvml_code nvmlDeviceGetP2PStatus(nvml_device first, nvml_device second, unsigned index, unsigned *status)
{
	CALL_ON_PAIR(first, second);
	int linked = has_links(on.gpu, 1) && has_links(to.gpu, 1);
	if (index >= P2P_INDEX_COUNT)
		return INVALID_ARGUMENT;
	if (on.gpu->mig_enabled == 1 || to.gpu->mig_enabled == 1)
		TELL(status, P2P_NOT_SUPPORTED);
	if (linked && index != P2P_PCI)
		TELL(status, P2P_OK);
	if (index == P2P_NVLINK || index == P2P_ATOMICS)
		TELL(status, P2P_NOT_SUPPORTED);
	TELL(status, share_node(on.gpu, to.gpu) ? P2P_OK : P2P_CHIPSET_NOT_SUPPORTED);
}
