"""Measures what a task wrote, piece by piece. Blocks: for use in a thread.

A file counts with its allocated blocks (stat(2): units of 512 bytes), so sparse files count what they take, and at least one
block of 4 KiB, so that a flood of tiny or empty files is bounded as well. Of several hard links each counts its part. What
was deleted counts for as long as a process of the task holds it open or mapped (proc_pid_fd(5), proc_pid_map_files(5)); a
descriptor that is under way in a socket can't be seen.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from nodeservice.limits.tree_walk import walk

LEAST_BYTES = 4096
_UNIT_BYTES = 512
_BETWEEN_CLOCKS = 32
"""Files that are counted between two looks at the clock."""
_DELETED = b" (deleted)\n"


@dataclass(frozen=True, slots=True)
class Measured:
    bytes: int
    file_count: int


class Scan:
    """One measurement. `places` count themselves too; what vanishes meanwhile, or can't be read, counts nothing."""

    def __init__(
        self,
        places: Iterable[Path],
        *,
        pids: Iterable[int] = (),
        stop_above_bytes: int | None = None,
        least_bytes: int = LEAST_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stop_above_bytes = stop_above_bytes
        self._least_bytes = least_bytes
        self._clock = clock
        self._files = _files(tuple(places), tuple(pids))
        self._bytes = self._count = 0

    @property
    def so_far(self) -> Measured:
        return Measured(self._bytes, self._count)

    def step(self, seconds: float | None = None) -> Measured | None:
        """Go on for about so long; None while there is more to do."""
        until = None if seconds is None else self._clock() + seconds
        for turn, status in enumerate(self._files, 1):
            if status is not None:
                self._bytes += self._size(status)
                self._count += 1
                if self._stop_above_bytes is not None and self._bytes > self._stop_above_bytes:
                    self.close()
                    return self.so_far
            if until is not None and turn % _BETWEEN_CLOCKS == 0 and self._clock() >= until:
                return None
        return self.so_far

    def close(self) -> None:
        """Give back what it holds open. One that came to its end holds nothing."""
        self._files.close()

    def _size(self, status: os.stat_result) -> int:
        size = max(self._least_bytes, status.st_blocks * _UNIT_BYTES)
        return size if stat.S_ISDIR(status.st_mode) else size // max(1, status.st_nlink)


def measure(places: Iterable[Path]) -> Measured:
    """In one piece."""
    found = Scan(places).step()
    assert found is not None
    return found


def _files(places: tuple[Path, ...], pids: tuple[int, ...]) -> Generator[os.stat_result | None, None, None]:
    """None now and then, where time passes without a file."""
    devices: set[int] = set()
    for place in places:
        try:
            status = os.lstat(place)
        except OSError:
            continue
        yield status
        devices.add(status.st_dev)
        if stat.S_ISDIR(status.st_mode):
            for entry in walk(place):
                devices.add(entry.status.st_dev)
                yield entry.status
    yield from _nameless(pids, devices)


def _nameless(pids: tuple[int, ...], devices: set[int]) -> Iterator[os.stat_result | None]:
    """Deleted files that processes hold, each once: on these devices, or on the root file system of the process."""
    seen: set[tuple[int, int]] = set()
    for pid in pids:
        process = f"/proc/{pid}"
        try:
            root = os.stat(f"{process}/root/").st_dev
        except OSError:
            yield None
            continue
        for path in chain(_descriptors(process), _deleted_mappings(process)):
            try:
                status = os.stat(path)
            except OSError:
                yield None
                continue
            key = (status.st_dev, status.st_ino)
            held = (
                stat.S_ISREG(status.st_mode) and status.st_nlink == 0 and (status.st_dev in devices or key[0] == root)
            )
            yield status if held and key not in seen else None
            if held:
                seen.add(key)


def _descriptors(process: str) -> Iterator[str]:
    try:
        with os.scandir(f"{process}/fd") as entries:
            for entry in entries:
                yield entry.path
    except OSError:
        return


def _deleted_mappings(process: str) -> Iterator[str]:
    try:
        with open(f"{process}/maps", "rb") as lines:
            for line in lines:
                if line.endswith(_DELETED):
                    first, _, last = line.split(b" ", 1)[0].partition(b"-")
                    yield f"{process}/map_files/{int(first, 16):x}-{int(last, 16):x}"
    except (OSError, ValueError):
        return
