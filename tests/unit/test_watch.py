"""What goes on beside a running task: its disk and its GPUs are watched and its log followed, whatever failed once."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nodeservice.core.gpus import GpuRequest, GpuShare
from nodeservice.core.model import GIB, AttemptId, Phase, Reason, TaskRecord
from nodeservice.errors import NodeFaultError
from nodeservice.gpu.units import SharingPolicy
from nodeservice.lifecycle import logs
from nodeservice.limits.disk import BoundedDisk
from nodeservice.ports import NOBODY, ContainerState, DiskUse, GpuProcess
from nodeservice.testing.fake_disk import FakeTaskDisk
from nodeservice.testing.fake_gpu import FakeGpuProvider, FakeOwners, fake_gpu
from nodeservice.testing.fake_runtime import FakeImage
from tests.unit.node_harness import LiveNode, World, living, running, spec

T = AttemptId("t")
MIB = 1024**2


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.runtime.images["demo"] = FakeImage(holds=True, ignores_term=True)
    return world


def reason(record: TaskRecord) -> Reason:
    assert record.verdict is not None
    return record.verdict.reason


async def back_after_looks_at(node: LiveNode, container_id: str) -> None:
    """The engine answers again once it was asked for the container in vain."""
    runtime = node.world.runtime
    await node.until(lambda: ("find", container_id) in runtime.calls)
    runtime.unavailable = False


# ---- after a restart with the engine away -----------------------------------------------------------------------------


@pytest.fixture
async def left_running(world: World, tmp_path: Path) -> AsyncIterator[tuple[str, Path]]:
    """A container and its layer, which a node with a disk of its own left, and no engine for the next one."""
    disk, layer = BoundedDisk(quotas=None), tmp_path / "layer"
    layer.mkdir()
    world.disk = disk  # type: ignore[assignment]
    async with living(world) as node:
        container_id = await running(node, spec())
    await disk.close()
    container = world.runtime._containers[container_id]
    container.state = replace(container.state, layer=(layer,))
    world.disk = disk = BoundedDisk(quotas=None)  # type: ignore[assignment]
    world.runtime.calls.clear()
    world.runtime.unavailable = True
    yield container_id, layer
    await disk.close()


async def test_a_layer_is_bound_again_though_the_engine_was_away_when_the_node_started(
    world: World, left_running: tuple[str, Path]
) -> None:
    container_id, layer = left_running
    async with living(world) as node:
        await back_after_looks_at(node, container_id)
        (layer / "much").write_bytes(b"x" * 4 * MIB)
        assert reason(await node.until_finished(T)) is Reason.DISK_LIMIT


async def test_a_watch_that_broke_off_before_the_layer_was_bound_binds_it_when_it_begins_again(
    world: World, left_running: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    container_id, layer = left_running
    wait_exited, broke_off = world.runtime.wait_exited, asyncio.Event()

    async def breaks_off(id_: str) -> ContainerState | None:
        if not broke_off.is_set():
            while ("find", container_id) not in world.runtime.calls:
                await asyncio.sleep(0.01)
            broke_off.set()
            raise RuntimeError("can't start new thread")
        return await wait_exited(id_)

    monkeypatch.setattr(world.runtime, "wait_exited", breaks_off)
    async with living(world) as node:
        await broke_off.wait()
        world.runtime.unavailable = False
        (layer / "much").write_bytes(b"x" * 4 * MIB)
        assert reason(await node.until_finished(T)) is Reason.DISK_LIMIT


class OwnersOfFollowed(FakeOwners):
    """As the real ones: a process is an attempt's only while the first one of its container is known."""

    def owners(
        self, pids: Sequence[int], attempts: Mapping[AttemptId, int], *, before_seconds: float
    ) -> Mapping[int, AttemptId]:
        owners = super().owners(pids, attempts, before_seconds=before_seconds)
        return {pid: owner if owner in attempts else NOBODY for pid, owner in owners.items()}


async def test_a_part_of_a_gpu_is_watched_again_though_the_engine_was_away_when_the_node_started(world: World) -> None:
    gpu = fake_gpu()
    world.gpus, world.owners = FakeGpuProvider(gpu), OwnersOfFollowed()
    world.gpu_policy = SharingPolicy(allowed=True)
    async with living(world) as node:
        await node.until(lambda: node.driver.ledger.free.gpu_count == 1)
        container_id = await running(node, spec(gpu=GpuRequest(share=GpuShare(memory_bytes=10 * GIB))))
    world.owners.of[7] = T
    world.gpus.change(gpu.uuid, processes=(GpuProcess(pid=7, memory_bytes=60 * GIB),), memory_used_bytes=60 * GIB)
    world.runtime.calls.clear()
    world.runtime.unavailable = True
    async with living(world) as node:
        await back_after_looks_at(node, container_id)
        record = await node.until_finished(T)
    assert reason(record) is Reason.GPU_MEMORY_LIMIT
    assert [used.memory_peak_bytes for used in record.usage.gpus] == [60 * GIB]


# ---- what fails once --------------------------------------------------------------------------------------------------


class DiskThatFailsFirst(FakeTaskDisk):
    """Forgotten by a restart; `failures` of the next calls fail."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error
        self.failures = {"prepare": 0, "crossed": 0}

    def forget(self) -> None:
        self._limits.clear()
        self.failures = {"prepare": 2, "crossed": 2}

    def _fail(self, call: str) -> None:
        if self.failures[call]:
            self.failures[call] -= 1
            raise self._error

    async def prepare(self, id_: AttemptId, limit_bytes: int, *, work: Path, log: Path) -> None:
        self._fail("prepare")
        await super().prepare(id_, limit_bytes, work=work, log=log)

    async def crossed(self, id_: AttemptId) -> DiskUse:
        self._fail("crossed")
        return await super().crossed(id_)


@pytest.mark.parametrize(
    "error", [NodeFaultError("the kernel refuses", reason="NODE_FAULT"), ValueError("unforeseen")], ids=["node", "bug"]
)
async def test_a_disk_bound_that_cannot_be_set_or_looked_at_at_first_holds_later(
    world: World, error: Exception
) -> None:
    world.disk = disk = DiskThatFailsFirst(error)
    async with living(world) as node:
        await running(node, spec())
    disk.forget()
    disk.write(T, 4 * MIB)
    async with living(world) as node:
        assert reason(await node.until_finished(T)) is Reason.DISK_LIMIT
    assert disk.failures == {"prepare": 0, "crossed": 0}


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOSPC])
async def test_a_log_that_could_not_be_opened_once_is_there_while_the_task_runs(
    world: World, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True, output=b"hello")
    codes, real = [code], logs._CappedFile

    def opened(*arguments: Any) -> object:
        if codes:
            raise OSError(codes[0], os.strerror(codes.pop()))
        return real(*arguments)

    monkeypatch.setattr(logs, "_CappedFile", opened)
    async with living(world) as node:
        await running(node, spec())
        path = node.dirs.log(T)
        await node.until(lambda: path.exists() and path.read_bytes() == b"hello")
        assert node.phase(T) is Phase.RUNNING
    assert not codes
