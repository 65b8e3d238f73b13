"""What all tasks may have together, and which CPUs are whose, as the node tells its cgroups."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nodeservice.core.cpus import Cpu
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import AttemptId, Phase, Resources, TaskSpec
from nodeservice.limits.cgroup import NoTaskCgroups
from nodeservice.testing.fake_disk import FakeFreeSpace
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime
from tests.unit.node_harness import NODE, LiveNode, World, living, spec

E, S = AttemptId("e"), AttemptId("s")
CPUS = tuple(Cpu(numa_node=0, core=number, id=number) for number in range(2))


Told = tuple[Resources, Sequence[int], Mapping[AttemptId, Sequence[int]]]


class Cgroups(NoTaskCgroups):
    """Remembers what it was told, and could not do it so many times."""

    def __init__(self) -> None:
        super().__init__()
        self.fail_count = 0
        self.told: list[Told] = []
        self.told_before: dict[AttemptId, list[Told]] = {}
        """Before that one's cgroup was made."""

    async def prepare(self, spec: TaskSpec, cpu_ids: Sequence[int] = ()) -> str | None:
        self.told_before[spec.id] = [*self.told]
        return await super().prepare(spec, cpu_ids)

    async def share(
        self,
        allocatable: Resources,
        cpu_ids: Sequence[int] = (),
        exclusive_cpu_ids: Mapping[AttemptId, Sequence[int]] | None = None,
    ) -> bool:
        self.told.append((allocatable, cpu_ids, exclusive_cpu_ids))
        self.fail_count -= 1
        return self.fail_count < 0


class CountedLooks(FakeFreeSpace):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    async def least(self) -> tuple[int, Path] | None:
        self.count += 1
        return await super().least()


@pytest.fixture
def cgroups() -> Cgroups:
    return Cgroups()


@pytest.fixture
def world(tmp_path: Path, cgroups: Cgroups) -> World:
    runtime = FakeRuntime(images={"demo": FakeImage(holds=True)})
    return World(tmp_path, runtime=runtime, cgroups=cgroups)


def node_with_cpus(world: World) -> LiveNode:
    node = LiveNode(world)
    node.driver.ledger = Ledger(NODE, cpus=CPUS)
    return node


async def test_the_cgroups_are_told_whose_cpus_are_exclusive_also_by_a_node_that_starts_again(
    world: World, cgroups: Cgroups
) -> None:
    node = await node_with_cpus(world).start()
    try:
        await node.assign(spec("s"))
        await node.until(lambda: node.phase(S) is Phase.RUNNING)
        assert cgroups.told == [(NODE, (), {})]
        await node.assign(spec("e", exclusive_cpus=True))
        await node.until(lambda: node.phase(E) is Phase.RUNNING)
        await node.until(lambda: len(cgroups.told) == 2)
        assert cgroups.told[1] == (NODE, (1,), {E: (0,)})
    finally:
        await node.kill()
    node = await node_with_cpus(world).start()
    try:
        assert cgroups.told[2] == (NODE, (1,), {E: (0,)})
        for container_id in world.runtime.running:
            world.runtime.finish(container_id, 0)
        await node.until_finished(E)
        await node.until_finished(S)
        await node.until(lambda: cgroups.told[-1] == (NODE, (), {}))
    finally:
        await node.kill()


class HungDisk(FakeFreeSpace):
    async def least(self) -> tuple[int, Path] | None:
        await asyncio.Event().wait()
        return None


async def test_the_others_are_told_to_leave_exclusive_cpus_before_their_owner_comes(
    world: World, cgroups: Cgroups
) -> None:
    world.free_space = HungDisk()
    node = await node_with_cpus(world).start()
    try:
        await node.assign(spec("e", exclusive_cpus=True))
        await node.until(lambda: node.phase(E) is Phase.RUNNING)
        assert cgroups.told_before[E][-1] == (NODE, (1,), {E: (0,)})
    finally:
        await node.kill()


@pytest.mark.parametrize("fail_count", [0, 1, 4])
async def test_a_share_that_could_not_be_set_is_set_again_until_it_holds(
    world: World, cgroups: Cgroups, fail_count: int
) -> None:
    cgroups.fail_count = fail_count
    world.free_space = looks = CountedLooks()
    async with living(world) as node:
        await node.until(lambda: len(cgroups.told) > fail_count)
        before = looks.count
        await node.until(lambda: looks.count >= before + 4)
        assert cgroups.told == [(NODE, (), {})] * (fail_count + 1)
        less = replace(NODE, memory_bytes=NODE.memory_bytes // 2)
        node.driver.ledger.resize(less, ())
        await node.until(lambda: cgroups.told[-1] == (less, (), {}))


async def test_a_node_that_became_smaller_lowers_its_share_as_those_end_that_were_granted_more(
    world: World, cgroups: Cgroups
) -> None:
    """On cgroup v2 a limit below what is in use is set at once, and the kernel ends tasks until it fits."""
    async with living(world) as node:
        for id_ in (E, S):
            await node.assign(spec(id_.task_id))
            await node.until(lambda id_=id_: node.phase(id_) is Phase.RUNNING)  # type: ignore[misc]
        granted = spec().request
        small = replace(NODE, cpu_milli=granted.cpu_milli // 2, memory_bytes=granted.memory_bytes + 1)
        node.driver.ledger.resize(small, ())
        both = replace(small, cpu_milli=2 * granted.cpu_milli, memory_bytes=2 * granted.memory_bytes)
        await node.until(lambda: cgroups.told[-1] == (both, (), {}))
        for cpu_milli in (granted.cpu_milli, small.cpu_milli):
            world.runtime.finish(world.runtime.running[0], 0)
            await node.until(lambda left=cpu_milli: cgroups.told[-1] == (replace(small, cpu_milli=left), (), {}))  # type: ignore[misc]
