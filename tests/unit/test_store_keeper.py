"""A store that takes no results: when the node says so, and when it takes no tasks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nodeservice.core.model import AttemptId
from nodeservice.errors import CapacityError, NodeFaultError, TransientError
from nodeservice.testing.fake_runtime import FakeImage
from nodeservice.testing.memory_store import MemoryResultStore
from tests.unit.node_harness import World, living, spec

REFUSED = NodeFaultError("m:9000/b: cannot list", reason="STORE_CREDENTIALS", hint="check the secret key")
T = AttemptId("t")


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.runtime.images["demo"] = FakeImage(output=b"hello")
    return world


async def test_a_node_whose_credentials_the_store_refuses_takes_no_task_until_it_takes_them(world: World) -> None:
    world.store.trouble = REFUSED
    async with living(world) as node:
        with pytest.raises(CapacityError, match="check the secret key") as caught:
            await node.assign(spec())
        assert caught.value.reason == "STORE_CREDENTIALS"
        assert node.driver.all_conditions() == {"STORE_CREDENTIALS": "m:9000/b: cannot list (check the secret key)"}
        world.store.trouble = None
        await node.until(lambda: not node.driver.all_conditions())
        await node.assign(spec())
        await node.until_finished(T)
    assert "t/1" in world.store.stored


@pytest.mark.parametrize(
    "trouble",
    [
        TransientError("away", reason="STORE_UNREACHABLE"),
        NodeFaultError("AccessDenied", reason="STORE_REFUSED"),
    ],
)
async def test_all_else_that_is_wrong_with_the_store_is_told_and_tasks_are_taken(
    world: World, trouble: TransientError | NodeFaultError
) -> None:
    world.store.trouble = trouble
    async with living(world) as node:
        assert node.driver.warnings == {trouble.reason: str(trouble)}
        assert not node.driver.all_conditions()
        await node.assign(spec())
        await node.until_finished(T)
        world.store.trouble = None
        await node.until(lambda: not node.driver.warnings)


async def test_one_trouble_takes_the_place_of_another(world: World) -> None:
    world.store.trouble = TransientError("away", reason="STORE_UNREACHABLE")
    async with living(world) as node:
        world.store.trouble = REFUSED
        await node.until(lambda: bool(node.driver.all_conditions()))
        assert not node.driver.warnings


async def test_a_store_that_did_not_take_results_is_asked_at_once(world: World) -> None:
    world.check_store_seconds = 3600.0
    async with living(world) as node:
        world.store.trouble = REFUSED
        world.store.fail_next(1, REFUSED)
        await node.assign(spec())
        await node.until(lambda: "STORE_CREDENTIALS" in node.driver.all_conditions())


class SilentStore(MemoryResultStore):
    async def check(self) -> None:
        await asyncio.Event().wait()


async def test_a_store_that_does_not_answer_keeps_no_node_from_its_start(world: World) -> None:
    world.store = SilentStore()
    async with living(world) as node:
        await node.assign(spec())
        await node.until_finished(T)


async def test_a_store_that_cannot_even_be_asked_does_not_end_the_node(world: World) -> None:
    world.store.trouble = ValueError("invalid region eu central")  # type: ignore[assignment]
    async with living(world) as node:
        assert node.driver.warnings == {"STORE_REFUSED": "the store could not be asked: invalid region eu central"}
        world.store.trouble = None
        await node.until(lambda: not node.driver.warnings)
