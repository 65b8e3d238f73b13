"""What a master forgets, and what it doesn't, from end to end of its own parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nodeservice.master.clock import MasterClock
from nodeservice.master.nodes import NodeRegistry
from nodeservice.master.retention import Retention
from nodeservice.master.store import MasterStore, sqlite_url
from nodeservice.master.tasks import TaskBook
from nodeservice.wire import master_worker_pb2 as pb

_DAY_MS = 86_400_000


class Calendar(MasterClock):
    """Days pass when the test says so, and no wait takes time."""

    def __init__(self) -> None:
        self.days = 20_000

    def unix_ms(self) -> int:
        return self.days * _DAY_MS

    async def sleep(self, seconds: float) -> None:
        return None


async def test_a_task_is_forgotten_once_it_ended_long_ago_and_its_node_holds_nothing_of_it(tmp_path: Path) -> None:
    clock, store, dialer = Calendar(), MasterStore(sqlite_url(tmp_path)), _nobody()
    await store.open()
    book = TaskBook(store, clock)
    nodes = NodeRegistry(store, dialer, clock, timeout_seconds=30, gone_after_seconds=600)
    retention = Retention(book, nodes, store, clock, seconds=90 * 86_400)
    await nodes.register(pb.WorkerInfo(worker_id="w", total_cpu=1), "ipv4:127.0.0.1:1")
    for task_id in ("ended", "kept", "waits"):
        row = await book.submit(pb.Task(task_id=task_id, docker_image="busybox"), refuse=lambda _: None)
        if task_id != "waits":
            await book.assign([(row.key, "w")])
            await book.complete(pb.TaskResult(task_id=task_id, worker_id="w", attempt=1, outcome="SUCCEEDED"))
    still = pb.RunningTask(task_id="kept", attempt=1, phase="RETAINING")
    nodes.heartbeat(pb.Heartbeat(worker_id="w", running_tasks=[still]))
    clock.days += 90
    assert await retention.look() == 0
    clock.days += 1
    assert await retention.look() == 1
    assert await book.find("ended") is None
    assert [row.task_id for row in await book.newest(9)] == ["waits", "kept"]
    nodes.heartbeat(pb.Heartbeat(worker_id="w"))
    assert await retention.look() == 1
    assert [row.task_id for row in book.open_rows()] == ["waits"]
    await store.close()


def _nobody() -> Any:
    """Who dials no node."""
    return None
