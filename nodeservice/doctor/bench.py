"""Runs all probes at once as tasks of a node of its own, and sees to it that nothing of them is left."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from nodeservice.config import NodeConfig
from nodeservice.core.model import AttemptId, Phase, Resources, TaskRecord, TaskSpec
from nodeservice.daemon.node import Node, build, working
from nodeservice.daemon.settings import open_store
from nodeservice.doctor.host import Share, processes_of, read_share
from nodeservice.doctor.image import LentImage
from nodeservice.doctor.probe import Probe, Seen
from nodeservice.errors import CapacityError, NodeServiceError, RequestError
from nodeservice.lifecycle.removal import remove_tree
from nodeservice.limits.cgroup import task_cgroups
from nodeservice.ports import EngineFacts
from nodeservice.single import LocalUplink
from nodeservice.telemetry.tracing import new_trace_ids

log = structlog.get_logger(__name__)

_CLEAN_UP_SECONDS = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """How all probes went."""

    seen: Mapping[str, Seen]
    share: Share | None
    allocatable: Resources
    gpu_uuids: tuple[str, ...] = ()
    """Of all GPUs of this host."""
    gpu_trouble: tuple[str, ...] = ()
    """Why there may be more, or why these can't be had, in words."""


async def run_probes(
    config: NodeConfig, probes: Sequence[Probe], image: LentImage, facts: EngineFacts, *, all_seconds: float
) -> Bench:
    """`config` is that of a node made for this: its id and state directory are nobody else's.

    Raises what `build` raises. Whatever happens, containers, cgroups and the state directory are removed.
    """
    node = await build(config)
    specs = {
        probe.name: probe.spec(task_id=f"{config.worker_id}-{probe.name}", image=image.name, pull=image.pull)
        for probe in probes
    }
    shares: list[Share] = []
    ended = asyncio.Event()

    def note(record: TaskRecord) -> None:
        if record.phase is Phase.RUNNING and not shares:
            shares.extend(_share_above(record))
        if record.phase > Phase.CLEANING:
            ended.set()

    node.driver.on_change(note)
    try:
        async with working(
            node, uplink=LocalUplink(), store=open_store(config), facts=facts, retries_kept_results=False
        ):
            refused: dict[AttemptId, str] = {}
            with suppress(TimeoutError):
                async with asyncio.timeout(all_seconds):
                    await _run_all(node, list(specs.values()), ended, refused)
            seen = {name: _seen(node, spec.id, refused) for name, spec in specs.items()}
            capacity = await node.capacity.read()
        gpus = capacity.host.gpus
        return Bench(
            seen=seen,
            share=shares[0] if shares else None,
            allocatable=capacity.allocatable,
            gpu_uuids=tuple(gpu.uuid for gpu in gpus.gpus),
            gpu_trouble=gpus.complaints,
        )
    finally:
        await asyncio.shield(_clear(node, config, facts, [spec.id for spec in specs.values()]))


async def _run_all(node: Node, waiting: list[TaskSpec], ended: asyncio.Event, refused: dict[AttemptId, str]) -> None:
    """As many at once as the host has room for. `refused` gets those that never fit, and why."""
    while waiting or node.driver.live():
        ended.clear()
        later: list[TaskSpec] = []
        for spec in waiting:
            try:
                await node.driver.assign(spec, trace=new_trace_ids(None), received_at=node.clock.now())
            except CapacityError as error:
                if node.driver.live():
                    later.append(spec)
                else:
                    refused[spec.id] = str(error)
            except RequestError as error:
                refused[spec.id] = str(error)
        waiting = later
        if node.driver.live():
            await ended.wait()


def _seen(node: Node, id_: AttemptId, refused: Mapping[AttemptId, str]) -> Seen:
    if id_ in refused:
        return Seen(record=None, refused=refused[id_])
    return Seen(record=node.driver.get(id_), processes_left=tuple(processes_of(id_.task_id)))


def _share_above(record: TaskRecord) -> list[Share]:
    """Read while the task runs: the cgroups above go with the last task."""
    cgroup = record.limits.get("cgroup")
    if not isinstance(cgroup, Mapping):
        return []
    return [read_share(str(cgroup["path"]), version=int(cgroup["version"]))]


async def _clear(node: Node, config: NodeConfig, facts: EngineFacts, ids: Sequence[AttemptId]) -> None:
    """Remove what an examination that was cut short has left; after a whole one there is nothing."""
    try:
        with suppress(TimeoutError, NodeServiceError):
            async with asyncio.timeout(_CLEAN_UP_SECONDS):
                for container in await node.runtime.list_owned(config.worker_id):
                    await node.runtime.remove(container.id)
                cgroups = task_cgroups(node_id=config.worker_id, facts=facts)
                for id_ in ids:
                    await cgroups.kill(id_)
                    await cgroups.remove(id_)
                await cgroups.close()
    finally:
        await node.close()
        with suppress(OSError):
            await asyncio.to_thread(remove_tree, config.state_dir)
