"""A master that is killed, frozen or failed at each named point loses nothing and tells nothing wrong."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from nodeservice.master.fault_points import POINTS
from nodeservice.wire import master_worker_pb2 as pb
from tests.integration.master_ordeal import MasterOrdeal, go_through
from tests.integration.master_process import MasterProcess
from tests.integration.scripted_node import ScriptedNode
from tests.integration.side_by_side import side_by_side
from tests.integration.test_master_service import Client

pytestmark = [pytest.mark.crash, pytest.mark.timeout(180)]

WRITES = "store.save_tasks"
OFTEN = (1, 2, 4, 6, 8, 10, 12)
"""Which of the many writes: submissions, assignments, answers, phases, ends, losses."""
ONCE = ("store.save_orphan", "node.CancelTask", "node.MasterRegister")
"""What an ordeal may bring about only once, or by one call."""
Case = tuple[str, str, int]
KILLED: list[Case] = [
    ("kill", point, count)
    for point in POINTS
    for count in (OFTEN if point.startswith(WRITES) else (1,) if point.startswith(ONCE) else (1, 2))
]
FAILED: list[Case] = [
    ("fail", point, count)
    for _, point, count in KILLED
    if point.startswith(("store", "results")) and count in (1, 2, 6, 10)
]
FROZEN: list[Case] = [
    ("stop", point, 2) for point in ("store.save_tasks.before", "store.save_tasks.after", "node.AssignTask.after")
]


@pytest.fixture(scope="module")
def ordeals(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Hashable, Future[MasterOrdeal]]]:
    home = tmp_path_factory.mktemp("masters")  # here: the factory serves one thread

    async def run(case: Case) -> MasterOrdeal:
        action, point, count = case
        path = home / named(case)
        path.mkdir()
        return await go_through(path, point, action, count)

    with side_by_side(request, run, at_a_time=4) as ordeals:
        yield ordeals


def named(case: Case) -> str:
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", KILLED, ids=named)
def test_a_master_killed_there_loses_nothing_and_gives_nothing_twice(
    case: Case, ordeals: dict[Hashable, Future[MasterOrdeal]]
) -> None:
    ordeal = ordeals[case].result()
    assert (ordeal.reached, ordeal.broken) == (True, [])


@pytest.mark.parametrize("case", FAILED, ids=named)
def test_a_write_that_fails_there_is_made_again_and_nobody_is_told_otherwise(
    case: Case, ordeals: dict[Hashable, Future[MasterOrdeal]]
) -> None:
    ordeal = ordeals[case].result()
    assert (ordeal.reached, ordeal.broken) == (True, [])


@pytest.mark.parametrize("case", FROZEN, ids=named)
def test_a_master_frozen_there_goes_on_when_it_is_thawed(
    case: Case, ordeals: dict[Hashable, Future[MasterOrdeal]]
) -> None:
    ordeal = ordeals[case].result()
    assert (ordeal.reached, ordeal.broken) == (True, [])


async def test_a_master_frozen_for_longer_than_its_patience_gives_no_node_up(tmp_path: Path) -> None:
    master = await MasterProcess(tmp_path, "--heartbeat-timeout", "2s", "--gone-after", "3s").start()
    assert master.process is not None
    client = Client(master.address)
    running = pb.RunningTask(task_id="t1", attempt=1, phase="RUNNING")
    try:
        async with ScriptedNode(master.address) as node:
            await node.register()
            await client.submit("t1")
            await node.got("t1")
            await node.beat(running)
            master.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(4.0)  # it is about the time in which nothing ran
            master.process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.5)  # a pass over the queue
            assert await node.beat(running)
            view = await client.get("t1")
            assert (view.state, view.task.attempt, len(view.attempts)) == ("RUNNING", 1, 1)
        assert "master.was_away" in master.log.read_text()
        assert "task.lost" not in master.log.read_text()
    finally:
        master.process.send_signal(signal.SIGCONT)
        await client.channel.close(None)
        await master.end()
