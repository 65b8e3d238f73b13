"""Puts the facts of host, engine and GPUs together: implements the port CapacitySource."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from nodeservice.capacity.cpu import CpuFacts, read_cpu
from nodeservice.capacity.disk import read_disk
from nodeservice.capacity.memory import MemoryFacts, read_memory
from nodeservice.capacity.reserve import Reserve, allocatable_of
from nodeservice.capacity.topology import read_cpus
from nodeservice.capacity.usage import CpuMeter, disk_percent, gpu_percent, memory_percent
from nodeservice.core.cpus import Cpu
from nodeservice.core.gpu_pool import counted
from nodeservice.core.gpus import GpuUnit
from nodeservice.core.model import Resources
from nodeservice.errors import NodeServiceError
from nodeservice.limits.hierarchy import TASKS_DIRECTORY, TASKS_SLICE, host_cgroup_version
from nodeservice.ports import (
    DiskFacts,
    EngineFacts,
    GpuInventory,
    GpuProvider,
    HostFacts,
    NodeCapacity,
    UsageSample,
)
from nodeservice.threads import Threads

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Local:
    """What is read from files of this host in one go."""

    cpu: CpuFacts
    cpus: tuple[Cpu, ...]
    memory: MemoryFacts
    disk: DiskFacts
    engine_disk: DiskFacts | None
    cgroup_version: int


class HostCapacity:
    """CapacitySource of this host. Files are read in one named thread, since a hung mount blocks whoever looks at it.

    `engine` raises an error of nodeservice.errors where no engine answers; that is a fact in the answer. `units` makes of
    what the driver tells what tasks can lease. `root` stands before /proc and /sys, so that a saved tree can be read.
    """

    def __init__(
        self,
        *,
        state_dir: Path,
        engine: Callable[[], Awaitable[EngineFacts]],
        gpus: GpuProvider,
        units: Callable[[GpuInventory], tuple[GpuUnit, ...]],
        reserve: Reserve,
        root: Path = Path("/"),
    ) -> None:
        self._state_dir = state_dir
        self._engine = engine
        self._gpus = gpus
        self._units = units
        self._reserve = reserve
        self._root = root
        self._known_engine: EngineFacts | None = None
        """As it answered last: one that is being started anew is where it was."""
        self.last: NodeCapacity | None = None
        """What `read` last gave."""
        self._meter = CpuMeter(root)
        self._thread = Threads(1, name="nodeservice-capacity")
        self._last_sample = UsageSample(cpu_percent=0.0, memory_percent=0.0, disk_percent=0.0, gpu_percent=0.0)

    async def read(self) -> NodeCapacity:
        """All facts, read afresh. Raises OSError only where /proc or the state directory's file system is unreadable."""
        engine: EngineFacts | None = None
        engine_error: str | None = None
        try:
            engine = self._known_engine = await self._engine()
        except NodeServiceError as error:
            engine_error = str(error)
        gpus = await self._gpus.inventory()
        known = self._known_engine
        local = await self._thread.run(lambda: self._read_local(engine, _place_of_tasks(known)))
        host = _host(local, engine, engine_error, gpus)
        self.last = _capacity(host, known, local.cpus, self._units(gpus), self._reserve)
        return self.last

    async def sample(self) -> UsageSample:
        """Load now; CPU since the sample before. What cannot be read keeps its last value: a heartbeat never fails here."""
        gpu_load = gpu_percent(await self._gpus.inventory())
        self._last_sample = await self._thread.run(lambda: self._sample(gpu_load))
        return self._last_sample

    async def close(self) -> None:
        """End the thread. The GPU provider belongs to whoever made it."""
        self._thread.close()

    def _sample(self, gpu_load: float) -> UsageSample:
        memory, disk = self._last_sample.memory_percent, self._last_sample.disk_percent
        try:
            memory, disk = memory_percent(self._root), disk_percent(self._state_dir)
        except OSError as error:
            log.warning("capacity.sample_incomplete", error=str(error))
        return UsageSample(
            cpu_percent=self._meter.percent(), memory_percent=memory, disk_percent=disk, gpu_percent=gpu_load
        )

    def _read_local(self, engine: EngineFacts | None, tasks_place: str | None) -> _Local:
        cpu = read_cpu(self._root, tasks_place=tasks_place)
        return _Local(
            cpu=cpu,
            cpus=read_cpus(self._root, cpu.usable_ids),
            memory=read_memory(self._root, tasks_place=tasks_place),
            disk=read_disk(self._state_dir, root=self._root),
            engine_disk=self._engine_disk(engine),
            cgroup_version=host_cgroup_version(self._root),
        )

    def _engine_disk(self, engine: EngineFacts | None) -> DiskFacts | None:
        """None also where the engine's root is not to be seen from here: it runs on another machine or behind a mount."""
        if engine is None or not engine.root_dir.is_absolute():
            return None
        try:
            return read_disk(engine.root_dir, root=self._root) if engine.root_dir.exists() else None
        except OSError:
            return None


def _place_of_tasks(engine: EngineFacts | None) -> str | None:
    """Where cgroups that hold all tasks lie below the root. Without root tasks have none of ours, and lie near us."""
    if os.geteuid() != 0:
        return None
    if engine is None or engine.cgroup_driver not in ("cgroupfs", "systemd"):
        return ""
    if engine.cgroup_driver == "cgroupfs":
        return TASKS_DIRECTORY
    if engine.cgroup_version == 2:
        return TASKS_SLICE
    return "machine.slice" if engine.name == "podman" else "system.slice"  # the engine's own choice


def _host(local: _Local, engine: EngineFacts | None, engine_error: str | None, gpus: GpuInventory) -> HostFacts:
    return HostFacts(
        hostname=socket.gethostname(),
        kernel=os.uname().release,
        cgroup_version=local.cgroup_version,
        cpu_model=local.cpu.model,
        cpu_logical_count=local.cpu.logical_count,
        cpu_physical_count=local.cpu.physical_count,
        cpu_usable_milli=local.cpu.usable_milli,
        memory_total_bytes=local.memory.total_bytes,
        memory_limit_bytes=local.memory.limit_bytes,
        memory_available_bytes=local.memory.available_bytes,
        disk=local.disk,
        engine_disk=local.engine_disk,
        engine=engine,
        engine_error=engine_error,
        gpus=gpus,
    )


def _capacity(
    host: HostFacts, engine: EngineFacts | None, cpus: tuple[Cpu, ...], units: tuple[GpuUnit, ...], reserve: Reserve
) -> NodeCapacity:
    # The engine may sit in a smaller place than we do (a virtual machine, a limited cgroup), and tasks run where it is.
    engine_milli = engine.cpu_count * 1000 if engine is not None else 0
    engine_bytes = engine.memory_bytes if engine is not None else 0
    capacity = Resources(
        cpu_milli=min(host.cpu_usable_milli, engine_milli or host.cpu_usable_milli),
        memory_bytes=min(host.memory_limit_bytes, engine_bytes or host.memory_limit_bytes),
        disk_bytes=host.disk.total_bytes,
        gpu_count=sum(1 for unit in units if unit.counts),
    )
    allocatable = allocatable_of(
        capacity, reserve=reserve, disk_free_bytes=host.disk.free_bytes, gpu_count=counted(units)
    )
    return NodeCapacity(
        host=host,
        capacity=capacity,
        reserved=capacity.minus(allocatable),
        allocatable=allocatable,
        gpu_units=units,
        cpus=cpus,
    )
