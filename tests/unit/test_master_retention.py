"""What a master forgets, and what it doesn't, from end to end of its own parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nodeservice.master.amounts import Amounts
from nodeservice.master.attempts import Taken
from nodeservice.master.clock import MasterClock
from nodeservice.master.nodes import NodeRegistry
from nodeservice.master.request import Request
from nodeservice.master.retention import Retention
from nodeservice.master.rows import Wanted
from nodeservice.master.store import MasterStore, sqlite_url
from nodeservice.master.tasks import TaskBook
from nodeservice.wire import master_worker_pb2 as pb

_DAY_MS = 86_400_000


class Calendar(MasterClock):
    """Days pass when the test says so, and no wait takes time."""

    def __init__(self) -> None:
        self.days = 20_000.0
        self.wrong_days = 0.0

    def unix_ms(self) -> int:
        return round((self.days + self.wrong_days) * _DAY_MS)

    def monotonic(self) -> float:
        return self.days * 86_400

    async def sleep(self, seconds: float) -> None:
        return None


class Master:
    """The parts of one that remember, on a real database."""

    def __init__(self, path: Path) -> None:
        self.clock, self.store = Calendar(), MasterStore(sqlite_url(path))
        self.book = TaskBook(self.store, self.clock)
        self.nodes = NodeRegistry(self.store, _nobody(), self.clock, timeout_seconds=30, gone_after_seconds=600)
        self.retention = self.new_retention()

    def new_retention(self, known_ms: int | None = None) -> Retention:
        parts = (self.book, self.nodes, self.store, self.clock)
        return Retention(*parts, seconds=90 * 86_400, known_ms=known_ms)

    async def give(self, task_id: str) -> None:
        row = await self.book.submit(pb.Task(task_id=task_id, docker_image="busybox"), refuse=lambda _: None)
        await self.book.assign([(row.key, "w")])

    async def end(self, task_id: str) -> Taken:
        return await self.book.complete(pb.TaskResult(task_id=task_id, worker_id="w", outcome="SUCCEEDED"))


@pytest.fixture
async def master(tmp_path: Path) -> AsyncIterator[Master]:
    made = Master(tmp_path)
    await made.store.open()
    await made.nodes.register(pb.WorkerInfo(worker_id="w", total_cpu=1), "ipv4:127.0.0.1:1")
    yield made
    await made.store.close()


async def test_a_task_is_forgotten_once_it_ended_long_ago_and_its_node_holds_nothing_of_it(master: Master) -> None:
    for task_id in ("ended", "kept"):
        await master.give(task_id)
        await master.end(task_id)
    await master.book.submit(pb.Task(task_id="waits", docker_image="busybox"), refuse=lambda _: None)
    still = pb.RunningTask(task_id="kept", attempt=1, phase="RETAINING")
    for days, removed in ((90, 0), (1, 1)):
        master.clock.days += days
        master.nodes.heartbeat(pb.Heartbeat(worker_id="w", running_tasks=[still]))
        assert await master.retention.look() == removed
    assert await master.book.find("ended") is None
    assert [row.task_id for row in await master.book.newest(9, Wanted())] == ["waits", "kept"]
    master.nodes.heartbeat(pb.Heartbeat(worker_id="w"))
    assert await master.retention.look() == 1
    assert [row.task_id for row in master.book.open_rows()] == ["waits"]


async def test_a_node_is_forgotten_once_it_is_long_away_and_holds_nothing_and_registers_when_it_comes_back(
    master: Master,
) -> None:
    await master.give("t")
    assert master.nodes.could_hold(Request(amounts=Amounts(cpu_milli=1)))
    for days in (90, 1):
        master.clock.days += days
        await master.retention.look()
        assert len(await master.store.load_nodes()) == len(master.nodes.views({})) == 1, (
            "it may have to tell of its task"
        )
    await master.book.lose(("t", 1), "w", "given up")
    await master.retention.look()
    assert await master.store.load_nodes() == master.nodes.views({}) == []
    assert not master.nodes.could_hold(Request(amounts=Amounts(cpu_milli=1)))
    beat = pb.Heartbeat(worker_id="w", running_tasks=[pb.RunningTask(task_id="t", attempt=1)])
    assert master.nodes.heartbeat(beat) is None
    await master.nodes.register(pb.WorkerInfo(worker_id="w", total_cpu=1), "ipv4:127.0.0.1:1")
    assert master.nodes.heartbeat(beat) is not None
    assert len(await master.store.load_nodes()) == 1
    assert await master.end("t") is Taken.ENDED, "nobody had the next attempt"


@pytest.mark.parametrize("was_restarted", [False, True])
async def test_a_clock_that_jumped_ahead_makes_nothing_forgotten_before_it_stood_so_for_a_day(
    master: Master, was_restarted: bool
) -> None:
    await master.give("t")
    await master.end("t")
    master.clock.wrong_days = 300
    if was_restarted:
        master.retention = master.new_retention((await master.book.newest(1, Wanted()))[0].queued_at_ms)
    for _ in range(24):
        master.nodes.heartbeat(pb.Heartbeat(worker_id="w"))
        assert await master.retention.look() == 0
        master.clock.days += 1 / 24
    master.clock.wrong_days = -300
    assert await master.retention.look() == 0
    master.clock.wrong_days = 300
    for removed in (0, 1):
        master.nodes.heartbeat(pb.Heartbeat(worker_id="w"))
        assert await master.retention.look() == removed
        master.clock.days += 1.1


def _nobody() -> Any:
    """Who dials no node."""
    return NoDialer()


class NoDialer:
    async def drop(self, address: str) -> None:
        return None
