"""Reads one GPU through NVML: what never changes once, what changes slowly now and then, what changes fast at each look.

Sources: nvml.h (units, bits, field ids), which the binding follows name by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from nodeservice.gpu.binding import optional, text
from nodeservice.gpu.faults import FUNCTION_NOT_FOUND, INVALID_ARGUMENT, NO_PERMISSION, NOT_FOUND, NOT_SUPPORTED
from nodeservice.ports import Gpu, GpuProcess, MigInstance

N = TypeVar("N", int, float)

_UNCORRECTED, _VOLATILE = 1, 0
_RECOVERY_ACTION = 230
"""NVML_FI_DEV_GET_GPU_RECOVERY_ACTION."""
_TEMPERATURE_GPU = 0
_NO_INSTANCE = 0xFFFFFFFF
_EXCLUSIVE_PROCESS = 3
"""The compute mode in which an MPS server can be."""
_WORD_BITS = 64
_NVLINK_CLOSENESS = 1000
_FARTHEST_TOPOLOGY = 60
"""Beyond NVML_TOPOLOGY_SYSTEM, which is 50; the nearest, NVML_TOPOLOGY_INTERNAL, is 0."""
_WITHOUT_ANSWER = frozenset({NOT_SUPPORTED, FUNCTION_NOT_FOUND, NOT_FOUND, INVALID_ARGUMENT})


@dataclass(slots=True)
class Device:
    """A handle, good until the next nvmlShutdown, and the last that was read through it."""

    handle: Any
    gpu: Gpu
    mig_handles: dict[str, Any] = field(default_factory=dict)
    graphics: tuple[GpuProcess, ...] = ()
    """Those of the slow look: tasks compute."""


def open_device(nvml: Any, handle: Any) -> Device:
    """What never changes, and a first look at the rest."""
    pci = optional(nvml, nvml.nvmlDeviceGetPciInfo, handle)
    capability = optional(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    address = text(pci.busId).lower() if pci is not None else None
    gpu = Gpu(
        uuid=text(nvml.nvmlDeviceGetUUID(handle)),
        name=text(nvml.nvmlDeviceGetName(handle)),
        memory_total_bytes=0,
        pci_address=address,
        compute_capability=(int(capability[0]), int(capability[1])) if capability is not None else None,
        numa_node=_numa_node(nvml, handle, address),
        cpu_ids=_cpu_ids(nvml, handle),
        memory_limits=hasattr(nvml, "nvmlDeviceGetMemoryLimits_v1") and _has(nvml, "nvmlDeviceSetMemoryLimits_v1"),
    )
    device = Device(handle, gpu)
    read_slow(nvml, device)
    read_fast(nvml, device)
    return device


def read_fast(nvml: Any, device: Device) -> None:
    """Memory, load and processes. Raises NVMLError for a GPU that is lost."""
    handle, gpu = device.handle, device.gpu
    memory = _memory(nvml, handle)
    load = None if gpu.mig_enabled else optional(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    device.gpu = replace(
        gpu,
        memory_total_bytes=int(memory.total) if memory is not None else 0,
        memory_used_bytes=int(memory.used) if memory is not None else None,
        memory_reserved_bytes=int(getattr(memory, "reserved", 0)) if memory is not None else 0,
        utilization_percent=float(load.gpu) if load is not None else None,
        processes=_processes(nvml, device),
        mig_instances=_instances_now(nvml, device),
        lost="",
    )


def read_slow(nvml: Any, device: Device) -> None:
    """Health, power, modes and how it is split. Raises NVMLError for a GPU that is lost."""
    handle = device.handle
    mig = optional(nvml, nvml.nvmlDeviceGetMigMode, handle)
    mig_enabled = mig is not None and bool(mig[0])
    slices = _number(int, nvml, nvml.nvmlDeviceGetMaxMigDeviceCount, handle) if mig_enabled else None
    device.graphics = _graphics_processes(nvml, handle)
    instances = _mig_instances(nvml, device) if mig_enabled else ()
    remapped = None if mig_enabled else optional(nvml, nvml.nvmlDeviceGetRemappedRows, handle)
    ecc = optional(nvml, nvml.nvmlDeviceGetEccMode, handle)
    errors = optional(nvml, nvml.nvmlDeviceGetTotalEccErrors, handle, _UNCORRECTED, _VOLATILE)
    power = optional(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    limit = optional(nvml, nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
    device.gpu = replace(
        device.gpu,
        # A change of the MIG mode may change it (nvmlDeviceSetMigMode in nvml.h).
        minor=_number(int, nvml, nvml.nvmlDeviceGetMinorNumber, handle),
        mig_enabled=mig_enabled,
        mig_slice_count=slices or device.gpu.mig_slice_count,
        mig_instances=instances,
        ecc_enabled=bool(ecc[0]) if ecc is not None else None,
        ecc_uncorrected_count=int(errors) if errors is not None else None,
        remap_pending=bool(remapped[2]) if remapped is not None else _pages_pending(nvml, handle),
        remap_failed=bool(remapped[3]) if remapped is not None else None,
        recovery_action=_recovery_action(nvml, handle),
        power_watts=power / 1000 if power is not None else None,
        power_limit_watts=limit / 1000 if limit is not None else None,
        energy_millijoules=_number(int, nvml, nvml.nvmlDeviceGetTotalEnergyConsumption, handle),
        temperature_celsius=_number(float, nvml, nvml.nvmlDeviceGetTemperature, handle, _TEMPERATURE_GPU),
        throttle_reasons=_throttle_reasons(nvml, handle),
        compute_mode=_number(int, nvml, nvml.nvmlDeviceGetComputeMode, handle),
    )


def as_lost(gpu: Gpu, why: str) -> Gpu:
    """What was measured last is no more; what it is, and what its counters said, stays."""
    return replace(
        gpu,
        lost=why,
        memory_used_bytes=None,
        utilization_percent=None,
        power_watts=None,
        temperature_celsius=None,
        throttle_reasons=0,
        processes=(),
        mig_instances=tuple(replace(instance, memory_used_bytes=None) for instance in gpu.mig_instances),
    )


def read_closeness(nvml: Any, devices: Iterable[Device]) -> None:
    """How near they are to each other. That of one host never changes while its GPUs don't.

    What can't be read of it makes no GPU unwell: those that are so fail at the looks.
    """
    known = list(devices)
    addresses = {device.gpu.pci_address: device.gpu.uuid for device in known}
    for device in known:
        near = {
            other.gpu.uuid: max(0, _FARTHEST_TOPOLOGY - _topology(nvml, device, other))
            for other in known
            if other is not device
        }
        remotes, count = _nvlinks(nvml, device.handle)
        switched = count > 0 and not any(address in addresses for address in remotes)
        for uuid in near:
            direct = sum(1 for address in remotes if addresses.get(address) == uuid)
            # Links that end in switches reach all GPUs behind them with all their lanes.
            near[uuid] += _NVLINK_CLOSENESS * (count if switched else direct)
        device.gpu = replace(device.gpu, closeness=near, nvlink_count=count)


# ---- parts -------------------------------------------------------------------------------------------------------------


def _memory(nvml: Any, handle: Any) -> Any:
    """Version 2, whose `used` leaves out what the driver reserves; version 1 from drivers that lack it."""
    v2 = optional(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
    return v2 if v2 is not None else optional(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)


def _processes(nvml: Any, device: Device) -> tuple[GpuProcess, ...]:
    """Those that compute, by themselves or as clients of MPS, and those that draw, as of the slow look."""
    kinds = ("Compute", "MPSCompute") if device.gpu.compute_mode == _EXCLUSIVE_PROCESS else ("Compute",)
    found = {process.pid: process for process in device.graphics}
    for kind in kinds:
        found.update((process.pid, process) for process in _of_kind(nvml, kind, device.handle))
    return tuple(found.values())


def _graphics_processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...]:
    return tuple(_of_kind(nvml, "Graphics", handle))


def _of_kind(nvml: Any, kind: str, handle: Any) -> Iterator[GpuProcess]:
    """The binding falls back to no older call by itself."""
    for version in ("_v3", "_v2"):
        listed = _listed(nvml, f"nvmlDeviceGet{kind}RunningProcesses{version}", handle)
        if listed is None:
            continue
        for entry in listed:
            instance = getattr(entry, "gpuInstanceId", _NO_INSTANCE)
            used = entry.usedGpuMemory
            yield GpuProcess(
                pid=int(entry.pid),
                memory_bytes=int(used) if used is not None else None,
                gpu_instance_id=None if instance in (None, _NO_INSTANCE) else int(instance),
            )
        return


def _listed(nvml: Any, name: str, handle: Any) -> Any:
    try:
        return optional(nvml, getattr(nvml, name), handle)
    except nvml.NVMLError as error:
        if int(error.value) == NO_PERMISSION:  # of a GPU that is split, without root: its instances tell
            return None
        raise


def _throttle_reasons(nvml: Any, handle: Any) -> int:
    """The new name of the call first: the old one goes with CUDA 14."""
    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        reasons = optional(nvml, getattr(nvml, name), handle)
        if reasons is not None:
            return int(reasons)
    return 0


def _recovery_action(nvml: Any, handle: Any) -> int | None:
    """The driver's own verdict on the GPU's health; newer drivers alone give it."""
    values = optional(nvml, nvml.nvmlDeviceGetFieldValues, handle, [_RECOVERY_ACTION])
    if values is None or int(values[0].nvmlReturn) != 0:
        return None
    return int(values[0].value.uiVal)


def _pages_pending(nvml: Any, handle: Any) -> bool | None:
    """Before Ampere, memory pages are retired instead of rows remapped, at the next reset too."""
    pending = optional(nvml, nvml.nvmlDeviceGetRetiredPagesPendingStatus, handle)
    return None if pending is None else bool(pending)


def _instances_now(nvml: Any, device: Device) -> tuple[MigInstance, ...]:
    """As they were at the slow look, with their memory. A handle goes stale with its instance: then all are listed anew."""
    try:
        return tuple(_with_memory(nvml, device, instance) for instance in device.gpu.mig_instances)
    except nvml.NVMLError:
        return _mig_instances(nvml, device)


def _mig_instances(nvml: Any, device: Device) -> tuple[MigInstance, ...]:
    device.mig_handles = {}
    instances: list[MigInstance] = []
    for index in range(int(nvml.nvmlDeviceGetMaxMigDeviceCount(device.handle))):
        try:
            instances.append(_mig_instance(nvml, device, index))
        except nvml.NVMLError as error:
            if int(error.value) not in _WITHOUT_ANSWER:  # the indices have holes
                raise
    return tuple(instances)


def _mig_instance(nvml: Any, device: Device, index: int) -> MigInstance:
    handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(device.handle, index)
    name = text(nvml.nvmlDeviceGetName(handle))
    attributes = optional(nvml, nvml.nvmlDeviceGetAttributes_v2, handle)
    instance = MigInstance(
        uuid=text(nvml.nvmlDeviceGetUUID(handle)),
        name=name,
        # The name ends with it: "NVIDIA H200 MIG 1g.18gb".
        profile=name.rpartition(" ")[2],
        memory_total_bytes=0,
        gpu_instance_id=int(nvml.nvmlDeviceGetGpuInstanceId(handle)),
        compute_instance_id=int(nvml.nvmlDeviceGetComputeInstanceId(handle)),
        compute_slice_count=int(attributes.computeInstanceSliceCount) if attributes is not None else 1,
    )
    device.mig_handles[instance.uuid] = handle
    return _with_memory(nvml, device, instance)


def _with_memory(nvml: Any, device: Device, instance: MigInstance) -> MigInstance:
    memory = _memory(nvml, device.mig_handles[instance.uuid])
    if memory is None:
        return instance
    return replace(instance, memory_total_bytes=int(memory.total), memory_used_bytes=int(memory.used))


def _numa_node(nvml: Any, handle: Any, address: str | None) -> int | None:
    """NVML tells it only of GPUs that are NUMA nodes themselves; of others the kernel does."""
    node = _number(int, nvml, nvml.nvmlDeviceGetNumaNodeId, handle)
    if node is not None or address is None:
        return node
    # NVML writes eight digits for the PCI domain, sysfs four.
    domain, _, rest = address.partition(":")
    try:
        with open(f"/sys/bus/pci/devices/{domain[-4:]}:{rest}/numa_node", encoding="ascii") as file:
            node = int(file.read())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _cpu_ids(nvml: Any, handle: Any) -> tuple[int, ...]:
    words = -(-(os.cpu_count() or 1) // _WORD_BITS)
    masks = optional(nvml, nvml.nvmlDeviceGetCpuAffinity, handle, words)
    return tuple(
        word * _WORD_BITS + bit for word, mask in enumerate(masks or ()) for bit in range(_WORD_BITS) if mask >> bit & 1
    )


def _topology(nvml: Any, one: Device, other: Device) -> int:
    try:
        level = _number(int, nvml, nvml.nvmlDeviceGetTopologyCommonAncestor, one.handle, other.handle)
    except nvml.NVMLError:
        level = None
    return _FARTHEST_TOPOLOGY if level is None else level


def _nvlinks(nvml: Any, handle: Any) -> tuple[list[str], int]:
    """Where the active links end (addresses; a switch has one too), and how many there are."""
    remotes: list[str] = []
    count = 0
    for link in range(int(nvml.NVML_NVLINK_MAX_LINKS)):
        try:
            if not nvml.nvmlDeviceGetNvLinkState(handle, link):
                continue
            count += 1
            remote = optional(nvml, nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
        except nvml.NVMLError:  # it has no more of them
            break
        if remote is not None:
            remotes.append(text(remote.busId).lower())
    return remotes, count


def _number(kind: type[N], nvml: Any, call: Callable[..., Any], *args: Any) -> N | None:
    value = optional(nvml, call, *args)
    return None if value is None else kind(value)


def _has(nvml: Any, symbol: str) -> bool:
    """Whether the driver's library has a function; asking for it by a call could change something."""
    return getattr(nvml.nvmlLib, symbol, None) is not None
