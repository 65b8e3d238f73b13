"""Reads the log that Podman's conmon writes (driver k8s-file) from the file itself: exact bytes, one thread per reading.

Podman's API is no way to follow such a log: its follower leaves lines out when it is behind, and ends early at the exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path

from nodeservice.errors import NodeServiceError, TransientError
from nodeservice.ports import LogMark
from nodeservice.runtime.hand_over import HandOver
from nodeservice.runtime.log_track import LogTrack, Records
from nodeservice.threads import Threads

_READ_BYTES = 256 * 1024
_LOOK_SECONDS = 0.1


async def read_log_file(
    path: Path,
    threads: Threads,
    *,
    until_end: Callable[[], Awaitable[object]] | None,
    after: str | None = None,
    on_mark: Callable[[LogMark], None] | None = None,
) -> AsyncGenerator[bytes, None]:
    """See `ports.ContainerRuntime.read_log`. With `until_end`, which returns once the container has ended, follow to then.

    A file that is not there is empty. One that conmon replaces, since it has reached its bound, is read to its end before
    the new one, so a follower that keeps up misses nothing. One that is two files behind does, unseen; a reading `after` a
    place that is not there any more tells it.
    """
    buffer = HandOver(asyncio.get_running_loop())
    reading = _Reading(path, buffer, LogTrack(after), follow=until_end is not None)
    waiter = None if until_end is None else asyncio.create_task(_tell_end(until_end, reading), name="log end")
    threads.submit(reading.run)
    try:
        while data := await buffer.take():
            if isinstance(data, bytes):
                yield data
            elif on_mark is not None:
                on_mark(data)
    finally:
        buffer.close()
        reading.finish()
        if waiter is not None:
            waiter.cancel()
            await asyncio.wait({waiter})


async def _tell_end(until_end: Callable[[], Awaitable[object]], reading: _Reading) -> None:
    try:
        await until_end()
    except NodeServiceError as error:
        reading.error = error
    finally:
        reading.finish()


class _Reading:
    """What the thread does. `finish` lets it end at the end of what is written then; with `error` set, it ends in that."""

    def __init__(self, path: Path, buffer: HandOver, track: LogTrack, *, follow: bool) -> None:
        self._path = path
        self._buffer = buffer
        self._track = track
        self._finishing = threading.Event()
        if not follow:
            self._finishing.set()
        self._rest = b""
        self.error: NodeServiceError | None = None

    def finish(self) -> None:
        self._finishing.set()

    def run(self) -> None:
        try:
            with contextlib.ExitStack() as files:
                all(self._buffer.put(piece) for piece in self._track.read(self._read(files), follows=False))
            self._buffer.end(self.error)
        except Exception as error:
            broken = TransientError(f"the log {self._path} cannot be read: {error}", reason="LOG_STREAM_BROKEN")
            broken.__cause__ = error
            self._buffer.end(broken)

    def _read(self, files: contextlib.ExitStack) -> Iterator[Records]:
        current: io.FileIO | None = None
        while True:
            # Both asked before the reading: what was written until then is read yet.
            is_last = self._finishing.is_set()
            newer = self._open_if_other(current, files)
            if current is not None:
                yield from self._read_to_end(current)
            if newer is not None:
                if current is not None:
                    current.close()
                current, self._rest = newer, b""
            elif is_last:
                return
            else:
                self._finishing.wait(_LOOK_SECONDS)

    def _open_if_other(self, current: io.FileIO | None, files: contextlib.ExitStack) -> io.FileIO | None:
        """The file at the path, unless it is the one that is open or there is none."""
        try:
            if current is not None and os.path.samestat(self._path.stat(), os.fstat(current.fileno())):
                return None
            return files.enter_context(io.FileIO(self._path))
        except FileNotFoundError:
            return None

    def _read_to_end(self, file: io.FileIO) -> Iterator[Records]:
        while data := file.read(_READ_BYTES):
            records, self._rest = take_records(self._rest + data)
            yield records


def take_records(data: bytes) -> tuple[Records, bytes]:
    """What the container wrote in the whole records of `data`, and the beginning of the next one.

    A record is `TIME STREAM F TEXT` and a line end, which is the container's own, or the same with P for a part of a line:
    then the line end is only the record's.
    """
    whole, newline, rest = data.rpartition(b"\n")
    records = Records(texts=[], stamps=[], streams=[], engine_bytes=len(whole) + len(newline))
    for record in whole.split(b"\n") if newline else ():
        stamp, stream, kind, text = (*record.split(b" ", 3), b"", b"", b"")[:4]
        records.texts.append(text + b"\n" if kind == b"F" else text)
        records.stamps.append(stamp)
        records.streams.append(1 if stream == b"stdout" else 2)
    return records, rest
