"""The file system under a path: how large, how much of it can still be written, of which kind, on which device.

Free is what an unprivileged writer may still use (f_bavail of statvfs(3)): the file system's own reserve belongs to nobody's
task.
"""

from __future__ import annotations

import os
from pathlib import Path

from nodeservice.limits.free_space import free_bytes
from nodeservice.limits.hierarchy import mount_of, read_mounts
from nodeservice.ports import DiskFacts


def read_disk(path: Path, *, root: Path = Path("/")) -> DiskFacts:
    """Facts of the path, or of its nearest existing parent while it does not exist yet. Raises OSError if unreadable.

    `root` says only where mountinfo is read from; the path is one of this host.
    """
    mount = mount_of(nearest_existing(path), read_mounts(root))
    total, free = read_space(path)
    return DiskFacts(
        path=path,
        filesystem=mount.filesystem if mount else "unknown",
        device=mount.device if mount else "unknown",
        total_bytes=total,
        free_bytes=free,
    )


def read_space(path: Path) -> tuple[int, int]:
    """Total and free bytes alone, which is cheaper."""
    space = os.statvfs(nearest_existing(path))
    return space.f_blocks * space.f_frsize, free_bytes(space)


def nearest_existing(path: Path) -> Path:
    """The path with links resolved, cut back to what exists."""
    candidate = path.resolve()
    while not candidate.exists():
        candidate = candidate.parent
    return candidate
