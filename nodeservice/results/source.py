"""Read a collected file once, from first to last byte, and prove that it still is what the manifest says."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

from nodeservice.errors import NodeFaultError, TransientError
from nodeservice.ports import ResultFile

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def shortage(path: Path, error: OSError) -> TransientError | None:
    """Where it is this process that lacks something, which says nothing about the file."""
    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return None
    return TransientError(f"{path} cannot be read now: {error.strerror}", reason="NODE_SHORT_OF_MEANS")


class PutStopped(Exception):  # noqa: N818 (not an error: the caller gave up, and nobody waits for this)
    """Reading was given up because its `put` was cancelled or failed elsewhere."""


class VerifiedReader:
    """A file-like object over one result file, opened at its first read and closed at its end.

    The last piece is only handed out when size and sha256 agree, so a store that commits after the last piece never
    commits wrong bytes. Raises NodeFaultError (RESULT_CHANGED). `len` is what is still to be read, which is how
    requests-toolbelt asks for it.
    """

    def __init__(self, file: ResultFile, *, stop: threading.Event | None = None) -> None:
        self._file = file
        self._stop = stop
        self._digest = hashlib.sha256()
        self._fd: int | None = None
        self._is_closed = False
        # `close` can come from the event loop while a thread reads: a descriptor must not be closed under a read.
        self._lock = threading.Lock()
        self.len = file.entry.size_bytes

    def read(self, size: int = -1) -> bytes:
        """Exactly `size` bytes, fewer at the end only."""
        with self._lock:
            return self._read(size)

    def close(self) -> None:
        """Repeating is harmless. A reader that was closed before its end reads no more (PutStopped)."""
        with self._lock:
            self._close()

    def __enter__(self) -> VerifiedReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _read(self, size: int) -> bytes:
        if self.len and (self._is_closed or (self._stop is not None and self._stop.is_set())):
            self._close()
            raise PutStopped
        wanted = self.len if size < 0 else min(size, self.len)
        if wanted == 0:
            return b""
        try:
            data = self._read_exactly(wanted)
        except OSError as error:
            self._close()
            raise shortage(self._file.source, error) or self._changed(os.strerror(error.errno or 0)) from error
        self._digest.update(data)
        self.len -= len(data)
        if len(data) < wanted:
            self._close()
            raise self._changed("it is shorter")
        if self.len == 0:
            self._close()
            if self._digest.hexdigest() != self._file.entry.sha256:
                raise self._changed("its sha256 differs")
        return data

    def _close(self) -> None:
        self._is_closed = True
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _read_exactly(self, wanted: int) -> bytes:
        if self._fd is None:
            self._fd = os.open(self._file.source, _FLAGS)
        first = os.read(self._fd, wanted)
        if len(first) == wanted:
            return first
        pieces = [first]
        missing = wanted - len(first)
        while missing and (piece := os.read(self._fd, missing)):
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def _changed(self, how: str) -> NodeFaultError:
        return NodeFaultError(
            f"{self._file.source} is not what was collected: {how}",
            reason="RESULT_CHANGED",
            hint="something changed the state directory, or its disk fails",
        )
