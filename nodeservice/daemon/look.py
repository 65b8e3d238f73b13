"""What this host has, for `inspect`."""

from __future__ import annotations

from dataclasses import dataclass

from nodeservice.capacity.source import HostCapacity
from nodeservice.config import NodeConfig
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import Resources
from nodeservice.daemon.node import JOURNAL_NAME
from nodeservice.daemon.settings import reserve, sharing_policy
from nodeservice.gpu.nvml import NvmlGpuProvider
from nodeservice.gpu.units import units_of
from nodeservice.journal.sqlite import SqliteJournal
from nodeservice.limits.cgroup import task_cgroups
from nodeservice.ports import NodeCapacity
from nodeservice.runtime.docker import DockerRuntime


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What this host has, what of it no task holds, and sentences on what tasks do without on its engine."""

    capacity: NodeCapacity
    free: Resources
    degraded: tuple[str, ...]


async def look(config: NodeConfig) -> Seen:
    """Look at this host. A daemon that runs here is asked through its journal."""
    runtime = DockerRuntime(base_url=config.docker_host, node_id=config.worker_id)
    gpus = NvmlGpuProvider()
    policy = sharing_policy(config)
    capacity = HostCapacity(
        state_dir=config.state_dir,
        engine=runtime.facts,
        gpus=gpus,
        units=lambda inventory: units_of(inventory, {}, policy),
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
            finally:
                await journal.close()
        return Seen(
            capacity=seen, free=ledger.free, degraded=(*runtime.degraded, *await _without_cgroups(config, seen))
        )
    finally:
        await runtime.close()
        await gpus.close()


async def _without_cgroups(config: NodeConfig, seen: NodeCapacity) -> tuple[str, ...]:
    if seen.host.engine is None:
        return ()
    cgroups = task_cgroups(node_id=config.worker_id, facts=seen.host.engine)
    try:
        why = cgroups.describe()
    finally:
        await cgroups.close()
    return (f"limits sit on the container alone: {why}",) if why else ()
