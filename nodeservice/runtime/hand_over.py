"""Hands bytes from a thread to the loop: bounded, and with one wake-up however many pieces came."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque

from nodeservice.errors import NodeServiceError
from nodeservice.ports import LogMark

_BUFFER_BYTES = 1024 * 1024


class HandOver:
    """One thread puts, one coroutine takes; either may go first. The thread waits while the other is 1 MiB behind.

    The other is woken for `least_bytes`, and for the end.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, *, least_bytes: int = 1) -> None:
        assert least_bytes <= _BUFFER_BYTES
        self._loop = loop
        self._least_bytes = least_bytes
        self._ready = asyncio.Event()
        self._changed = threading.Condition()
        self._pieces: deque[bytes | LogMark] = deque()
        self._size_bytes = 0
        self._ended = False
        self._closed = False
        self._error: NodeServiceError | None = None

    def put(self, data: bytes | LogMark) -> bool:
        """In the thread; waits while the reader is behind. False: the reader has gone."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._size_bytes < _BUFFER_BYTES)
            if self._closed:
                return False
            before_bytes = self._size_bytes
            self._pieces.append(data)
            self._size_bytes += len(data) if isinstance(data, bytes) else 0
            if before_bytes < self._least_bytes <= self._size_bytes:
                self._wake()
            return True

    def end(self, error: NodeServiceError | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._wake()

    async def take(self) -> bytes | LogMark:
        """All bytes up to a mark, or the mark, after waiting for some; no bytes at the end. Raises what ended it."""
        while True:
            await self._ready.wait()
            with self._changed:
                self._ready.clear()
                data = self._next()
                self._changed.notify()
                if self._ended or self._pieces:
                    self._ready.set()
                if data:
                    return data
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    return b""

    def _next(self) -> bytes | LogMark:
        if self._pieces and not isinstance(self._pieces[0], bytes):
            return self._pieces.popleft()
        pieces: list[bytes] = []
        while self._pieces and isinstance(piece := self._pieces[0], bytes):
            pieces.append(piece)
            self._pieces.popleft()
        data = b"".join(pieces)
        self._size_bytes -= len(data)
        return data

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed without us
            self._loop.call_soon_threadsafe(self._ready.set)
