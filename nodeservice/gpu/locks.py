"""Keeps two workers of one host from giving out the same GPU: an advisory lock (flock) on a file for each GPU in use."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

import structlog

from nodeservice.core.model import AttemptId

log = structlog.get_logger(__name__)


class GpuLocks:
    """A GPU belongs to one worker with all its MIG instances and parts: `uuid` is always that of the whole GPU.

    Within a worker its attempts share the lock; the last one gives it back. The kernel drops it with the process. The files
    stay, since removing one would let two workers lock two files of one name. Nothing here waits, or fails: where there can
    be no lock there is none, and `trouble` says why.
    """

    def __init__(self, directory: Path, *, worker_id: str) -> None:
        self._directory = directory
        self._worker_id = worker_id
        self._held: dict[str, tuple[int, set[AttemptId]]] = {}
        self.trouble = ""

    def take(self, id_: AttemptId, uuids: Iterable[str]) -> str:
        """Hold them for the attempt, up to the first that is another's: whose, in words; empty where none is.

        Repeating is harmless.
        """
        for uuid in sorted(uuids):  # in the same order everywhere: of two that want the same ones, one gets on
            if why := self._take(id_, uuid):
                return why
        return ""

    def release(self, id_: AttemptId) -> None:
        """Give back what no other attempt holds too. One that holds none is success."""
        for uuid, (descriptor, holders) in list(self._held.items()):
            holders.discard(id_)
            if not holders:
                del self._held[uuid]
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)
                os.close(descriptor)

    def close(self) -> None:
        for id_ in {id_ for _, holders in self._held.values() for id_ in holders}:
            self.release(id_)

    def in_use(self, uuid: str, *, apart_from: str = "") -> str:
        """Which other process holds it, in words; empty where none does, or the worker named."""
        if uuid in self._held:
            return ""
        with contextlib.suppress(OSError), open(self._path(uuid), "rb", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                words, worker_id = _told(file.fileno())
                return words if not apart_from or worker_id != apart_from else ""
        return ""

    def _take(self, id_: AttemptId, uuid: str) -> str:
        if uuid not in self._held:
            try:
                self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
                descriptor = os.open(self._path(uuid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except OSError as error:
                return self._without(error)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, 0)
            except OSError as error:
                told, _ = _told(descriptor)
                os.close(descriptor)
                return told if isinstance(error, BlockingIOError) else self._without(error)
            with contextlib.suppress(OSError):  # without it only the words are missing
                os.pwrite(descriptor, f"{os.getpid()} {self._worker_id}\n".encode(), 0)
            self._held[uuid] = (descriptor, set())
            self.trouble = ""
        self._held[uuid][1].add(id_)
        return ""

    def _without(self, error: OSError) -> str:
        words = f"other workers on this host don't see which GPUs are in use here: {self._directory}: {error.strerror}"
        if words != self.trouble:
            log.warning("gpu.not_locked", words=words)
        self.trouble = words
        return ""

    def _path(self, uuid: str) -> Path:
        return self._directory / f"{uuid}.lock"


def _told(descriptor: int) -> tuple[str, str]:
    """What the holder wrote of itself, in words, and its worker id. It may not have written it yet."""
    text = ""
    with contextlib.suppress(OSError):
        text = os.pread(descriptor, 256, 0).decode("ascii", "replace")
    pid, _, worker_id = text.strip().partition(" ")
    if not pid.isdigit():
        return "in use by another process on this host", ""
    return f"in use by worker {worker_id} (pid {pid}) on this host", worker_id
