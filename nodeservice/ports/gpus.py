"""The GPUs of this host: what they are, how they are, who uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nodeservice.core.model import AttemptId
from nodeservice.ports.disk import Enforcement


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that holds memory of a GPU. `memory_bytes` None: the driver does not tell. `pid` as seen from here."""

    pid: int
    memory_bytes: int | None
    gpu_instance_id: int | None = None
    """Of a MIG instance; None on a GPU that is not split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigInstance:
    """A part of a GPU that the hardware keeps apart."""

    uuid: str
    name: str
    profile: str
    """As nvidia-smi names it, such as 1g.18gb."""
    memory_total_bytes: int
    memory_used_bytes: int | None = None
    gpu_instance_id: int
    compute_instance_id: int
    compute_slice_count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU, named by its UUID. Optional values are None where the driver does not tell."""

    uuid: str
    name: str
    memory_total_bytes: int
    memory_used_bytes: int | None = None
    """By processes and MIG instances; without what the driver reserves."""
    memory_reserved_bytes: int = 0
    utilization_percent: float | None = None
    pci_address: str | None = None
    minor: int | None = None
    """Its device node is /dev/nvidiaMINOR."""
    compute_capability: tuple[int, int] | None = None
    numa_node: int | None = None
    cpu_ids: tuple[int, ...] = ()
    """The CPUs that are near it; empty where the driver does not tell."""
    mig_enabled: bool = False
    mig_slice_count: int = 7
    """Into how many slices its compute can be split: 7 on A100, H100, H200 and B200, less on smaller ones."""
    mig_instances: tuple[MigInstance, ...] = ()
    closeness: Mapping[str, int] = field(default_factory=dict)
    """To other GPUs, by UUID; higher is better. 1,000 for each NVLink, and less than that for a way over PCI Express."""
    nvlink_count: int = 0
    ecc_enabled: bool | None = None
    ecc_uncorrected_count: int | None = None
    """Since the driver was loaded."""
    remap_pending: bool | None = None
    """Memory rows, or pages before Ampere, wait for a reset of the GPU to be replaced."""
    remap_failed: bool | None = None
    recovery_action: int | None = None
    """What the driver asks for (NVML field 230): 0 nothing, 1 a reset, 2 a restart of the host, 3 drain, 4 drain, reset."""
    power_watts: float | None = None
    power_limit_watts: float | None = None
    energy_millijoules: int | None = None
    """Since the driver was loaded."""
    temperature_celsius: float | None = None
    throttle_reasons: int = 0
    """Bit mask of nvmlClocksEventReasons."""
    compute_mode: int | None = None
    """0 default, 2 prohibited, 3 one process alone (which an MPS server then is)."""
    processes: tuple[GpuProcess, ...] = ()
    memory_limits: bool = False
    """Whether this driver can limit the memory of a cgroup."""
    lost: str = ""
    """Why nothing more is known of it now, in words: it fell off the bus, or its calls fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuInventory:
    """`error` is set when a driver is there but does not work; no driver at all is an empty list and no error."""

    gpus: tuple[Gpu, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    error: str | None = None
    unreachable: tuple[str, ...] = ()
    """GPUs that are counted and can't be opened, in words: not even their UUID is known."""
    outdated: str = ""
    """Why new tasks can't use the driver though it works for what runs, in words."""
    looked_at_seconds: float = 0.0
    """When the look began, in seconds since the host was started (CLOCK_BOOTTIME)."""

    @property
    def complaints(self) -> tuple[str, ...]:
        """What is wrong with the driver and with GPUs that are not even known by name, in words."""
        return (*filter(None, (self.error, self.outdated)), *self.unreachable)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuXid:
    """An error event that the driver told of (docs.nvidia.com/deploy/xid-errors)."""

    uuid: str
    code: int
    gpu_instance_id: int | None = None
    """Where it concerns one MIG instance alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBound:
    """How a task is kept to its part of a GPU. `memory_bytes` is what is in force; None where it could not be set."""

    memory_bytes: int | None
    enforcement: Enforcement
    source: str
    sm_percent: int | None = None
    """None: nothing holds its compute back."""
    sm_enforcement: Enforcement = Enforcement.HARD
    note: str = ""


class GpuProvider(Protocol):
    async def inventory(self) -> GpuInventory:
        """The last look, at most some seconds old. Never raises for a missing or broken driver: that is in the answer.

        Never waits for a driver that hangs, but for the first look, and for that within a bound.
        """
        ...

    async def refresh(self) -> GpuInventory:
        """A look at everything that begins now, or the last one where the driver does not answer in time."""
        ...

    def take_xids(self) -> Sequence[GpuXid]:
        """The events that came since the last call, oldest first."""
        ...

    async def limit_memory(self, uuid: str, cgroup: str, limit_bytes: int) -> int:
        """Hold a cgroup (its path) to so much memory of a GPU, and give what the driver then says.

        Raises NodeFaultError (LIMIT_NOT_ENFORCED) where it does not.
        """
        ...

    async def close(self) -> None: ...


NOBODY = AttemptId("")
"""Who owns a process that lives and belongs to no attempt."""


class ProcessOwners(Protocol):
    """Whose processes are those that a driver names? Never raises."""

    def owners(
        self, pids: Sequence[int], attempts: Mapping[AttemptId, int], *, before_seconds: float
    ) -> Mapping[int, AttemptId]:
        """By pid, NOBODY for a stranger's. What ended meanwhile is not in it, nor is an MPS server, which works for all.

        `attempts` gives the first process of each attempt's container, as far as that runs.
        A process belongs to the attempt below whose cgroup it lives, whatever it calls its own cgroups. One that was
        started after `before_seconds` (since the host was started) is not the one that was meant: its number was used again.
        """
        ...

    def cgroup(self, pid: int) -> str | None:
        """The path of its cgroup on cgroup v2, from the root of the file system; None where there is none."""
        ...
