"""What this host has, for `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodeservice.capacity.source import HostCapacity
from nodeservice.config import NodeConfig
from nodeservice.core.gpus import GpuUnit
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import Lease, Resources
from nodeservice.daemon.host_policy import reserve, sharing_policy
from nodeservice.daemon.told import Told, ask
from nodeservice.errors import TransientError
from nodeservice.gpu.health import GpuState, HealthBoard
from nodeservice.gpu.locks import GpuLocks
from nodeservice.gpu.nvml import NvmlGpuProvider
from nodeservice.gpu.units import units_of
from nodeservice.journal.sqlite import JOURNAL_NAME, SqliteJournal
from nodeservice.lifecycle.allocatable_disk import believe_note, with_disk
from nodeservice.limits.cgroup import task_cgroups
from nodeservice.ports import EngineFacts, GpuInventory, NodeCapacity
from nodeservice.runtime.docker import DockerRuntime


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What this host has, what of it no task holds, and sentences on what tasks do without on its engine."""

    capacity: NodeCapacity
    free: Resources
    degraded: tuple[str, ...] = ()
    gpu_health: Mapping[str, tuple[GpuState, str]] = field(default_factory=dict)
    """By UUID, as far as one look can tell; a GPU that is not named is well."""
    gpu_leases: tuple[Lease, ...] = ()
    """Of the tasks that hold GPUs now."""
    gpu_sharing_allowed: bool = False
    daemon: Told | None = None
    """Of the one that runs on this state directory; None: none does, or `daemon_error` says why it is not known."""
    daemon_error: str | None = None


async def look(config: NodeConfig) -> Seen:
    """Look at this host. A daemon that runs here is asked how it is; what its tasks hold stands in its journal."""
    runtime = DockerRuntime(base_url=config.docker_host, node_id=config.worker_id)
    gpus = NvmlGpuProvider()
    policy = sharing_policy(config)
    board, locks = HealthBoard(), GpuLocks(config.gpu_lock_dir, worker_id=config.worker_id)

    def units(inventory: GpuInventory) -> tuple[GpuUnit, ...]:
        board.observe(inventory.gpus, (), now_seconds=0.0)
        for gpu in inventory.gpus:  # what the daemon of this configuration holds, its journal tells
            board.suspect(gpu.uuid, "locked", locks.in_use(gpu.uuid, apart_from=config.worker_id))
        return units_of(inventory, board.unwell(), policy)

    capacity = HostCapacity(
        state_dir=config.state_dir,
        engine=runtime.facts,
        gpus=gpus,
        units=units,
        reserve=reserve(config),
    )
    try:
        seen = await capacity.read()
        ledger = Ledger(seen.allocatable, seen.gpu_units)
        path = config.state_dir / JOURNAL_NAME
        if path.exists():
            journal = SqliteJournal(path)
            try:
                ledger.restore(await journal.load())
                await believe_note(ledger, journal)
            finally:
                await journal.close()
        return Seen(
            capacity=with_disk(seen, ledger.allocatable.disk_bytes),
            free=ledger.free,
            degraded=(*runtime.degraded, *await _without_cgroups(config, seen.host.engine)),
            gpu_health={gpu.uuid: board.state(gpu.uuid) for gpu in seen.host.gpus.gpus},
            gpu_leases=tuple(ledger.gpu_leases()),
            gpu_sharing_allowed=policy.allowed,
            **await _daemon(config.state_dir),
        )
    finally:
        await runtime.close()
        await gpus.close()


async def _daemon(state_dir: Path) -> dict[str, Any]:
    try:
        return {"daemon": await ask(state_dir)}
    except TransientError as error:
        return {"daemon_error": str(error)}


async def why_no_cgroups(node_id: str, facts: EngineFacts) -> str | None:
    """Why tasks get no cgroups of their own, in words; None where they do."""
    cgroups = task_cgroups(node_id=node_id, facts=facts)
    try:
        return cgroups.describe()
    finally:
        await cgroups.close()


async def _without_cgroups(config: NodeConfig, facts: EngineFacts | None) -> tuple[str, ...]:
    why = await why_no_cgroups(config.worker_id, facts) if facts is not None else None
    return (f"limits sit on the container alone: {why}",) if why else ()
