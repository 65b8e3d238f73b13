"""Project quotas of XFS and ext4: one number on a set of directories, and the kernel bounds what they hold together.

Sources: quotactl(2), ioctl_xfs_fsgetxattr(2), Documentation/filesystems/quota.rst, linux/fs.h and linux/quota.h. ext4 lets a
writer with CAP_SYS_RESOURCE pass its limits, XFS nobody; an overlay writes its upper layer as whoever mounted it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nodeservice.limits.disk_scan import LEAST_BYTES, Measured
from nodeservice.limits.hierarchy import mount_of, read_mounts
from nodeservice.limits.tree_walk import walk

_FILE_SYSTEMS = ("xfs", "ext4")
_PROJECT = 2
_GET_QUOTA, _SET_QUOTA, _GET_STATE = 0x800007, 0x800008, 0x5805
_BLOCK_LIMITS, _INODE_LIMITS = 1, 4
_ENFORCED = 1 << 5
_QUOTA = struct.Struct("=8QI4x")
_STATE = struct.Struct("=bxH76x")
_GET_ATTRIBUTES, _SET_ATTRIBUTES = 0x801C581F, 0x401C5820
_ATTRIBUTES = struct.Struct("=5I8x")
_INHERIT = 0x200
_BLOCK_BYTES = 1024
_FIRST_PROJECT = 0x4E53_0000
"""Ours are the 65,536 from here; engines number theirs from 1 up."""
_LEAST_INODES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaSupport:
    """What one file system offers. `why_not` is what is missing, with the remedy; empty where quotas are on."""

    filesystem: str
    mount_point: str
    device: str
    number: int
    why_not: str = ""


def quota_support(directory: Path) -> QuotaSupport:
    """Asks the kernel, since a mount option may stand there without effect. Changes nothing. Never raises."""
    existing = next((place for place in (directory, *directory.parents) if place.exists()), Path("/"))
    number = os.stat(existing).st_dev
    mount = mount_of(existing.resolve(), read_mounts())
    if mount is None:
        return QuotaSupport(filesystem="", mount_point="", device="", number=number, why_not="its mount can't be found")
    why_not = ""
    if mount.filesystem not in _FILE_SYSTEMS:
        why_not = (
            f"{directory} lies on {mount.filesystem} at {mount.point}, which has no project quotas here: "
            "put state_dir on XFS, mounted with pquota, or on ext4 with the feature project, mounted with prjquota"
        )
    elif not _is_enforced(mount.device):
        remedy = (
            "mount it with pquota (for the root file system, the kernel's rootflags=pquota)"
            if mount.filesystem == "xfs"
            else "tune2fs -O project,quota on its device while it is not mounted, then mount it with prjquota"
        )
        why_not = f"the {mount.filesystem} at {mount.point} enforces no project quotas: {remedy}"
    return QuotaSupport(
        filesystem=mount.filesystem, mount_point=mount.point, device=mount.device, number=number, why_not=why_not
    )


class ProjectQuotas:
    """Gives each attempt a project of its own. For use from one thread; raises OSError."""

    def __init__(self, support: QuotaSupport, *, engine_root: Path | None, engine_passes_ext4: bool) -> None:
        self._support = support
        self._layers_count = support.filesystem == "xfs" or not engine_passes_ext4
        self._engine_root = engine_root

    @property
    def is_for_layers(self) -> bool:
        """Whether containers' layers are on this file system too, and held by it."""
        return self._engine_root is not None and self.holds_layers([self._engine_root])

    def holds_layers(self, layer: Sequence[Path]) -> bool:
        with suppress(OSError):
            return self._layers_count and all(os.stat(place).st_dev == self._support.number for place in layer)
        return False

    def bind(self, work: Path, limit_bytes: int) -> int:
        """Bound it with all that is in it; the project's number. Repeating takes the same number.

        An empty file beside it bears the number too, and is the one that is believed: no container reaches that, while the
        owner of what a container does reach may give it the number of another.
        """
        number = self.project_of(work)
        if number is None:
            number = self._unused()
            _witness(work).touch(mode=0o600)
            _mark(str(_witness(work)), number)
        blocks = -(-limit_bytes // _BLOCK_BYTES)
        inodes = max(_LEAST_INODES, limit_bytes // LEAST_BYTES)
        self._set(number, blocks, inodes)
        self.join([work], number)
        return number

    def project_of(self, work: Path) -> int | None:
        """The number that it was bound with, if that is one of ours; None too where it was not bound."""
        with suppress(FileNotFoundError):
            number = _project_of(_witness(work))
            if _FIRST_PROJECT <= number < _FIRST_PROJECT + 0x10000:
                return number
        return None

    def join(self, places: Sequence[Path], number: int) -> list[Path]:
        """With all that is there already. A task may change it meanwhile: nothing is reached through a link.

        Gives those that are there.
        """
        found = []
        for place in places:
            with suppress(FileNotFoundError):
                _mark(str(place), number)
                found.append(place)
            for entry in walk(place):
                if stat.S_ISREG(entry.status.st_mode) or stat.S_ISDIR(entry.status.st_mode):
                    with suppress(OSError):
                        _mark(entry.name, number, directory=entry.directory)
        return found

    def limit_of(self, number: int) -> int | None:
        """Bytes, as the kernel holds it; None for no limit."""
        blocks = self._get(number)[0]
        return blocks * _BLOCK_BYTES or None

    def use_of(self, number: int) -> Measured | None:
        with suppress(OSError):
            _, _, used_bytes, _, _, inodes, *_ = self._get(number)
            return Measured(used_bytes, inodes)
        return None

    def lift(self, number: int) -> None:
        self._set(number, 0, 0)

    def _unused(self) -> int:
        for _ in range(1000):
            number = _FIRST_PROJECT + random.randrange(0x10000)  # noqa: S311
            try:
                blocks, _, used_bytes, _, _, inodes, *_ = self._get(number)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESRCH):
                    raise
                return number
            if not (blocks or used_bytes or inodes):
                return number
        raise OSError(errno.ENOSPC, "no project number is free", self._support.mount_point)

    def _get(self, number: int) -> tuple[int, ...]:
        answer = bytearray(_QUOTA.size)
        _quotactl(_GET_QUOTA, self._support.device, number, answer)
        return _QUOTA.unpack(answer)

    def _set(self, number: int, blocks: int, inodes: int) -> None:
        limits = _QUOTA.pack(blocks, 0, 0, inodes, 0, 0, 0, 0, _BLOCK_LIMITS | _INODE_LIMITS)
        _quotactl(_SET_QUOTA, self._support.device, number, bytearray(limits))


def _is_enforced(device: str) -> bool:
    answer = bytearray(_STATE.size)
    try:
        _quotactl(_GET_STATE, device, 0, answer)
    except OSError:
        return False
    return bool(_STATE.unpack(answer)[1] & _ENFORCED)


def _quotactl(command: int, device: str, number: int, buffer: bytearray) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    address = (ctypes.c_char * len(buffer)).from_buffer(buffer)
    if libc.quotactl(ctypes.c_int((command << 8) | _PROJECT), device.encode(), ctypes.c_int(number), address) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), device)


def _witness(work: Path) -> Path:
    return work.with_name("project")


def _project_of(place: Path) -> int:
    descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return int(_ATTRIBUTES.unpack(fcntl.ioctl(descriptor, _GET_ATTRIBUTES, bytes(_ATTRIBUTES.size)))[3])
    finally:
        os.close(descriptor)


def _mark(name: str, number: int, *, directory: int | None = None) -> None:
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        held = fcntl.ioctl(descriptor, _GET_ATTRIBUTES, bytes(_ATTRIBUTES.size))
        flags, extent, extents, _, cow = _ATTRIBUTES.unpack(held)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            flags |= _INHERIT
        fcntl.ioctl(descriptor, _SET_ATTRIBUTES, _ATTRIBUTES.pack(flags, extent, extents, number, cow))
    finally:
        os.close(descriptor)
