"""Walks a tree that a hostile process may change meanwhile: at any depth, following no link and crossing no mount.

A directory is opened by its name below the descriptor of its parent, so neither the length of a path nor a link that was put
in a directory's place matters. Only the uppermost levels stay open. From further down the way back is `..`, which must lead
to where we came from; where a directory was moved meanwhile, the walk goes on from the lowest level that is still open.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_OPEN = 48


class Entry(NamedTuple):
    directory: int
    """A descriptor, valid until the next entry."""
    name: str
    status: os.stat_result


def walk(place: Path) -> Iterator[Entry]:
    """All that is below a directory, not itself; a directory comes before what is in it.

    What vanishes meanwhile, or can't be read, is left out. Raises no OSError. Close it, or let it end: it holds descriptors.
    """
    levels: list[_Level] = []
    try:
        levels.append(_Level(os.open(place, _OPEN)))
        while levels:
            level = levels[-1]
            if not level.is_listed:
                yield from level.entries()
            below = level.enter_next()
            if below is None:
                _leave(levels)
                continue
            if len(levels) >= _MOST_OPEN:
                level.close()
            levels.append(below)
            if below.device != level.device and below.descriptor is not None:
                yield Entry(below.descriptor, ".", os.fstat(below.descriptor))
    except OSError:
        return
    finally:
        for level in levels:
            level.close()


class _Level:
    """One directory on the way down. `descriptor` is None while it is not held open."""

    __slots__ = ("descriptor", "device", "directories", "is_listed", "number")

    def __init__(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self.descriptor: int | None = descriptor
        self.device, self.number = status.st_dev, status.st_ino
        self.is_listed = False
        self.directories: list[str] = []

    def entries(self) -> Iterator[Entry]:
        assert self.descriptor is not None
        self.is_listed = True
        try:
            with os.scandir(self.descriptor) as found:
                for entry in found:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    if status.st_dev != self.device:
                        if stat.S_ISDIR(status.st_mode):  # entered if it is a subvolume
                            self.directories.append(entry.name)
                        continue
                    if stat.S_ISDIR(status.st_mode):
                        self.directories.append(entry.name)
                    yield Entry(self.descriptor, entry.name, status)
        except OSError:
            return

    def enter_next(self) -> _Level | None:
        """The next directory below that can be opened; None once there is none."""
        while self.directories and self.descriptor is not None:
            try:
                below = _Level(os.open(self.directories.pop(), _OPEN, dir_fd=self.descriptor))
            except OSError:
                continue
            if below.device == self.device or _mount_of(below) == _mount_of(self):
                return below
            below.close()
        return None

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _mount_of(level: _Level) -> str:
    """A subvolume of btrfs, which any task may make, has a device number of its own, but no mount."""
    about = Path(f"/proc/self/fdinfo/{level.descriptor}").read_text()
    return next(line for line in about.splitlines() if line.startswith("mnt_id:"))


def _leave(levels: list[_Level]) -> None:
    """Up to the nearest level that is open or can be reached."""
    left = levels.pop()
    if levels and levels[-1].descriptor is None and left.descriptor is not None:
        levels[-1].descriptor = _above(left.descriptor, levels[-1])
    left.close()
    while levels and levels[-1].descriptor is None:
        levels.pop()


def _above(descriptor: int, wanted: _Level) -> int | None:
    try:
        above = os.open("..", _OPEN, dir_fd=descriptor)
    except OSError:
        return None
    status = os.fstat(above)
    if (status.st_dev, status.st_ino) == (wanted.device, wanted.number):
        return above
    os.close(above)
    return None
