"""The host: its facts, its time."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from nodeservice.core.cpus import Cpu
from nodeservice.core.gpus import GpuUnit
from nodeservice.core.model import Resources
from nodeservice.ports.containers import EngineFacts
from nodeservice.ports.gpus import GpuInventory


class Clock(Protocol):
    """Time as the lifecycle sees it."""

    def now(self) -> datetime:
        """The present instant, aware UTC."""
        ...

    def elapsed(self) -> float:
        """Seconds since some moment before this process began, on a clock that nobody sets: for how long things last."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Counts on that clock too."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    path: Path
    filesystem: str
    device: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What this host has and what of it tasks can use (affinity, cpusets and limits of the cgroups above them respected)."""

    hostname: str
    kernel: str
    cgroup_version: int
    cpu_model: str
    cpu_logical_count: int
    """What the board has."""
    cpu_physical_count: int
    cpu_usable_milli: int
    """What tasks can use: the smallest of affinity, cpuset and quota."""
    memory_total_bytes: int
    memory_limit_bytes: int
    """The smaller of the total and the cgroup limits above all tasks."""
    memory_available_bytes: int
    disk: DiskFacts
    """Of the state directory."""
    engine_disk: DiskFacts | None
    """Of the engine's root, None without an engine."""
    engine: EngineFacts | None
    engine_error: str | None
    gpus: GpuInventory


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCapacity:
    """capacity ⊇ allocatable; `reserved` is the difference, kept for the host."""

    host: HostFacts
    capacity: Resources
    reserved: Resources
    allocatable: Resources
    gpu_units: tuple[GpuUnit, ...] = ()
    """What tasks can lease of the GPUs, and what of it is out of service."""
    cpus: tuple[Cpu, ...] = ()
    """Those that tasks may run on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSample:
    """Load of the whole host in percent 0–100."""

    cpu_percent: float
    memory_percent: float
    disk_percent: float
    gpu_percent: float


class CapacitySource(Protocol):
    async def read(self) -> NodeCapacity: ...

    async def sample(self) -> UsageSample: ...
