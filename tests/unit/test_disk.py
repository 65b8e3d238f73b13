"""What is measured of a task's writing, and that measuring one holds up no other."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from nodeservice.core.model import AttemptId, Phase
from nodeservice.errors import NodeFaultError
from nodeservice.lifecycle.orphans import Orphans
from nodeservice.limits.disk import BoundedDisk
from nodeservice.limits.disk_scan import LEAST_BYTES, Measured, Scan, measure
from tests.unit.node_harness import World, living, spec

MIB = 1024**2
ME, OTHER = AttemptId("me"), AttemptId("other")


async def own_process(ids: Collection[AttemptId]) -> Mapping[AttemptId, Sequence[int]]:
    return dict.fromkeys(ids, (os.getpid(),))


@pytest.fixture
async def disk() -> AsyncIterator[BoundedDisk]:
    disk = BoundedDisk(quotas=None, why_watched="because", processes=own_process)
    yield disk
    await disk.close()


async def prepare(disk: BoundedDisk, path: Path, *ids: AttemptId) -> None:
    """Each with a directory of its name, and a limit of one MiB."""
    for id_ in ids:
        (path / str(id_)).mkdir()
        await disk.prepare(id_, MIB, work=path / str(id_), log=path / "log")


def test_tiny_and_empty_files_count_a_block_and_links_count_once(tmp_path: Path) -> None:
    empty = measure([tmp_path]).bytes
    for n in range(10):
        (tmp_path / f"{n}").touch()
    assert measure([tmp_path]).bytes == empty + 10 * LEAST_BYTES
    (tmp_path / "big").write_bytes(b"x" * MIB)
    with_big = measure([tmp_path])
    for n in range(3):
        os.link(tmp_path / "big", tmp_path / f"link{n}")
    with_links = measure([tmp_path])
    assert with_links.bytes == with_big.bytes
    assert with_links.file_count == with_big.file_count + 3


def test_a_sparse_file_counts_what_it_takes(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    assert measure([tmp_path]).bytes < MIB


def deleted_here(path: Path) -> int:
    """Bytes below `path`, and in deleted files of its file system that this process holds, whatever test left it some."""
    found = Scan([path], pids=[os.getpid()]).step()
    assert found is not None
    return found.bytes


@pytest.mark.parametrize("held_by", ["descriptor", "mapping"])
def test_a_deleted_file_counts_while_a_process_holds_it(tmp_path: Path, held_by: str) -> None:
    before = deleted_here(tmp_path)
    path = tmp_path / "file"
    with path.open("w+b") as file:
        file.write(b"x" * MIB)
        file.flush()
        mapped = mmap.mmap(file.fileno(), MIB)
        path.unlink()
        if held_by == "mapping":
            file.close()
        held = deleted_here(tmp_path) - before
        mapped.close()
        assert MIB <= held < MIB + 16 * LEAST_BYTES  # once, be it open and mapped
    assert deleted_here(tmp_path) - before < MIB


def test_shared_memory_is_not_taken_for_disk(tmp_path: Path) -> None:
    before = deleted_here(tmp_path)
    descriptor = os.memfd_create("memory")
    os.write(descriptor, b"x" * MIB)
    try:
        assert deleted_here(tmp_path) - before < MIB
    finally:
        os.close(descriptor)


def test_a_scan_can_be_done_in_pieces(tmp_path: Path) -> None:
    for n in range(500):
        (tmp_path / f"{n}").touch()
    ticks = iter(range(10**6))
    scan = Scan([tmp_path], clock=lambda: float(next(ticks)))
    pieces = 0
    while (found := scan.step(1.0)) is None:
        pieces += 1
        assert scan.so_far.file_count < 501
    assert pieces > 5
    assert found == measure([tmp_path])


async def test_what_the_engine_made_for_the_container_counts_too(disk: BoundedDisk, tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("work", "layer", "volume")}
    for place in places.values():
        place.mkdir()
    (tmp_path / "hosts").write_bytes(b"x" * 2 * MIB)
    (places["volume"] / "file").write_bytes(b"x" * 3 * MIB)
    await disk.prepare(ME, 10 * MIB, work=places["work"], log=tmp_path / "log")
    await disk.add_layer(ME, [places["layer"]], [places["volume"]])
    await disk.add_layer(ME, [places["layer"]], [places["volume"], tmp_path / "hosts"])
    used = await disk.use(ME)
    assert used is not None
    assert 5 * MIB <= used.bytes < 6 * MIB
    assert disk.seen(ME) == used
    bound = await disk.bound(ME)
    assert bound is not None
    assert {place for place, _ in bound.places} == set(places.values())
    (places["layer"] / "more").write_bytes(b"x" * 8 * MIB)
    crossed = await asyncio.wait_for(disk.crossed(ME), 60)
    assert crossed.bytes > 10 * MIB


class FakeQuotas:
    """Of a file system that holds work directories alone. `failing` names the calls that the kernel refuses."""

    is_for_layers = False

    def __init__(self) -> None:
        self.limits: dict[int, int] = {}
        self.borne: dict[Path, int] = {}
        """The project's number that a directory was bound with."""
        self.failing: set[str] = set()

    def _call(self, name: str) -> None:
        if name in self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def bind(self, work: Path, limit_bytes: int) -> int:
        self._call("bind")
        number = self.borne.setdefault(work, len(self.borne) + 1)
        self.limits[number] = limit_bytes
        return number

    def project_of(self, work: Path) -> int | None:
        return self.borne.get(work)

    def holds_layers(self, layer: Sequence[Path]) -> bool:
        return False

    def join(self, places: Sequence[Path], number: int) -> list[Path]:
        return list(places)

    def limit_of(self, number: int) -> int | None:
        return self.limits.get(number)

    def lift(self, number: int) -> None:
        self._call("lift")
        self.limits.pop(number, None)


async def test_what_the_kernel_refuses_to_bound_is_watched_and_bounded_once_it_no_longer_refuses(
    tmp_path: Path,
) -> None:
    quotas, work = FakeQuotas(), tmp_path / "work"
    work.mkdir()
    quotas.failing.add("bind")
    disk = BoundedDisk(quotas=quotas)  # type: ignore[arg-type]
    with pytest.raises(NodeFaultError, match="set the disk quota"):
        await disk.prepare(ME, MIB, work=work, log=tmp_path / "log")
    (work / "much").write_bytes(b"x" * 2 * MIB)
    assert (await asyncio.wait_for(disk.crossed(ME), 60)).bytes >= 2 * MIB
    quotas.failing.clear()
    await disk.prepare(ME, MIB, work=work, log=tmp_path / "log")
    assert quotas.limits == {1: MIB}
    await disk.close()


@pytest.fixture
async def quotas(tmp_path: Path) -> AsyncIterator[tuple[FakeQuotas, BoundedDisk]]:
    """With a bound of one MiB for each of two attempts."""
    quotas = FakeQuotas()
    disk = BoundedDisk(quotas=quotas)  # type: ignore[arg-type]
    await prepare(disk, tmp_path, ME, OTHER)
    yield quotas, disk
    await disk.close()


async def test_a_quota_that_could_not_be_lifted_is_lifted_when_that_is_tried_again(
    quotas: tuple[FakeQuotas, BoundedDisk], tmp_path: Path
) -> None:
    kernel, disk = quotas
    kernel.failing.add("lift")
    with pytest.raises(NodeFaultError, match="lift the disk quota"):
        await disk.remove(ME, work=tmp_path / str(ME))
    kernel.failing.clear()
    for _ in range(2):
        await disk.remove(ME, work=tmp_path / str(ME))
    assert kernel.limits == {kernel.borne[tmp_path / str(OTHER)]: MIB}
    assert disk.seen(ME) is None


async def test_a_quota_of_an_earlier_process_is_lifted(quotas: tuple[FakeQuotas, BoundedDisk], tmp_path: Path) -> None:
    kernel, _ = quotas
    after_a_restart = BoundedDisk(quotas=kernel)  # type: ignore[arg-type]
    await after_a_restart.prepare(OTHER, MIB, work=tmp_path / str(OTHER), log=tmp_path / "log")
    await after_a_restart.remove(ME, work=tmp_path / str(ME))
    await after_a_restart.remove(ME, work=tmp_path / "gone")
    assert kernel.limits == {kernel.borne[tmp_path / str(OTHER)]: MIB}
    await after_a_restart.close()


async def test_a_task_that_was_still_to_be_reported_when_the_node_restarted_leaves_no_quota(tmp_path: Path) -> None:
    kernel, world = FakeQuotas(), World(tmp_path)
    world.uplink.down = True
    for is_reported in (False, True):
        world.disk = disk = BoundedDisk(quotas=kernel)  # type: ignore[arg-type, assignment]
        async with living(world) as node:
            if is_reported:
                world.uplink.down = False
                await node.until_finished(AttemptId("t"))
            else:
                await node.assign(spec())
                await node.until(lambda: node.phase(AttemptId("t")) is Phase.REPORTING)
                assert kernel.limits
        await disk.close()
    assert not kernel.limits


async def test_the_quota_of_a_directory_that_nobody_claims_goes_with_it(tmp_path: Path) -> None:
    kernel, world, lost = FakeQuotas(), World(tmp_path), AttemptId("lost")
    world.disk = disk = BoundedDisk(quotas=kernel)  # type: ignore[arg-type, assignment]
    async with living(world) as node:
        node.dirs.prepare(lost)
        kernel.bind(node.dirs.results(lost), MIB)
        orphans = Orphans(node.context, node.driver)
        kernel.failing.add("lift")
        for _ in range(2):
            await orphans.sweep()
        assert node.dirs.root(lost).exists(), "it tells which quota is to be lifted"
        kernel.failing.clear()
        await orphans.sweep()
        assert not node.dirs.root(lost).exists()
    await disk.close()
    assert not kernel.limits


@pytest.fixture
def endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose walk never ends."""
    endless = tmp_path / str(ME)

    class Slow(Scan):
        def __init__(self, places: Sequence[Path], **options: Any) -> None:
            super().__init__(places, **options)
            self.never_ends = endless in places

        def step(self, seconds: float | None = None) -> Measured | None:
            return None if self.never_ends else super().step(seconds)

    monkeypatch.setattr("nodeservice.limits.disk.Scan", Slow)
    monkeypatch.setattr("nodeservice.limits.disk_rounds.Scan", Slow)
    return endless


async def test_a_tree_that_takes_for_ever_does_not_hold_up_the_others(
    disk: BoundedDisk, tmp_path: Path, endless: Path
) -> None:
    await prepare(disk, tmp_path, ME, OTHER)
    slow = [asyncio.create_task(disk.use(ME)) for _ in range(3)]
    await asyncio.sleep(0)
    for _ in range(10):
        assert await asyncio.wait_for(disk.use(OTHER), 60) is not None
    assert not any(task.done() for task in slow)
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_a_crossing_is_told_though_another_walk_takes_for_ever(
    disk: BoundedDisk, tmp_path: Path, endless: Path
) -> None:
    await prepare(disk, tmp_path, ME, OTHER)
    waiting = [asyncio.create_task(disk.crossed(id_)) for id_ in (ME, OTHER)]
    await asyncio.sleep(1)
    (tmp_path / str(OTHER) / "much").write_bytes(b"x" * 2 * MIB)
    used = await asyncio.wait_for(waiting[1], 60)
    assert 2 * MIB <= used.bytes < 3 * MIB
    assert not waiting[0].done()
    waiting[0].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_one_look_serves_all_and_one_that_fails_is_made_good(tmp_path: Path) -> None:
    asked: list[Collection[AttemptId]] = []

    async def processes(ids: Collection[AttemptId]) -> Mapping[AttemptId, Sequence[int]]:
        asked.append(ids)
        if len(asked) == 1:
            raise ValueError("unforeseen")
        return {}

    disk = BoundedDisk(quotas=None, processes=processes)
    ids = [AttemptId(f"task-{number}") for number in range(40)]
    await prepare(disk, tmp_path, *ids)
    (tmp_path / str(ids[7]) / "much").write_bytes(b"x" * 2 * MIB)
    (tmp_path / str(ids[3])).rmdir()  # somebody's mistake
    waiting = {id_: asyncio.create_task(disk.crossed(id_)) for id_ in ids}
    assert (await asyncio.wait_for(waiting[ids[7]], 60)).bytes >= 2 * MIB
    assert [len(some) for some in asked[:2]] == [40, 40], "also the one whose directory is gone: it has other places"
    assert sum(task.done() for task in waiting.values()) == 1
    await disk.close()
    for task in waiting.values():
        task.cancel()
    await asyncio.gather(*waiting.values(), return_exceptions=True)


async def test_many_large_trees_hold_up_no_small_one(
    disk: BoundedDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each piece of a large one takes all of its time."""
    turns: list[str] = []

    class Busy(Scan):
        def __init__(self, places: Sequence[Path], **options: Any) -> None:
            super().__init__(places, **options)
            self.name = next(iter(places)).name

        def step(self, seconds: float | None = None) -> Measured | None:
            turns.append(self.name)
            if self.name.startswith("large"):
                time.sleep(seconds or 0)
                return None
            return super().step(seconds)

    monkeypatch.setattr("nodeservice.limits.disk_rounds.Scan", Busy)
    ids = [AttemptId(f"large-{number}") for number in range(30)]
    waiting = {}
    await prepare(disk, tmp_path, *ids, ME)
    for id_ in ids:
        waiting[id_] = asyncio.create_task(disk.crossed(id_))
    while len(turns) < 60:  # all are under way
        await asyncio.sleep(0.01)
    waiting[ME] = asyncio.create_task(disk.crossed(ME))
    await asyncio.sleep(0)
    turns.clear()
    (tmp_path / str(ME) / "much").write_bytes(b"x" * 2 * MIB)
    await asyncio.wait_for(waiting[ME], 60)
    # It came as soon as it was due, not after a piece and a rest for each of the others.
    assert len(turns) < 30
    for task in waiting.values():
        task.cancel()
    await asyncio.gather(*waiting.values(), return_exceptions=True)
