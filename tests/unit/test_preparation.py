"""A task's cgroup and directories are made beside the look for its image, and go with it however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from nodeservice.core.model import AttemptId, Outcome, Phase, Reason, StopCause, StopRequest, TaskSpec
from nodeservice.errors import NodeServiceError, RequestError, TransientError
from nodeservice.lifecycle.steps import create
from nodeservice.limits.cgroup import NoTaskCgroups
from nodeservice.ports import ContainerSpec, ContainerState, labels
from nodeservice.testing.fake_disk import FakeTaskDisk
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime
from tests.unit.node_harness import LiveNode, World, living, spec

T = AttemptId("t")


class Cgroups(NoTaskCgroups):
    """Makes a cgroup when it is allowed to; `fails` goes wrong in its place, one after the other."""

    def __init__(self, *fails: NodeServiceError) -> None:
        super().__init__()
        self.allowed = asyncio.Event()
        self.fails = list(fails)
        self.asked_count = 0
        self.present: set[AttemptId] = set()
        self.used: set[AttemptId] = set()
        self.crowd = ""

    async def crowded(self, id_: AttemptId) -> str:
        return self.crowd

    async def was_used(self, id_: AttemptId) -> bool:
        return id_ in self.used

    async def prepare(self, spec: TaskSpec, cpu_ids: Sequence[int] = ()) -> str | None:
        self.asked_count += 1
        await self.allowed.wait()
        if self.fails:
            raise self.fails.pop(0)
        self.present.add(spec.id)
        return f"/node/{spec.id}"

    async def remove(self, id_: AttemptId) -> None:
        self.present.discard(id_)


class StartsNothing(FakeRuntime):
    """Until it may. Then it notes for whose container cgroup and disk are there."""

    def __init__(self, world: World, cgroups: Cgroups) -> None:
        super().__init__(images={"demo": FakeImage()})
        self.world = world
        self.cgroups = cgroups
        self.may_start = False
        self.refused_count = 0
        self.found: list[tuple[set[AttemptId], tuple[AttemptId, ...]]] = []

    async def start(self, container_id: str) -> ContainerState:
        self._untouched.discard(container_id)
        if not self.may_start:
            self.refused_count += 1
            raise TransientError("the engine hangs", reason="ENGINE_AWAY")
        self.found.append((set(self.cgroups.present), self.world.disk.prepared))
        return await super().start(container_id)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.runtime = FakeRuntime(images={"demo": FakeImage(is_local=False, pull_holds=True)})
    return world


async def cancel(node: LiveNode) -> None:
    await node.driver.request_stop(T, StopRequest(cause=StopCause.CANCELLED, requested_at=node.clock.now()))


async def test_the_cgroup_is_made_while_the_image_is_pulled_and_the_container_put_in_it(world: World) -> None:
    world.cgroups = cgroups = Cgroups()
    async with living(world) as node:
        await node.assign(spec())
        cgroups.allowed.set()
        await node.until(lambda: cgroups.present == {T} and node.dirs.results(T).is_dir())
        assert node.phase(T) is Phase.PULLING
        world.runtime.release_pulls()
        await node.until_finished(T)
        assert [made.cgroup_parent for made in world.runtime.specs] == [f"/node/{T}"]
        assert cgroups.asked_count == 1
        assert not cgroups.present
        assert not node.context.preparing


async def test_of_a_task_cancelled_meanwhile_nothing_is_made_after_its_clean_up(world: World) -> None:
    world.cgroups = cgroups = Cgroups()
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: cgroups.asked_count == 1)
        await cancel(node)
        await node.until(lambda: node.phase(T) is Phase.CLEANING)
        assert world.uplink.reports, "the master hears of the end at once"
        await asyncio.sleep(0.05)
        assert node.phase(T) is Phase.CLEANING, "what was begun is waited for"
        cgroups.allowed.set()
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.outcome is Outcome.CANCELLED
        assert not cgroups.present
        assert not node.dirs.root(T).exists()
        assert not node.context.preparing


@pytest.mark.parametrize("crowd", ["", "/above has 9 of 10 processes"])
@pytest.mark.parametrize("reason", [Reason.START_FAILED, Reason.COMMAND_NOT_FOUND])
async def test_a_start_for_which_a_cgroup_above_has_no_room_is_no_fault_of_the_task(
    world: World, crowd: str, reason: Reason
) -> None:
    world.cgroups = cgroups = Cgroups()
    cgroups.allowed.set()
    cgroups.crowd = crowd
    world.runtime = FakeRuntime(images={"demo": FakeImage()})
    world.runtime.fail_next("start", RequestError("can't get final child's PID from pipe: EOF", reason=reason.value))
    async with living(world) as node:
        await node.assign(spec())
        record = await node.until_finished(T)
    assert record.verdict is not None
    is_crowded = bool(crowd) and reason is Reason.START_FAILED
    assert record.verdict.reason is (Reason.NODE_FAULT if is_crowded else reason)
    assert (("/above has 9 of 10" in record.verdict.message), "final child" in record.verdict.message) == (
        is_crowded,
        True,
    )


class CreatesLate(FakeRuntime):
    """When it may. As the real one, a cancelled caller waits for that."""

    def __init__(self) -> None:
        super().__init__(images={"demo": FakeImage()})
        self.may_create = asyncio.Event()

    async def create(self, spec: ContainerSpec) -> str:
        making = asyncio.create_task(self._create(spec))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            await making
            raise

    async def _create(self, spec: ContainerSpec) -> str:
        self.calls.append(("create", spec.name))
        await self.may_create.wait()
        return await super().create(spec)


async def test_a_cancel_is_told_though_the_engine_is_silent_and_what_it_makes_then_is_removed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create, "_STOP_LOOK_SECONDS", 0.01)
    world.runtime = runtime = CreatesLate()
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: ("create", labels.container_name(T)) in runtime.calls)
        await cancel(node)
        await node.until(lambda: node.phase(T) is Phase.CLEANING)
        [told] = world.uplink.reports
        assert told.verdict is not None
        assert told.verdict.outcome is Outcome.CANCELLED
        await asyncio.sleep(0.02)
        assert node.phase(T) is Phase.CLEANING, "the engine's answer is waited for"
        runtime.may_create.set()
        await node.until_finished(T)
        assert len(runtime.specs) == 1
        assert await runtime.list_owned("node") == []
        assert not node.context.creating


async def test_what_failed_meanwhile_is_told_by_the_step_that_needs_it(world: World) -> None:
    refusal = RequestError("no such device", reason="LIMIT_NOT_ENFORCED", field="read_bytes_per_second")
    world.cgroups = cgroups = Cgroups(refusal)
    cgroups.allowed.set()
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: not cgroups.fails)
        assert node.phase(T) is Phase.PULLING
        world.runtime.release_pulls()
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.reason is Reason.LIMIT_NOT_ENFORCED
    assert "no such device" in record.verdict.message
    assert world.runtime.specs == []


async def test_what_only_failed_for_a_moment_is_made_again(world: World) -> None:
    world.cgroups = cgroups = Cgroups(TransientError("busy", reason="CGROUP_BUSY"))
    cgroups.allowed.set()
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: not cgroups.fails)
        world.runtime.release_pulls()
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.outcome is Outcome.SUCCEEDED
    assert cgroups.asked_count == 2
    assert [made.cgroup_parent for made in world.runtime.specs] == [f"/node/{T}"]


async def test_a_node_that_ends_meanwhile_leaves_no_work_behind_and_makes_it_after_its_start(world: World) -> None:
    world.cgroups = cgroups = Cgroups()
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: cgroups.asked_count == 1)
    assert all(task.done() for task in node.context.preparing.values())
    cgroups.allowed.set()
    async with living(world) as node:
        world.runtime.release_pulls()
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.outcome is Outcome.SUCCEEDED
    assert cgroups.asked_count == 2


@pytest.mark.parametrize("was_used", [False, True], ids=["not begun", "begun"])
async def test_what_went_with_the_host_is_made_again_before_a_container_that_was_left_is_started(
    world: World, was_used: bool
) -> None:
    world.cgroups = cgroups = Cgroups()
    cgroups.allowed.set()
    world.runtime = runtime = StartsNothing(world, cgroups)
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: node.phase(T) is Phase.STARTING and runtime.refused_count > 1)
        await node.driver.settled()
    world.disk = FakeTaskDisk()
    cgroups.present.clear()
    cgroups.used = {T} if was_used else set()
    asked_before, runtime.may_start = cgroups.asked_count, True
    async with living(world) as node:
        record = await node.until_finished(T)
    assert record.verdict is not None
    if was_used:  # by a start that the engine forgot: a cgroup made anew must not hide that
        assert (record.verdict.reason, runtime.found) == (Reason.ENGINE_FAULT, [])
        assert cgroups.asked_count == asked_before
    else:
        assert (record.verdict.outcome, runtime.found) == (Outcome.SUCCEEDED, [({T}, (T,))])
        assert len(runtime.specs) == 1
