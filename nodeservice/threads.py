"""Threads for blocking work that the event loop waits for.

As `loop.run_in_executor` with a ThreadPoolExecutor, but a turn costs half the CPU time (60 µs for 120 µs, measured; a short
task makes some twenty): one future for two and the callbacks between them, and no locks on the way.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import structlog

log = structlog.get_logger(__name__)
T = TypeVar("T")
_RETRY_SECONDS = 1.0
_END_SECONDS = 2.0
"""Whoever ends a service gives it no more than some seconds."""
_Item = tuple[Callable[[], Any], "asyncio.Future[Any] | None"]


class Threads:
    """At most so many at a time, made when they are needed and kept. Work begins in the order in which it came.

    They are daemons: work that never ends must not keep the process from ending. Who needs the end of work awaits it.
    """

    def __init__(self, most: int, *, name: str) -> None:
        self._most = most
        self._name = name
        self._waiting: SimpleQueue[_Item | None] = SimpleQueue()
        self._free: deque[None] = deque(maxlen=most)
        """One for each thread that no work is meant for: what comes takes one, and gives it back when it is done."""
        self._owed: deque[None] = deque()
        """One for each piece of work that no thread is meant for. A thread that has done its own takes it, or is free."""
        self._retrying_on: asyncio.AbstractEventLoop | None = None
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._is_closed = False

    async def run(self, work: Callable[[], T]) -> T:
        """What it returns or raises. Cancelled, what has not begun is left out, and what has begun ends unheard.

        Raises RuntimeError after `close`, and where not even one thread can be started.
        """
        return await self.begin(work)

    def begin(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """As `run`, for who has something to do meanwhile. Raises RuntimeError at once."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._put((work, future))
        return future

    def submit(self, work: Callable[[], None]) -> None:
        """Begin it, and never hear of it again; what it raises is logged. Raises as `run` does."""
        self._put((work, None))

    def close(self) -> None:
        """Take nothing new, and leave out what has not begun; waits for nothing."""
        with self._lock:
            self._is_closed = True
        with suppress(Empty):
            while True:
                item = self._waiting.get_nowait()
                if item is not None and item[1] is not None:
                    _settle_from_thread(item[1], _cancel, item[1], None)
        for _ in self._threads:
            self._waiting.put(None)

    async def ended(self) -> None:
        """Return when all work that had begun has ended, or after some seconds. Call `close` before.

        Work may wait for an answer that never comes; what it leaves then is what a crash would leave.
        """
        give_up_at = time.monotonic() + _END_SECONDS
        for thread in self._threads:
            await asyncio.to_thread(thread.join, max(0.0, give_up_at - time.monotonic()))

    def _put(self, item: _Item) -> None:
        if self._is_closed:
            raise RuntimeError(f"{self._name}: closed, takes no more work")
        try:
            self._free.pop()
        except IndexError:
            if not self._add_thread():
                self._owed.append(None)
        self._waiting.put(item)

    def _add_thread(self) -> bool:
        """False where there are as many as may be, and where none is to be had just now, which is tried again."""
        with self._lock:
            if len(self._threads) == self._most or self._is_closed:
                return False
            thread = threading.Thread(target=self._work, name=f"{self._name}_{len(self._threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # of processes there are no more to be had: those that are there must do
                if not self._threads:
                    raise
                log.warning("thread.not_started", threads=self._name, error=str(error))
            else:
                self._threads.append(thread)
                return True
        self._retry_later()
        return False

    def _retry_later(self) -> None:
        """Those that are there may be busy for hours. Where no loop runs, what comes next tries."""
        with suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            if self._retrying_on is not loop:
                self._retrying_on = loop
                loop.call_later(_RETRY_SECONDS, self._retry)

    def _retry(self) -> None:
        self._retrying_on = None
        while self._owed and self._add_thread():
            self._settle_turn()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            _do(*item)
            del item  # what was done must not live on while there is nothing to do
            self._settle_turn()

    def _settle_turn(self) -> None:
        """For a thread that has nothing to do."""
        try:
            self._owed.pop()
        except IndexError:
            self._free.append(None)


def _do(work: Callable[[], Any], future: asyncio.Future[Any] | None) -> None:
    if future is None:
        try:
            work()
        except Exception as error:
            log.exception("thread.work_failed", error=str(error))
        return
    if future.cancelled():
        return
    try:
        result = work()
    except BaseException as error:
        _settle_from_thread(future, _fail, future, error)
    else:
        _settle_from_thread(future, _succeed, future, result)


def _settle_from_thread(future: asyncio.Future[Any], settle: Callable[..., None], *args: object) -> None:
    try:
        future.get_loop().call_soon_threadsafe(settle, *args)
    except RuntimeError:
        return  # the loop has ended, and with it whoever waited


def _succeed(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        if isinstance(error, StopIteration):  # which a future does not take
            error = RuntimeError("the work raised StopIteration")
        future.set_exception(error)


def _cancel(future: asyncio.Future[Any], _: None) -> None:
    future.cancel()
