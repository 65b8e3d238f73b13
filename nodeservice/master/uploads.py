"""Lets a node's results in: whose they may be, and the threads that write them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from nodeservice.errors import RequestError
from nodeservice.master.checks import check_attempt, check_id, shown
from nodeservice.master.fault_points import armed
from nodeservice.master.incoming import Incoming, sweep
from nodeservice.master.rows import State
from nodeservice.master.tasks import TaskBook

T = TypeVar("T")


class ResultUploads:
    def __init__(self, book: TaskBook, results_dir: Path) -> None:
        self._book = book
        self._results_dir = results_dir
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="master-results")

    async def open(self) -> None:
        await self.run(lambda: self._results_dir.mkdir(mode=0o750, parents=True, exist_ok=True))
        await self.run(lambda: sweep(self._results_dir))

    async def begin(self, task_id: str, attempt: int | None, worker_id: str) -> Incoming:
        """Without `attempt` the newest is meant. Raises RequestError.

        A task that is not known here is let in: the master may have lost its memory, and the node must not keep the
        results for ever. An attempt that another node holds (STALE_ATTEMPT) is not.
        """
        check_id("task_id", task_id)
        if attempt is not None:
            check_attempt("attempt", attempt)
        row = await self._book.find(task_id, attempt)
        if row is not None:
            stale = bool(worker_id) and row.worker_id != worker_id
            if stale or row.state is State.QUEUED:
                raise RequestError(
                    f"attempt {row.attempt} of {task_id} does not belong to node {shown(worker_id)}",
                    reason="STALE_ATTEMPT",
                    field="worker_id",
                )
        number = attempt if attempt is not None else row.attempt if row is not None else 1
        return await self.run(lambda: armed(Incoming(self._results_dir, task_id, number), "results"))

    async def run(self, work: Callable[[], T]) -> T:
        """Run blocking work of an upload. When the waiter is cancelled, the work itself still ends first."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            raise

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
