"""The machines that the false driver can be, by name.

Names, memory and PCI numbers are those that nvidia-smi and the PCI ID list show for these boards. What the driver reserves,
idle power and the memory of MIG profiles above 1g are estimates.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

MIB = 1024 * 1024
Fact = int | str

LIMITS_CALLS = frozenset({"nvmlDeviceSetMemoryLimits_v1", "nvmlDeviceGetMemoryLimits_v1"})
"""New in R615."""
_AFTER_R470 = frozenset(
    {
        "nvmlDeviceGetMemoryInfo_v2",  # R510
        "nvmlDeviceGetComputeRunningProcesses_v3",  # R510
        "nvmlDeviceGetGraphicsRunningProcesses_v3",
        "nvmlDeviceGetMPSComputeRunningProcesses_v3",
        "nvmlDeviceGetCurrentClocksEventReasons",  # R535
        "nvmlDeviceGetNumaNodeId",
        "nvmlDeviceGetGpuFabricInfoV",
        "nvmlDeviceGetTemperatureV",  # R570
    }
)


@dataclass(frozen=True, kw_only=True)
class MigProfile:
    """A size of MIG device: NVIDIA MIG user guide, and what `nvidia-smi mig -lgip` lists."""

    memory_mib: int
    multiprocessors: int
    slices: int
    decoders: int = 1
    jpegs: int = 1
    ofas: int = 0


MIG_PROFILES: Mapping[str, MigProfile] = {
    "1g.18gb": MigProfile(memory_mib=16384, multiprocessors=16, slices=1),
    "1g.18gb+me": MigProfile(memory_mib=16384, multiprocessors=16, slices=1, ofas=1),
    "1g.35gb": MigProfile(memory_mib=33280, multiprocessors=26, slices=1),
    "2g.35gb": MigProfile(memory_mib=33280, multiprocessors=32, slices=2, decoders=2, jpegs=2),
    "3g.71gb": MigProfile(memory_mib=71424, multiprocessors=60, slices=3, decoders=3, jpegs=3),
    "4g.71gb": MigProfile(memory_mib=71424, multiprocessors=64, slices=4, decoders=4, jpegs=4),
    "7g.141gb": MigProfile(memory_mib=143360, multiprocessors=132, slices=7, decoders=7, jpegs=7, ofas=1),
}
_FIRST_GPU_INSTANCE = {1: 7, 2: 3, 3: 1, 4: 1, 7: 0}
"""The driver numbers GPU instances by their place: those of one size from here on."""


@dataclass(frozen=True, kw_only=True)
class FalseMig:
    """A MIG device at an index of its GPU. Indices may have holes."""

    uuid: str
    index: int
    profile: str
    gpu_instance: int
    compute_instance: int = 0


@dataclass(frozen=True, kw_only=True)
class FalseGpu:
    """One GPU. `facts` are those of native/state.h; one that is left out is one that it does not tell."""

    uuid: str
    name: str
    bus_id: str
    facts: Mapping[str, Fact]
    migs: tuple[FalseMig, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A host with its driver. `init_error` is what NVML's init answers, 0 for success."""

    name: str
    about: str
    gpus: tuple[FalseGpu, ...] = ()
    driver_version: str = "580.95.05"
    cuda_version: int = 13000
    init_error: int = 0
    absent: frozenset[str] = field(default=LIMITS_CALLS)

    @property
    def nvml_version(self) -> str:
        return f"{self.cuda_version // 1000}.{self.driver_version}"


# ---- boards ------------------------------------------------------------------------------------------------------------

_ANY: Mapping[str, Fact] = {
    "brand": 14,
    "utilization_percent": 0,
    "memory_utilization_percent": 0,
    "energy_millijoules": 1_000_000,
    "throttle_reasons": 0x1,
    "ecc_enabled": 1,
    "ecc_corrected": 0,
    "ecc_uncorrected": 0,
    "recovery_action": 0,
    "supported_events": 0x1F,
    "compute_mode": 0,
    "accounting_mode": 0,
    "persistence_mode": 1,
}
_REMAPS: Mapping[str, Fact] = {f"remapped_{what}": 0 for what in ("corrected", "uncorrected", "pending", "failure")}
_H200: Mapping[str, Fact] = {
    **_ANY,
    **_REMAPS,
    "architecture": 9,
    "cuda_major": 9,
    "cuda_minor": 0,
    "pci_device_id": 0x233510DE,
    "pci_subsystem_id": 0x18BE10DE,
    "memory_total_bytes": 143771 * MIB,
    "memory_reserved_bytes": 609 * MIB,
    "power_milliwatts": 76_000,
    "power_limit_milliwatts": 700_000,
    "temperature_celsius": 31,
    "mig_max_count": 7,
    "mig_enabled": 0,
}
_A100: Mapping[str, Fact] = {
    **_ANY,
    **_REMAPS,
    "architecture": 7,
    "cuda_major": 8,
    "cuda_minor": 0,
    "pci_device_id": 0x20B210DE,
    "pci_subsystem_id": 0x146310DE,
    "memory_total_bytes": 81920 * MIB,
    "memory_reserved_bytes": 619 * MIB,
    "power_milliwatts": 61_000,
    "power_limit_milliwatts": 400_000,
    "temperature_celsius": 33,
    "mig_max_count": 7,
    "mig_enabled": 0,
}
_T4: Mapping[str, Fact] = {
    **_ANY,
    "architecture": 6,
    "cuda_major": 7,
    "cuda_minor": 5,
    "pci_device_id": 0x1EB810DE,
    "pci_subsystem_id": 0x12A210DE,
    "memory_total_bytes": 15360 * MIB,
    "memory_reserved_bytes": 443 * MIB,
    "power_milliwatts": 9_000,
    "power_limit_milliwatts": 70_000,
    "temperature_celsius": 28,
    "retired_pending": 0,
}
_CPUS = ("0-47,96-143", "48-95,144-191")


def _uuid(kind: str, *path: object) -> str:
    """The same for the same path, always."""
    return f"{kind}-{uuid.uuid5(uuid.NAMESPACE_URL, '/'.join(map(str, ('nodeservice', 'false-driver', *path))))}"


def _switched(count: int) -> dict[str, Fact]:
    """NVLinks that go to NVSwitches, of which an eight-GPU board has four."""
    return {f"nvlink.{link}": f"switch 00000000:{0xE1 + link % 4:02X}:00.0" for link in range(count)}


def _down(count: int) -> dict[str, Fact]:
    """NVLinks without a bridge."""
    return {f"nvlink.{link}": "down" for link in range(count)}


def _gpu(machine: str, minor: int, name: str, bus: int, node: int, facts: Mapping[str, Fact]) -> FalseGpu:
    place: dict[str, Fact] = {"minor": minor, "numa_node": node, "cpus": _CPUS[node], "pcie_switch": f"{bus - 1:02x}"}
    return FalseGpu(
        uuid=_uuid("GPU", machine, minor),
        name=name,
        bus_id=f"00000000:{bus:02X}:00.0",
        facts={**place, **facts},
    )


def mig_devices(gpu: str, layout: Mapping[int, str]) -> tuple[FalseMig, ...]:
    """The devices that a layout, index → profile, makes of a GPU. Same index and same profile: the same device."""
    taken: dict[int, int] = {}
    devices = []
    for index, profile in sorted(layout.items()):
        slices = MIG_PROFILES[profile].slices
        nth = taken[slices] = taken.get(slices, -1) + 1
        devices.append(
            FalseMig(
                uuid=_uuid("MIG", gpu, index, profile),
                index=index,
                profile=profile,
                gpu_instance=_FIRST_GPU_INSTANCE[slices] + nth,
            )
        )
    return tuple(devices)


def _with_mig(gpu: FalseGpu, layout: Mapping[int, str]) -> FalseGpu:
    return replace(gpu, facts={**gpu.facts, "mig_enabled": 1}, migs=mig_devices(gpu.uuid, layout))


# ---- machines ----------------------------------------------------------------------------------------------------------

_EIGHT_BUSES = (0x1B, 0x43, 0x52, 0x61, 0x9D, 0xC3, 0xD1, 0xDF)


def _eight(machine: str) -> tuple[FalseGpu, ...]:
    facts = {**_H200, **_switched(18), "fabric_state": 3}
    return tuple(_gpu(machine, i, "NVIDIA H200", bus, i // 4, facts) for i, bus in enumerate(_EIGHT_BUSES))


def _machines() -> tuple[Machine, ...]:
    first, second = _eight("h200-mig")[:2]
    h200_nvl = {**_H200, "pci_device_id": 0x233B10DE, "power_limit_milliwatts": 600_000, **_down(18)}
    a100_pcie = {**_A100, "pci_device_id": 0x20B510DE, "power_limit_milliwatts": 300_000, **_down(12)}
    one = _eight("none")[:1]
    return (
        Machine(name="h200x8", about="eight H200 on NVSwitches, two NUMA nodes", gpus=_eight("h200x8")),
        Machine(
            name="h200-mig",
            about="two H200, the first split by MIG into four devices with holes between their indices",
            gpus=(_with_mig(first, {0: "3g.71gb", 2: "2g.35gb", 3: "1g.18gb", 6: "1g.18gb"}), second),
        ),
        Machine(
            name="t4x4",
            about="four T4: no NVLink, no MIG, no row remapping",
            gpus=tuple(_gpu("t4x4", i, "Tesla T4", 0x18 + 8 * i, i // 2, _T4) for i in range(4)),
        ),
        Machine(
            name="mixed",
            about="an H200 NVL, an A100 and a T4, without NVLink bridges",
            gpus=(
                _gpu("mixed", 0, "NVIDIA H200 NVL", 0x17, 0, h200_nvl),
                _gpu("mixed", 1, "NVIDIA A100 80GB PCIe", 0x65, 0, a100_pcie),
                _gpu("mixed", 2, "Tesla T4", 0xCA, 1, _T4),
            ),
        ),
        Machine(
            name="r615",
            about="two H200 with driver 615, which limits the memory of cgroups",
            gpus=_eight("r615")[:2],
            driver_version="615.71.09",
            cuda_version=13040,
            absent=frozenset(),
        ),
        Machine(
            name="old",
            about="two A100 with driver 470: no version 3 of the process calls, no version 2 of memory, no recovery action",
            gpus=tuple(
                _gpu("old", i, "NVIDIA A100-SXM4-80GB", bus, i, {**_A100, "recovery_action": "", **_switched(12)})
                for i, bus in enumerate((0x07, 0xB7))
            ),
            driver_version="470.256.02",
            cuda_version=11040,
            absent=LIMITS_CALLS | _AFTER_R470,
        ),
        Machine(name="library-only", about="the library without driver and without NVIDIA hardware", init_error=9),
        Machine(name="driver-not-loaded", about="an H200 whose kernel driver is not loaded", gpus=one, init_error=9),
        Machine(name="no-permission", about="an H200 whose /dev/nvidiactl may not be opened", gpus=one, init_error=4),
        Machine(
            name="version-mismatch", about="an H200 after a driver update without restart", gpus=one, init_error=18
        ),
        Machine(
            name="blocked", about='an H200 whose devices the cgroup bars: "unknown error"', gpus=one, init_error=999
        ),
    )


MACHINES: Mapping[str, Machine] = {machine.name: machine for machine in _machines()}
