"""Tasks that may not go on for long without the master, on a node in memory."""

from __future__ import annotations

from datetime import timedelta

import pytest

from nodeservice.core.model import AttemptId, Phase, Reason
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime
from tests.unit.node_harness import World, living, spec

pytestmark = pytest.mark.slow

T = AttemptId("t")


@pytest.fixture
def world(tmp_path) -> World:  # type: ignore[no-untyped-def]
    return World(path=tmp_path, runtime=FakeRuntime(images={"demo": FakeImage(holds=True)}))


async def test_a_task_with_a_limit_ends_once_the_master_was_silent_for_longer(world: World) -> None:
    async with living(world) as node:
        await node.assign(spec(disconnect_limit_seconds=0.2))
        await node.assign(spec("patient"))
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.MASTER_LOST
        assert node.phase(AttemptId("patient")) is Phase.RUNNING


async def test_a_master_that_is_heard_keeps_it_running(world: World) -> None:
    async with living(world) as node:
        world.uplink.heard_at = node.clock.now() + timedelta(hours=1)
        await node.assign(spec(disconnect_limit_seconds=0.2))
        await node.until(lambda: node.phase(T) is Phase.RUNNING)
        await node.clock.sleep(1.3)
        assert node.phase(T) is Phase.RUNNING
        assert await world.journal.get_note("master_heard_at") == world.uplink.heard_at.isoformat()


async def test_a_restart_gives_it_no_more_time(world: World) -> None:
    async with living(world) as node:
        await node.assign(spec(disconnect_limit_seconds=1.5))
        await node.until(lambda: node.phase(T) is Phase.RUNNING)
        await node.clock.sleep(1.0)
    async with living(world) as node:
        record = await node.until_finished(T)
        assert record.verdict is not None
        assert record.verdict.reason is Reason.MASTER_LOST
