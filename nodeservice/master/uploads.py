"""Lets a node's results in: whose they may be, and the threads that write them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from nodeservice.errors import RequestError, TransientError
from nodeservice.master.checks import check_attempt, check_id, shown
from nodeservice.master.fault_points import armed
from nodeservice.master.incoming import Incoming, sweep
from nodeservice.master.rows import Key, State
from nodeservice.master.tasks import TaskBook

T = TypeVar("T")

PUSH_LIMIT_BYTES = 100 * 1024**3
AT_ONCE = 32
"""Uploads under way; more than the disk does at a time, and no more than memory has room for."""
_TURN_SECONDS = 30.0
_SILENCE_SECONDS = 120.0
_REMEMBERED_COUNT = 1000


class ResultUploads:
    """`push_limit_bytes` is for uploads over gRPC; those by HTTP have a limit of their own."""

    def __init__(self, book: TaskBook, results_dir: Path, *, push_limit_bytes: int = PUSH_LIMIT_BYTES) -> None:
        self._book = book
        self.push_limit_bytes = push_limit_bytes
        self._places = asyncio.Semaphore(AT_ONCE)
        self.turn_seconds = _TURN_SECONDS
        self.silence_seconds = _SILENCE_SECONDS
        self._too_large: dict[Key, RequestError] = {}
        """Refused for their size, the newest last: who sends one again need not send all of it to hear so."""
        self._results_dir = results_dir
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="master-results")

    async def open(self) -> None:
        await self.run(lambda: self._results_dir.mkdir(mode=0o750, parents=True, exist_ok=True))
        await self.run(lambda: sweep(self._results_dir))

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """For an upload from its beginning to its end. Raises TransientError where too many others are under way."""
        try:
            async with asyncio.timeout(self.turn_seconds):
                await self._places.acquire()
        except TimeoutError:
            raise TransientError(
                f"{AT_ONCE} uploads are under way, and this master takes no more at a time", reason="UPLOADS_BUSY"
            ) from None
        try:
            yield
        finally:
            self._places.release()

    async def heard(self, coming: Awaitable[T]) -> T:
        """What comes next from the sender, who would else keep his place for ever. Raises TransientError."""
        try:
            async with asyncio.timeout(self.silence_seconds):
                return await coming
        except TimeoutError:
            raise TransientError(
                f"nothing came of the upload for {self.silence_seconds:g} s", reason="UPLOAD_SILENT"
            ) from None

    def note_too_large(self, key: Key, error: RequestError) -> None:
        self._too_large[key] = error
        if len(self._too_large) > _REMEMBERED_COUNT:
            del self._too_large[next(iter(self._too_large))]

    async def begin(self, task_id: str, attempt: int | None, worker_id: str, *, limit_bytes: int) -> Incoming:
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
        if (refused := self._too_large.get((task_id, number))) is not None:
            raise refused
        incoming = Incoming(self._results_dir, task_id, number, limit_bytes=limit_bytes)
        return armed(incoming, "results")

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
