"""Captures a container's log to a file, exactly once, and lets many follow it.

The engine records both streams in one order and replays the same bytes from the start. So a capture that begins again (after
a restart, or a broken stream) skips as many bytes as the file holds: no gap and no duplicate. Past the limit the file ends
with a line that says so, and only the last bytes are kept in memory for the report.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import structlog

from nodeservice.core.model import AttemptId, Reason
from nodeservice.errors import NodeServiceError, TransientError
from nodeservice.ports import ContainerRuntime

log = structlog.get_logger(__name__)

_MARKER = "\n[nodeservice: log cut here, at the limit of {limit} bytes]\n"
_COMPLETE_MEMORY = 4_096


class LogBook:
    """The logs of all attempts on this node."""

    def __init__(
        self, runtime: ContainerRuntime, *, max_bytes: int, tail_bytes: int, resume_seconds: float = 1.0
    ) -> None:
        self._resume_seconds = resume_seconds
        self._runtime = runtime
        self._max_bytes = max_bytes
        self._tail_bytes = tail_bytes
        self._signals: dict[AttemptId, asyncio.Event] = {}
        self._complete: OrderedDict[AttemptId, None] = OrderedDict()
        self._tails: dict[AttemptId, bytes] = {}

    async def capture(self, id_: AttemptId, container_id: str, path: Path, *, follow: bool) -> None:
        """Bring the file up to date: to the end of the log now, or (following) to its end at exit.

        Raises TransientError when the stream breaks, or the file can't be opened or written; call again. One capture at a
        time per attempt.
        """
        if id_ in self._complete:
            return
        try:
            await self._write(id_, container_id, path, follow=follow)
        except OSError as error:
            raise TransientError(
                f"cannot write {path}: {error}",
                reason="LOG_UNWRITABLE",
                hint="free space on the state directory's disk",
            ) from error
        if follow:
            self._complete[id_] = None
            while len(self._complete) > _COMPLETE_MEMORY:
                self._complete.popitem(last=False)

    async def _write(self, id_: AttemptId, container_id: str, path: Path, *, follow: bool) -> None:
        writer = _CappedFile(path, self._max_bytes, self._tail_bytes)
        try:
            async for chunk in self._runtime.read_log(container_id, follow=follow):
                writer.feed(chunk)
                self._wake(id_)
        finally:
            writer.close()
            if writer.tail is not None:
                self._tails[id_] = writer.tail
            self._wake(id_)

    async def follow_until_end(self, id_: AttemptId, container_id: str, path: Path) -> None:
        """Follow, and take the stream up again when it breaks. Ends with the container."""
        while True:
            try:
                await self.capture(id_, container_id, path, follow=True)
            except NodeServiceError as error:
                if error.reason == Reason.CONTAINER_LOST:
                    return  # whoever waits for the container tells how it ended
                log.warning("log.interrupted", task_id=id_.task_id, attempt=id_.attempt, error=str(error))
                await asyncio.sleep(self._resume_seconds)
            else:
                return

    def tail(self, id_: AttemptId, path: Path) -> str:
        """The last bytes of the log as valid UTF-8, cut on a character boundary, bad bytes replaced."""
        kept = self._tails.pop(id_, None)
        if kept is None:
            kept = _read_end(path, self._tail_bytes)
        return clean_tail(kept, self._tail_bytes)

    def forget(self, id_: AttemptId) -> None:
        self._tails.pop(id_, None)
        self._complete.pop(id_, None)
        self._wake(id_)

    # ---- followers ------------------------------------------------------------------------------------------------

    def changed(self, id_: AttemptId) -> asyncio.Event:
        """An event that is set at the next growth or end of this log. Take it before reading, so that none is missed."""
        return self._signals.setdefault(id_, asyncio.Event())

    def _wake(self, id_: AttemptId) -> None:
        signal = self._signals.pop(id_, None)
        if signal is not None:
            signal.set()

    def wake(self, id_: AttemptId) -> None:
        """Tell followers to look again, for instance since the attempt's phase changed."""
        self._wake(id_)


def clean_tail(raw: bytes, limit_bytes: int) -> str:
    """At most `limit_bytes` of valid UTF-8 (wire.md: a string that is not valid loses the whole report)."""
    text = raw[-limit_bytes:].decode("utf-8", errors="replace") if limit_bytes else ""
    if len(raw) > limit_bytes:
        text = text.lstrip("\ufffd")
    encoded = text.encode()
    if len(encoded) > limit_bytes:  # a replaced byte takes three
        text = encoded[-limit_bytes:].decode("utf-8", errors="ignore")
    return text


def _read_end(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - size - 4))
            return stream.read()
    except FileNotFoundError:
        return b""


class _CappedFile:
    """Appends what comes after the bytes already there, up to the limit."""

    def __init__(self, path: Path, limit: int, tail_size: int) -> None:
        self._limit = limit
        self._tail_size = tail_size
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._stream: BinaryIO = path.open("ab", buffering=0)
        self._size = self._stream.tell()
        self._marker = _MARKER.format(limit=limit).encode()
        self._skip = self._size
        self.tail: bytes | None = None
        """The last bytes seen, kept only once the file is full (its own end is the marker then)."""

    def feed(self, chunk: bytes) -> None:
        full = self._size > self._limit  # with the marker it is longer than the limit
        if self._skip >= len(chunk) and not full:
            self._skip -= len(chunk)
            return
        if full:
            self.tail = ((self.tail or b"") + chunk)[-self._tail_size - 4 :]
            return
        fresh = chunk[self._skip :]
        self._skip = 0
        room = self._limit - self._size
        self._write(fresh[:room])
        if len(fresh) > room:
            self._write(self._marker)
            self.tail = fresh[-self._tail_size - 4 :]

    def close(self) -> None:
        self._stream.close()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = self._stream.write(view)
            self._size += written
            view = view[written:]
