"""Captures a container's log to a file, exactly once, and lets many follow it.

The engine records both streams in one order and replays the same bytes from the start, until its own copy is full; then it
throws the oldest away. So a capture that begins again (after a restart, or a broken stream) goes on from the last position
that the engine's records told, which is kept beside the file, and skips what the file holds beyond it; without a position it
skips as many bytes as the file holds. Where bytes may have been thrown away before they were read, a line says so. Past the
limit the file ends with a line that says so, and only the last bytes are kept in memory for the report.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import structlog

from nodeservice.core.model import AttemptId, Reason
from nodeservice.errors import NodeServiceError, TransientError
from nodeservice.ports import ContainerRuntime, LogMark

log = structlog.get_logger(__name__)

_MARKER = "\n[nodeservice: log cut here, at the limit of {limit} bytes]\n"
_GAP = b"\n[nodeservice: lines may be missing here: the engine's own log was full before they were read]\n"
_MAY_LACK = b"\n[nodeservice: lines may be missing before: the engine's own log was full before they were read]\n"
_COMPLETE_MEMORY = 4_096
_ATTRIBUTE = "user.nodeservice.log"


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
        self._states: dict[AttemptId, _State] = {}

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
        writer = _CappedFile(path, self._max_bytes, self._tail_bytes, self._states.get(id_))
        after = writer.state.position
        try:
            async for chunk in self._runtime.read_log(container_id, follow=follow, after=after, on_mark=writer.mark):
                writer.feed(chunk)
                self.wake(id_)
        finally:
            writer.close()
            self._states[id_] = writer.state
            if writer.tail is not None:
                self._tails[id_] = writer.tail
            self.wake(id_)

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

    def has_gap(self, id_: AttemptId) -> bool:
        """Whether bytes may be missing in what was captured, as a line in it says."""
        return id_ in self._states and self._states[id_].has_gap

    def forget(self, id_: AttemptId) -> None:
        self._tails.pop(id_, None)
        self._states.pop(id_, None)
        self._complete.pop(id_, None)
        self.wake(id_)

    # ---- followers ------------------------------------------------------------------------------------------------

    def changed(self, id_: AttemptId) -> asyncio.Event:
        """An event that is set at the next growth or end of this log. Take it before reading, so that none is missed."""
        return self._signals.setdefault(id_, asyncio.Event())

    def wake(self, id_: AttemptId) -> None:
        """Tell followers to look again, for instance since the attempt's phase changed."""
        signal = self._signals.pop(id_, None)
        if signal is not None:
            signal.set()


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


@dataclass(frozen=True, slots=True)
class _State:
    """The engine's log was read up to `position` when the file had `size_bytes`; before a first mark there is none."""

    size_bytes: int = 0
    position: str | None = None
    has_gap: bool = False

    def written(self) -> bytes:
        return f"{self.size_bytes}\n{self.position or ''}\n{'gap' * self.has_gap}".encode()

    @classmethod
    def read(cls, fd: int) -> _State:
        """As it was kept beside the file; a new one where there is none, and on file systems without attributes."""
        try:
            size, position, gap = os.getxattr(fd, _ATTRIBUTE).decode().split("\n")
            return cls(int(size), position or None, bool(gap))
        except (OSError, ValueError):
            return cls()


class _CappedFile:
    """Appends what comes after the bytes already there, up to the limit."""

    def __init__(self, path: Path, limit: int, tail_size: int, state: _State | None = None) -> None:
        self._limit = limit
        self._tail_size = tail_size
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._stream: BinaryIO = path.open("ab", buffering=0)
        self._size = self._stream.tell()
        self._marker = _MARKER.format(limit=limit).encode()
        self.state = state or _State.read(self._stream.fileno())
        if self.state.size_bytes > self._size:  # the host went down before the bytes were on its disk
            self.state = _State(has_gap=self.state.has_gap)
        self._skip = self._size - self.state.size_bytes
        self.tail: bytes | None = None
        """The last bytes seen, kept only once the file is full (its own end is the marker then)."""

    def feed(self, chunk: bytes) -> None:
        full = self._is_full
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

    def mark(self, mark: LogMark) -> None:
        """Tell what may be missing, unless it stood past the limit, and keep the position for a capture that goes on."""
        if self._is_full:
            return
        if mark.is_gap or (mark.may_lack and not self.state.has_gap):
            self._skip = 0
            self._write(_GAP if mark.is_gap else _MAY_LACK)
            self.state = replace(self.state, has_gap=True)
            if self._is_full:
                self._write(self._marker)
        if not self._skip:
            self.state = replace(self.state, size_bytes=self._size, position=mark.position)
            with contextlib.suppress(OSError):  # no attributes here: then only this process knows
                os.setxattr(self._stream.fileno(), _ATTRIBUTE, self.state.written())

    def close(self) -> None:
        self._stream.close()

    @property
    def _is_full(self) -> bool:
        return self._size > self._limit  # with the marker it is longer than the limit

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = self._stream.write(view)
            self._size += written
            view = view[written:]
