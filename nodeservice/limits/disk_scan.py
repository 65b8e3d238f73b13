"""Measures what directories hold, without following links or crossing mounts. Blocks: for use in a thread.

A file counts with its allocated blocks (stat(2): units of 512 bytes), so sparse files count what they take, and at least one
block of 4 KiB, so that a flood of tiny or empty files is bounded as well. One of several hard links counts once. What was
deleted while a process holds it open can't be seen here.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LEAST_BYTES = 4096
_UNIT_BYTES = 512


@dataclass(frozen=True, slots=True)
class Measured:
    bytes: int
    file_count: int
    is_whole: bool
    """False where the walk ended early, since the bound was passed."""


def measure(places: Iterable[Path], *, stop_above_bytes: int | None = None) -> Measured:
    """What is below the places, each of them itself included. What vanishes meanwhile, or can't be read, counts nothing."""
    total_bytes = count = 0
    linked: set[tuple[int, int]] = set()
    stack: list[tuple[bytes, int]] = []
    for place in places:
        try:
            status = os.lstat(place)
        except OSError:
            continue
        total_bytes += _size(status)
        count += 1
        if stat.S_ISDIR(status.st_mode):
            stack.append((os.fsencode(place), status.st_dev))
    while stack:
        directory, device = stack.pop()
        try:
            entries = os.scandir(directory)
        except OSError:
            continue
        with entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if status.st_dev != device:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    stack.append((entry.path, device))
                elif status.st_nlink > 1:
                    if (device, status.st_ino) in linked:
                        continue
                    linked.add((device, status.st_ino))
                total_bytes += _size(status)
                count += 1
                if stop_above_bytes is not None and total_bytes > stop_above_bytes:
                    return Measured(total_bytes, count, False)
    return Measured(total_bytes, count, True)


def _size(status: os.stat_result) -> int:
    return max(LEAST_BYTES, status.st_blocks * _UNIT_BYTES)
