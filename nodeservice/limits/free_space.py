"""How much room is left where tasks write: implements the port FreeSpace."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nodeservice.ports import Room
from nodeservice.threads import Threads

_LEAST_FILES = 1000
"""Below so many inodes soon no task could be given its directories, however many bytes are free."""


class DirectoriesFreeSpace:
    """FreeSpace of some directories. A directory that cannot be looked at does not count."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = tuple(directories)
        self._thread = Threads(1, name="nodeservice-free-space")

    async def least(self) -> tuple[int, Path] | None:
        return await self._thread.run(self._least)

    async def of(self, place: Path) -> Room | None:
        return await self._thread.run(lambda: _room(place))

    async def close(self) -> None:
        self._thread.close()

    def _least(self) -> tuple[int, Path] | None:
        found = []
        for directory in self._directories:
            room = _room(directory)
            if room is not None:
                found.append((room.free_bytes, directory))
        return min(found, default=None)


def free_bytes(status: os.statvfs_result) -> int:
    """What an unprivileged writer may still use; nothing where hardly a file can be made. 0 files are untold ones."""
    return 0 if status.f_files and status.f_favail < _LEAST_FILES else status.f_bavail * status.f_frsize


def _room(place: Path) -> Room | None:
    try:
        status = os.statvfs(place)
    except OSError:
        return None
    used_bytes = (status.f_blocks - status.f_bfree) * status.f_frsize
    return Room(used_bytes=used_bytes, free_bytes=free_bytes(status))
