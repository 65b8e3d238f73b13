"""One named thread that looks again and again, and takes orders in between.

It is a daemon thread, unlike those of ThreadPoolExecutor: a driver that never answers must not keep the process from ending.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Poller(Generic[T]):
    """Calls `look` each `every_seconds`. The last answer can be had at any time, without waiting for the next."""

    def __init__(self, name: str, look: Callable[[], T], *, every_seconds: float, on_look: Callable[[], None]) -> None:
        """`on_look` is called in the thread after each look."""
        self._name = name
        self._look = look
        self._every_seconds = every_seconds
        self._on_look = on_look
        self._orders: SimpleQueue[tuple[Callable[[], object], Future[object]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: T | None = None
        self._busy_since: float | None = None

    @property
    def is_started(self) -> bool:
        return self._thread is not None

    @property
    def last(self) -> T | None:
        """None before the first look has ended."""
        return self._last

    @property
    def busy_seconds(self) -> float:
        """For how long it has been in the same look or order; 0 between them."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def start(self) -> None:
        if self._thread is None:
            self._busy_since = time.monotonic()
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def order(self, call: Callable[[], object]) -> Future[object]:
        """Have something else done in the thread, between two looks."""
        future: Future[object] = Future()
        self._orders.put((call, future))
        return future

    def look_now(self, look: Callable[[], T]) -> Future[object]:
        """Have this look made at once, in the place of the usual one; done when it has ended."""
        return self.order(lambda: self._take(look))

    def end(self) -> None:
        """Let the thread end after what it does now. Does not wait."""
        self._orders.put(None)

    def _run(self) -> None:
        next_look_at = time.monotonic()
        while True:
            try:
                order = self._orders.get(timeout=max(0.0, next_look_at - time.monotonic()))
            except Empty:
                self._busy_since = time.monotonic()
                self._take(self._look)
                self._busy_since = None
                next_look_at = time.monotonic() + self._every_seconds
                continue
            if order is None:
                return
            self._carry_out(*order)

    def _take(self, look: Callable[[], T]) -> None:
        self._last = look()
        self._on_look()

    def _carry_out(self, call: Callable[[], object], future: Future[object]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        self._busy_since = time.monotonic()
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)
        finally:
            self._busy_since = None
