"""The node in memory at the seams: adoption, the end of the process, a journal that is away, results that moved."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from nodeservice.core import effects as fx
from nodeservice.core.events import ContainerCreated, ContainerExited, ContainerStarted, ImagePulled
from nodeservice.core.model import (
    AttemptId,
    Outcome,
    Phase,
    Reason,
    Resources,
    StopCause,
    StopRequest,
    TaskRecord,
    TaskSpec,
)
from nodeservice.core.retry import Backoff
from nodeservice.errors import CapacityError, NodeFaultError, TransientError
from nodeservice.lifecycle import driver, timekeeper, workdir
from nodeservice.lifecycle.host_keeper import DISK_LOW
from nodeservice.lifecycle.orphans import Orphans
from nodeservice.lifecycle.workdir import WorkDirs
from nodeservice.limits.cgroup import NoTaskCgroups
from nodeservice.ports import ContainerState, ResultBundle, labels
from nodeservice.results.file import FileResultStore
from nodeservice.results.hand_over import Bundles
from nodeservice.results.layout import MOVED_NAME, stored_path
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime
from nodeservice.testing.memory_journal import MemoryJournal
from nodeservice.testing.memory_store import MemoryResultStore
from tests.unit.node_harness import NODE, HeldJournal, LiveNode, RecordingUplink, World, living, running, spec

T = AttemptId("t")


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.runtime.images["demo"] = FakeImage(output=b"hello")
    return world


async def test_what_an_adopted_container_has_written_is_still_there(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    async with living(world) as node:
        await node.assign(spec(timeout_seconds=3600.0))
        await node.until(lambda: bool(world.runtime.running))
        (node.dirs.results(T) / "a.txt").write_text("half of it")
    world.journal = MemoryJournal()
    async with living(world) as node:
        await node.until(lambda: node.phase(T) is Phase.RUNNING)
        adopted = node.driver.get(T)
        assert adopted is not None
        assert adopted.started_at is not None
        assert adopted.deadline_at == adopted.started_at + timedelta(hours=1), "nor does it run for longer than it may"
        await asyncio.sleep(0.05)  # whatever sweeps has swept
        assert (node.dirs.results(T) / "a.txt").read_text() == "half of it"
        world.runtime.finish(world.runtime.running[0], 0)
        await node.until_finished(T)
    assert world.store.stored["t/1"]["a.txt"] == b"half of it"


async def test_a_container_whose_image_brings_our_labels_is_neither_taken_up_nor_removed(world: World) -> None:
    """An image may bring any label, also to those who run it past this service; a name is given by who makes a container."""
    world.runtime.images["demo"] = FakeImage(holds=True)
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: bool(world.runtime.running))
        brought = world.runtime.specs[0]
        world.runtime.finish(world.runtime.running[0], 0)
        await node.until_finished(T)
    evil = {key: value.replace('"t"', '"../../out"') for key, value in brought.labels.items()}
    evil[labels.TASK_ID] = "../../out"
    made = await world.runtime.create(replace(brought, name=f"{labels.PREFIX}bystander", labels=evil))
    world.journal = MemoryJournal()
    async with living(world) as node:
        orphans = Orphans(node.context, node.driver)
        for _ in range(3):
            await orphans.sweep()
        assert node.driver.live() == []
        assert [state.id for state in await world.runtime.list_owned("node")] == [made]
    assert not [path for path in world.path.rglob("*") if "out" in path.name]


async def test_a_container_of_ours_with_the_record_of_another_attempt_is_not_taken_for_that(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: bool(world.runtime.running))
        story = world.runtime.specs[0].labels[labels.RECORD].replace('"t"', '"other"')
        world.runtime.finish(world.runtime.running[0], 0)
        await node.until_finished(T)
        odd = replace(world.runtime.specs[0], labels=world.runtime.specs[0].labels | {labels.RECORD: story})
    await world.runtime.create(odd)
    world.journal = MemoryJournal()
    async with living(world) as node:
        while await world.runtime.list_owned("node"):
            await asyncio.sleep(0.01)
        assert node.driver.live() == []


@pytest.mark.parametrize("what", ["work directory", "results"])
async def test_a_task_whose_results_are_gone_from_this_host_is_no_success(world: World, what: str) -> None:
    world.runtime.images["demo"] = FakeImage(output=b"hello", holds=True)
    async with living(world) as node:
        await running(node, spec())
        await node.driver.settled()
    shutil.rmtree(node.dirs.root(T) if what == "work directory" else node.dirs.results(T))
    world.runtime.finish(world.runtime.running[0], 0)
    async with living(world) as node:
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.COLLECT_FAILED
        assert f"{node.dirs.results(T)} is gone" in record.remarks[-1]
    assert world.store.stored == {}
    assert len(world.uplink.reports) == 1


@pytest.mark.parametrize("give_up_seconds", [3600.0, 0.0])
async def test_results_that_wait_for_a_store_take_no_memory_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch, give_up_seconds: float
) -> None:
    """In the upload, and later, when they were kept on this host."""
    world.runtime.images["demo"] = FakeImage(output=b"hello")
    world.give_up_seconds = give_up_seconds
    world.store_backoff = Backoff(first_seconds=600, max_seconds=600)
    world.kept = FileResultStore(world.path / "results")  # type: ignore[assignment]
    tries = []

    async def away(bundle: ResultBundle) -> str:
        tries.append(bundle.prefix)
        raise TransientError("away", reason="STORE_UNREACHABLE")

    monkeypatch.setattr(world.store, "put", away)
    async with living(world) as node:
        await node.assign(spec("waits"))
        await node.until(lambda: len(tries) == (1 if give_up_seconds else 2))
        await node.driver.settled()
        gc.collect()
        assert [one for one in gc.get_objects() if isinstance(one, ResultBundle) and one.prefix == "waits/1"] == []
    await world.kept.close()


@pytest.mark.parametrize("was_frozen", [False, True])
async def test_results_that_may_have_gone_with_the_power_of_the_host_are_no_success(
    world: World, was_frozen: bool
) -> None:
    world.runtime.images["demo"] = FakeImage(output=b"hello", holds=True)
    async with living(world) as node:
        await running(node, spec())
        await node.driver.settled()
    world.runtime.finish(world.runtime.running[0], 0)
    if was_frozen:  # then what is lost is found out by its digest
        Bundles(worker_id="node", results_dir=world.path).collect(spec(), node.dirs.root(T), node.dirs.log(T))
    node = LiveNode(world)
    node.context = replace(node.context, in_doubt=frozenset({T}))
    await node.start()
    try:
        record = await node.until_finished(T)
    finally:
        await node.kill()
    assert record.verdict is not None
    assert record.verdict.exit_code == 0
    if was_frozen:
        assert record.verdict.outcome is Outcome.SUCCEEDED
    else:
        assert record.verdict.reason is Reason.COLLECT_FAILED
        assert "the host went down" in record.verdict.message
        assert (world.path / "state" / "salvage" / "t.1" / "results").is_dir()
        assert world.store.stored == {}


async def test_nothing_is_admitted_before_it_is_known_what_the_engine_runs_already(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    whole = Resources(cpu_milli=4000, memory_bytes=2**26, disk_bytes=2**20)
    async with living(world) as node:
        await node.assign(spec(request=whole))
        await node.until(lambda: bool(world.runtime.running))
    world.journal = MemoryJournal()
    async with living(world) as node:
        with pytest.raises(CapacityError, match="not enough CPU"):
            await node.assign(spec("other", request=whole))
        await node.driver.settled()
    world.journal = MemoryJournal()
    world.runtime.unavailable = True
    async with living(world) as node:
        with pytest.raises(CapacityError, match="what runs here already is not known"):
            await node.assign(spec("other", request=whole))
        world.runtime.unavailable = False
        await node.until(lambda: not node.driver.conditions)
        with pytest.raises(CapacityError, match="not enough CPU"):
            await node.assign(spec("other", request=whole))
        assert node.driver.ledger.leased.cpu_milli == 4000


async def test_an_engine_that_fails_to_list_its_containers_is_asked_again(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: bool(world.runtime.running))
    world.journal = MemoryJournal()
    for _ in range(3):  # one of them may be heard by the janitor
        world.runtime.fail_next("list_owned", NodeFaultError("RWLayer is unexpectedly nil", reason="ENGINE_ERROR"))
    async with living(world) as node:
        await node.until(lambda: node.phase(T) is Phase.RUNNING)
        world.runtime.finish(world.runtime.running[0], 0)
        await node.until_finished(T)


def test_what_is_salvaged_twice_is_there_twice(tmp_path: Path) -> None:
    dirs = WorkDirs(tmp_path)
    for name in ("first", "second", "third"):
        dirs.prepare(T)
        (dirs.results(T) / name).touch()
        dirs.salvage(T)
        dirs.salvage(T)
    found = sorted(str(path.relative_to(tmp_path / "salvage")) for path in tmp_path.glob("salvage/*/results/*"))
    assert found == ["t.1.2/results/second", "t.1.3/results/third", "t.1/results/first"]
    assert dirs.all() == []


def test_what_was_set_aside_is_told_once_it_is_on_the_disk_also_by_who_finds_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dirs, synced = WorkDirs(tmp_path), list[Path]()
    dirs.prepare(T)
    dirs.salvage(T)
    monkeypatch.setattr(workdir, "sync_directory", synced.append)
    assert dirs.salvage(T) == tmp_path / "salvage" / "t.1"
    assert synced == [tmp_path / "salvage", tmp_path]
    assert dirs.salvage(AttemptId("other")) is None


class SlowMaster(RecordingUplink):
    """Takes a report at once, and answers when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.answer = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def settled(self) -> None:
        await self._idle.wait()

    async def report(self, record: TaskRecord) -> None:
        self._idle.clear()
        try:
            self.reports.append(record)
            await self.answer.wait()
        finally:
            self._idle.set()


async def test_a_node_that_stops_waits_for_the_answer_to_its_report_and_sends_no_second_one(world: World) -> None:
    master = SlowMaster()
    world.uplink, world.settle_reports_seconds = master, 5.0
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: bool(master.reports))
        asyncio.get_running_loop().call_later(0.05, master.answer.set)
    async with living(world) as node:
        await node.until_finished(T)
    assert len(master.reports) == 1


async def test_a_master_that_never_answers_does_not_keep_the_node_from_stopping(world: World) -> None:
    master = SlowMaster()
    world.uplink, world.settle_reports_seconds = master, 0.05
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: bool(master.reports))
    assert len(master.reports) == 1


class UnsyncedJournal(MemoryJournal):
    """What it says it could not write is there all the same, as after a sync that failed."""

    failing = False

    async def save(self, records: Sequence[TaskRecord]) -> None:
        await super().save(records)
        if self.failing:
            raise TransientError("the sync failed", reason="JOURNAL_UNWRITABLE")


def cancel(node: LiveNode) -> asyncio.Task[TaskRecord]:
    stop = StopRequest(cause=StopCause.CANCELLED, requested_at=node.clock.now(), message="enough")
    return asyncio.create_task(node.driver.request_stop(T, stop))


async def test_while_the_journal_is_away_new_work_is_refused_at_once_and_a_stop_still_stops(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    journal = HeldJournal()
    world.journal = journal
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: node.phase(T) is Phase.RUNNING)
        journal.full = True
        asked = cancel(node)
        await node.until(lambda: node.driver.journal_error is not None)
        with pytest.raises(CapacityError) as caught:
            async with asyncio.timeout(1.0):
                await node.assign(spec("u"))
        assert caught.value.reason == "JOURNAL_UNWRITABLE"
        await node.until(lambda: not world.runtime.running)
        assert not asked.done()
        journal.full = False
        await asked
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.reason is Reason.CANCELLED


async def test_a_stop_is_carried_out_while_the_journal_hangs(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    journal = HeldJournal()
    world.journal = journal
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: node.phase(T) is Phase.RUNNING)
        journal.free.clear()
        asked = cancel(node)
        await node.until(lambda: not world.runtime.running)
        assert not asked.done()
        journal.free.set()
        await asked
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.reason is Reason.CANCELLED


async def test_a_stop_that_is_asked_for_again_and_again_is_looked_after_once(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True, ignores_term=True)
    journal = HeldJournal()
    world.journal = journal
    async with living(world) as node:
        await node.assign(spec(grace_seconds=86_400.0))
        await node.until(lambda: node.phase(T) is Phase.RUNNING)
        journal.full = True
        asked = [cancel(node) for _ in range(50)]
        await node.until(lambda: ("stop", world.runtime.running[0]) in world.runtime.calls)
        assert len(node.driver._looks) == 1
        journal.full = False
        await asyncio.gather(*asked)
        await node.until(lambda: not node.driver._looks)


@pytest.mark.parametrize("hangs", [False, True])
async def test_what_started_before_its_start_could_be_journalled_can_be_stopped(world: World, hangs: bool) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    journal = HeldJournal()
    journal.from_phase = Phase.RUNNING
    world.journal = journal
    async with living(world) as node:
        if hangs:
            journal.free.clear()
        else:
            journal.full = True
        await node.assign(spec())
        await node.until(lambda: bool(world.runtime.running))
        asked = cancel(node)
        await node.until(lambda: not world.runtime.running)
        assert node.phase(T) is Phase.STARTING
        journal.full = False
        journal.free.set()
        await asked
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.reason is Reason.CANCELLED


class SlowRuntime(FakeRuntime):
    """Its engine is at a start until it is told to go on."""

    def __init__(self) -> None:
        super().__init__(images={"demo": FakeImage(holds=True)})
        self.starting, self.go_on = asyncio.Event(), asyncio.Event()

    async def start(self, container_id: str) -> ContainerState:
        self.starting.set()
        await self.go_on.wait()
        return await super().start(container_id)


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_stop_that_cannot_be_journalled_while_the_engine_is_at_the_start_ends_what_it_then_starts(
    world: World, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    monkeypatch.setattr(driver, "_UNWRITTEN_SECONDS", 0.01)
    world.runtime, world.journal = runtime, journal = SlowRuntime(), HeldJournal()
    async with living(world) as node:
        await node.assign(spec())
        await runtime.starting.wait()
        journal.full = not hangs
        if hangs:
            journal.free.clear()
        asked = cancel(node)
        await node.until(
            lambda: [name for name, _ in runtime.calls].count("stop") > 1
        )  # in vain, as it does not run yet
        runtime.go_on.set()
        await node.until(lambda: "start" in [name for name, _ in runtime.calls] and not runtime.running)
        assert node.phase(T) is Phase.STARTING
        assert not asked.done()
        journal.full = False
        journal.free.set()
        await asked
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.reason is Reason.CANCELLED
    assert [report.id for report in world.uplink.reports] == [T]


class RuntimeLostAtTheStart(FakeRuntime):
    """Its engine goes away when it has started a container, before it says so."""

    def __init__(self) -> None:
        super().__init__(images={"demo": FakeImage(holds=True)})

    async def start(self, container_id: str) -> ContainerState:
        is_first = self.is_untouched(container_id)
        state = await super().start(container_id)
        if is_first:
            self.unavailable = True
            raise TransientError("it closed the connection", reason="ENGINE_UNAVAILABLE")
        return state


class CgroupsOfARuntime(NoTaskCgroups):
    def __init__(self, runtime: FakeRuntime) -> None:
        super().__init__()
        self._runtime = runtime

    async def kill(self, id_: AttemptId) -> None:
        for container_id in self._runtime.running:
            self._runtime.finish(container_id, 137)

    async def processes(self, ids: Collection[AttemptId]) -> Mapping[AttemptId, Sequence[int]]:
        return {id_: [1] * len(self._runtime.running) for id_ in ids}


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_what_was_started_by_an_engine_that_then_went_away_is_stopped_while_it_is_away(
    world: World, is_restarted: bool
) -> None:
    world.runtime = runtime = RuntimeLostAtTheStart()
    cgroups = CgroupsOfARuntime(runtime)
    if not is_restarted:
        world.cgroups = cgroups
    async with contextlib.AsyncExitStack() as lives:
        node = await lives.enter_async_context(living(world))
        await node.assign(spec())
        await node.until(lambda: bool(runtime.running))
        assert node.phase(T) is Phase.STARTING
        await cancel(node)
        if is_restarted:
            assert runtime.running
            await lives.aclose()
            world.cgroups = cgroups
            node = await lives.enter_async_context(living(world))
        await node.until(lambda: not runtime.running)
        assert runtime.unavailable
        assert node.phase(T) is (Phase.COLLECTING if is_restarted else Phase.STARTING)
        runtime.unavailable = False
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.reason is Reason.CANCELLED
    assert [report.id for report in world.uplink.reports] == [T]


@pytest.mark.parametrize("away", ["engine", "journal"])
async def test_what_runs_while_its_start_is_not_on_record_has_no_more_time(
    world: World, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    monkeypatch.setattr(timekeeper, "_START_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(driver, "_UNWRITTEN_SECONDS", 0.01)
    world.journal = journal = HeldJournal()
    journal.from_phase = Phase.RUNNING
    world.runtime.images["demo"] = FakeImage(holds=True)
    if away == "engine":
        world.runtime = RuntimeLostAtTheStart()
    else:
        journal.free.clear()
    world.cgroups = CgroupsOfARuntime(world.runtime)
    async with living(world) as node:
        await node.assign(spec(timeout_seconds=0.05, grace_seconds=0.0))
        await node.until(lambda: bool(world.runtime.running))
        await node.until(lambda: not world.runtime.running)
        assert node.phase(T) is Phase.STARTING
        world.runtime.unavailable = False
        journal.free.set()
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.reason is Reason.DEADLINE


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_what_was_never_made_is_reported_while_the_engine_is_away_unless_another_process_may_have_made_it(
    world: World, is_restarted: bool
) -> None:
    world.runtime = FakeRuntime(images={"demo": FakeImage(is_local=False, pull_holds=True)})
    async with contextlib.AsyncExitStack() as lives:
        node = await lives.enter_async_context(living(world))
        await node.assign(spec(wait_timeout_seconds=None if is_restarted else 0.05))
        if is_restarted:
            await lives.aclose()
            world.runtime.unavailable = True
            node = await lives.enter_async_context(living(world))
            await cancel(node)
            await node.until(lambda: ("find", "nodeservice.t.1") in world.runtime.calls)
            assert not world.uplink.reports
            world.runtime.unavailable = False
        world.runtime.unavailable = not is_restarted
        await node.until(lambda: bool(world.uplink.reports))
        assert world.runtime.unavailable is not is_restarted
        world.runtime.unavailable = False
        await node.until_finished(T)
        assert not node.context.taken_up
    assert len(world.uplink.reports) == 1


async def test_what_is_to_end_is_not_made_for_as_long_as_an_engine_that_is_away_is_waited_for(world: World) -> None:
    for _ in range(1000):
        world.runtime.fail_next("create", TransientError("it is away", reason="ENGINE_UNAVAILABLE"))
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: [name for name, _ in world.runtime.calls].count("create") > 2)
        await cancel(node)
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.reason is Reason.CANCELLED
    assert [name for name, _ in world.runtime.calls].count("create") < 1000


async def test_what_came_further_than_its_record_says_is_ended_before_its_end_is_told(world: World) -> None:
    """The note that it runs went with the crash; its deadline has passed when the next process begins."""
    world.runtime.images["demo"] = FakeImage(holds=True)
    async with living(world) as node:
        await running(node, spec(total_timeout_seconds=0.3))
        record = node.driver.get(T)
        assert record is not None
    as_noted = replace(record, phase=Phase.PULLING, container_id=None, started_at=None, timings=record.timings[:2])
    await world.journal.save([as_noted])
    await asyncio.sleep(0.3)
    world.uplink.down = True
    async with living(world) as node:
        await node.until(lambda: node.phase(T) is Phase.REPORTING)
        assert not world.runtime.running


async def test_what_was_refused_since_its_sync_failed_is_not_in_the_journal_later(world: World) -> None:
    journal = UnsyncedJournal()
    world.journal = journal
    async with living(world) as node:
        journal.failing = True
        with pytest.raises(CapacityError):
            await node.assign(spec())
        journal.failing = False
        await node.until(lambda: node.driver.journal_error is None)
        assert await journal.load() == ()
        assert node.driver.get(T) is None


async def test_no_effect_begins_before_its_record_is_written_whatever_came_along_that_can_wait(tmp_path: Path) -> None:
    world = World(tmp_path)
    node = LiveNode(world)
    begun: list[tuple[AttemptId, type[fx.Effect]]] = []

    def begin(record: TaskRecord, effect: fx.Effect) -> None:
        begun.append((record.id, type(effect)))
        if isinstance(effect, fx.CollectResults):
            assert world.journal._records[record.id].phase is Phase.COLLECTING

    node.driver.connect(begin)
    driving = asyncio.create_task(node.driver.run())
    now = node.clock.now()
    for name in ("t", "u"):
        await node.assign(spec(name))
    node.driver.post(T, ImagePulled(at=now, digest="d"))
    node.driver.post(T, ContainerCreated(at=now, container_id="c"))
    node.driver.post(T, ContainerStarted(at=now, started_at=now, limits={}))
    await node.driver.settled()
    node.driver.post(T, ContainerExited(at=now, exit_code=0, oom_killed=False))
    node.driver.post(AttemptId("u"), ImagePulled(at=now, digest="d"))  # alone it would wait for a later write
    while (AttemptId("u"), fx.CreateContainer) not in begun and not driving.done():
        await asyncio.sleep(0)
    assert (T, fx.CollectResults) in begun
    assert not driving.done()
    driving.cancel()


async def test_what_is_remembered_no_longer_is_gone_from_the_journal_too(world: World) -> None:
    world.finished_retention_count = 1
    async with living(world) as node:
        for name in ("t", "u"):
            await node.assign(spec(name))
            await node.until_finished(AttemptId(name))
        await node.until(lambda: node.driver.get(T) is None)
        assert [record.id for record in await world.journal.load()] == [AttemptId("u")]


async def test_a_log_that_cannot_be_removed_does_not_end_the_node(world: World) -> None:
    world.finished_retention_count = 0
    async with living(world) as node:
        asked: list[AttemptId] = []

        def refuse(id_: AttemptId) -> None:
            asked.append(id_)
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        node.driver.on_forget(refuse)
        for name in ("t", "u"):
            await node.assign(spec(name))
            await node.until(lambda name=name: AttemptId(name) in asked)  # type: ignore[misc]


async def test_cpu_and_memory_go_back_while_results_are_still_being_read(world: World) -> None:
    async with living(world) as node:
        reading, go_on = asyncio.Event(), asyncio.Event()
        loop, collect = asyncio.get_running_loop(), node.context.bundles.collect

        def slowly(*args: object) -> object:
            loop.call_soon_threadsafe(reading.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
            return collect(*args)  # type: ignore[arg-type]

        node.context.bundles.collect = slowly  # type: ignore[assignment, method-assign]
        await node.assign(spec())
        await reading.wait()
        assert node.phase(T) is Phase.COLLECTING
        assert node.driver.ledger.leased.cpu_milli == 0
        assert node.driver.ledger.leased.disk_bytes == spec().request.disk_bytes
        go_on.set()
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.outcome is Outcome.SUCCEEDED


async def test_the_remark_on_what_was_left_out_counts_all_of_it_however_much_that_is(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: bool(world.runtime.running))
        for number in range(2000):
            (node.dirs.results(T) / f"{'long' * 10}-{number:04}").symlink_to("x")
        world.runtime.finish(world.runtime.running[0], 0)
        record = await node.until_finished(T)
    (remark,) = record.remarks
    assert remark.startswith("2000 paths were left out or renamed, ")
    assert record.collected is not None
    assert len(record.collected.skipped) < 2000


def test_a_kept_copy_that_was_being_dropped_when_the_node_died_tells_where_it_went(world: World) -> None:
    bundles = Bundles(worker_id="node", results_dir=world.path / "results")
    kept = world.path / "results" / "t" / "1"
    (kept / "sub").mkdir(parents=True)
    (kept / "stdout.log").write_text("x")
    (kept / "manifest.json").write_text("{}")
    assert bundles.moved_to(spec()) is None
    bundles.discard_kept(spec(), "memory://t/1")
    assert sorted(path.name for path in kept.iterdir()) == [MOVED_NAME]
    # Cut off right after the pointer was written: the rest goes when it is asked for again.
    (kept / "stdout.log").write_text("x")
    assert bundles.moved_to(spec()) == "memory://t/1"
    bundles.discard_kept(spec(), "memory://t/1")
    assert sorted(path.name for path in kept.iterdir()) == [MOVED_NAME]


@pytest.mark.parametrize("keeps_in_the_store", [True, False])
async def test_results_in_whose_place_others_lie_are_set_aside_and_told(world: World, keeps_in_the_store: bool) -> None:
    """Two masters share the directory and give out the same id: no try will ever end otherwise."""
    world.keeps_in_the_store = keeps_in_the_store
    for store in (world.store, world.kept):
        store.stored["t/1"] = {"manifest.json": b"another master's"}
    async with living(world) as node:
        await node.assign(spec())
        record = await node.until_finished(T)
        aside = world.path / "state" / "salvage" / "t.1"
        assert record.verdict is not None
        assert record.verdict.reason is Reason.RESULTS_NOT_STORED
        assert record.verdict.exit_code == 0
        assert record.result_location == aside.as_uri()
        assert f"in {aside} on this host, since they can't be stored: other results" in record.remarks[-1]
        assert (aside / "stdout.log").read_bytes() == b"hello"
        assert (aside / "manifest.json").exists()
        assert not node.dirs.root(T).exists()
    assert world.store.stored["t/1"] == {"manifest.json": b"another master's"}
    assert len(world.uplink.reports) == 1


@pytest.mark.parametrize("keeps_in_the_store", [True, False])
async def test_results_that_are_not_whole_any_more_are_set_aside_and_told(
    world: World, keeps_in_the_store: bool
) -> None:
    world.keeps_in_the_store = keeps_in_the_store
    world.store.block()
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: world.store.put_count == 1)
        (node.dirs.root(T) / "stdout.log").write_bytes(b"rot")
        world.store.unblock()
        record = await node.until_finished(T)
        assert "is not what was collected" in record.remarks[-1]
        assert (world.path / "state" / "salvage" / "t.1" / "stdout.log").exists()
    assert world.store.stored == {}


@pytest.mark.parametrize("is_set_aside", [True, False])
async def test_a_node_that_died_once_it_had_set_results_aside_tells_where_they_are(
    world: World, is_set_aside: bool
) -> None:
    """And one whose work directory somebody removed says that."""
    world.store.block()
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: world.store.put_count == 1)
        await node.driver.settled()
    aside = node.dirs.salvage(T)
    assert aside is not None
    if not is_set_aside:
        shutil.rmtree(aside)
    async with living(world) as node:
        record = await node.until_finished(T)
    assert record.result_location == (aside.as_uri() if is_set_aside else "")
    assert (str(aside) in record.remarks[-1]) is is_set_aside
    assert record.verdict is not None
    assert record.verdict.reason is Reason.RESULTS_NOT_STORED


@pytest.mark.parametrize("what", ["gone", "damaged", "in another's place"])
async def test_kept_results_that_no_store_can_take_any_more_are_given_up_and_hold_no_disk(
    world: World, what: str
) -> None:
    world.give_up_seconds = 0.05
    world.kept = FileResultStore(world.path / "results")  # type: ignore[assignment]
    world.store.fail_next(1000, TransientError("away", reason="STORE_UNREACHABLE"))
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: node.phase(T) is Phase.RETAINING)
        await node.driver.settled()
    kept = world.path / "results" / "t" / "1"
    match what:
        case "gone":
            shutil.rmtree(kept)
        case "damaged":
            (kept / "stdout.log").write_bytes(b"rotten")
    world.store = MemoryResultStore()
    if what == "in another's place":
        world.store.stored["t/1"] = {"manifest.json": b"another's"}
    async with living(world) as node:
        record = await node.until_finished(T)
        assert "What was kept on this host can't be uploaded" in record.remarks[-1]
        assert record.verdict is not None
        assert record.verdict.reason is Reason.RESULTS_NOT_STORED
        assert node.driver.ledger.free == NODE
        assert kept.exists() is (what != "gone")
    assert len(world.uplink.reports) == 1
    await world.kept.close()


def test_a_task_cannot_claim_that_its_results_have_moved() -> None:
    assert stored_path(MOVED_NAME) == f"_task/{MOVED_NAME}"


def test_a_sparse_file_past_the_bound_is_left_out_with_a_word(tmp_path: Path) -> None:
    bundles = Bundles(worker_id="node", results_dir=tmp_path / "results")
    work = tmp_path / "work"
    (work / "results").mkdir(parents=True)
    with (work / "results" / "hole").open("wb") as stream:
        stream.truncate(3 * 2**20)
    (work / "results" / "small").write_text("x")
    bundle = bundles.collect(spec(), work, tmp_path / "log")
    assert [file.entry.path for file in bundle.files] == ["small"]
    assert any(line.startswith("hole: ") for line in bundle.manifest.skipped)


async def test_the_bound_lies_on_the_results_and_not_on_what_this_service_adds(world: World) -> None:
    """A quota on the whole work directory refuses the link to the log (EXDEV), and the manifest once it is used up."""
    async with living(world) as node:
        record = await node.assign(spec("bounded"))
        await node.until_finished(record.id)
    work, log = world.disk.prepared_places[record.id]
    assert (work, log) == (node.dirs.results(record.id), node.dirs.log(record.id))


def test_a_log_that_cannot_be_linked_fails_the_collection_and_not_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_places: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    bundles = Bundles(worker_id="node", results_dir=tmp_path / "results")
    (tmp_path / "work/results").mkdir(parents=True)
    with pytest.raises(NodeFaultError, match="cannot be linked") as raised:
        bundles.collect(spec(), tmp_path / "work", tmp_path / "log")
    assert raised.value.reason == "COLLECT_FAILED"


def test_collecting_is_broken_off_when_the_node_stops(tmp_path: Path) -> None:
    bundles = Bundles(worker_id="node", results_dir=tmp_path / "results")
    work = tmp_path / "work"
    (work / "results").mkdir(parents=True)
    (work / "results" / "small").write_text("x")
    bundles.stop()
    with pytest.raises(TransientError, match="stops") as caught:
        bundles.collect(spec(), work, tmp_path / "log")
    assert caught.value.reason == "STOPPING"
    assert not (work / "manifest.json").exists()


async def test_a_host_that_runs_out_of_disk_takes_nothing_new_and_ends_who_wrote_most(world: World) -> None:
    world.runtime.images["demo"] = FakeImage(holds=True)
    world.keep_free_disk_bytes = 1000
    world.free_space.free_bytes = 5000
    async with living(world) as node:
        for name, written_bytes in (("little", 10), ("much", 900)):
            await node.assign(spec(name))
            await node.until(lambda name=name: node.phase(AttemptId(name)) is Phase.RUNNING)  # type: ignore[misc]
            world.disk.write(AttemptId(name), written_bytes)
        world.free_space.free_bytes = 700
        await node.until(lambda: DISK_LOW in node.driver.all_conditions())
        with pytest.raises(CapacityError) as caught:
            await node.assign(spec("late"))
        assert caught.value.reason == DISK_LOW
        assert len(world.runtime.running) == 2
        world.free_space.free_bytes = 400
        much = AttemptId("much")
        await node.until(lambda: (found := node.driver.get(much)) is not None and found.stop is not None)
        world.free_space.free_bytes = 2000  # what it wrote is on its way out; else the next would have to go too
        record = await node.until_finished(much)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.NODE_DISK_LOW
        world.free_space.free_bytes = 5000
        await node.until(lambda: DISK_LOW not in node.driver.all_conditions())
        assert node.phase(AttemptId("little")) is Phase.RUNNING
        await node.assign(spec("late"))
        await node.until(lambda: node.phase(AttemptId("late")) is Phase.RUNNING)
        for container_id in world.runtime.running:
            world.runtime.finish(container_id, 0)
        await node.until_finished(AttemptId("little"))
        await node.until_finished(AttemptId("late"))


class CgroupsThatTakeForEver(NoTaskCgroups):
    def __init__(self) -> None:
        super().__init__()
        self.asked_count = 0

    async def prepare(self, spec: TaskSpec, cpu_ids: Sequence[int] = ()) -> str | None:
        self.asked_count += 1
        return await asyncio.get_running_loop().create_future()


async def test_a_node_that_ends_begins_no_step_anew_though_the_disk_fails_at_that_moment(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WorkDirs, "prepare", refuse)
    world.cgroups = cgroups = CgroupsThatTakeForEver()
    async with asyncio.timeout(30):
        async with living(world) as node:
            await node.assign(spec())
            await node.until(lambda: cgroups.asked_count == 1)
    assert cgroups.asked_count == 1
