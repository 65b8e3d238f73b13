"""What is believed of the numbers that directories bear; the kernel's part of it is tried in tests/vm."""

from __future__ import annotations

import errno
import os
import struct
from collections import Counter
from pathlib import Path

import pytest

from nodeservice.limits import project_quota
from nodeservice.limits.disk_scan import LEAST_BYTES
from nodeservice.limits.hierarchy import Mount
from nodeservice.limits.project_quota import ProjectQuotas, QuotaSupport, quota_support

MIB = 1024**2
NOBODY = 0


class FakeKernel:
    """Project numbers of files, and the limits of projects."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.marks: dict[int, bytes] = {}
        self.limits: dict[int, tuple[int, int]] = {}
        monkeypatch.setattr(project_quota.fcntl, "ioctl", self._ioctl)
        monkeypatch.setattr(project_quota, "_quotactl", self._quotactl)

    def project_of(self, place: Path) -> int:
        return self._number(place.stat().st_ino)

    def move(self, place: Path, number: int) -> None:
        """As the owner of the place can."""
        self.marks[place.stat().st_ino] = struct.pack("=5I8x", 0, 0, 0, number, 0)

    def _number(self, inode: int) -> int:
        return int(struct.unpack("=5I8x", self.marks.get(inode, bytes(28)))[3])

    def _ioctl(self, descriptor: int, request: int, argument: bytes) -> bytes:
        inode = os.fstat(descriptor).st_ino
        if request == 0x401C5820:
            self.marks[inode] = argument
        return self.marks.get(inode, bytes(28))

    def _quotactl(self, command: int, _device: str, number: int, buffer: bytearray) -> None:
        held = Counter(self._number(inode) for inode in self.marks)[number]
        if command == 0x800008:
            blocks, *_ = struct.unpack_from("=8Q", buffer)
            self.limits[number] = (blocks, struct.unpack_from("=8Q", buffer)[3])
        elif not held and number not in self.limits:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        else:
            blocks, inodes = self.limits.get(number, (0, 0))
            struct.pack_into("=8QI4x", buffer, 0, blocks, 0, 0, inodes, 0, held, 0, 0, 0)


def quotas() -> ProjectQuotas:
    support = QuotaSupport(filesystem="xfs", mount_point="/", device="/dev/none", number=0)
    return ProjectQuotas(support, engine_root=None, engine_passes_ext4=False)


def work_of(tmp_path: Path, name: str) -> Path:
    work = tmp_path / name / "results"
    work.mkdir(parents=True)
    (work / "file").touch()
    return work


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    return FakeKernel(monkeypatch)


def test_a_number_that_a_task_gave_itself_is_not_believed_by_a_node_that_starts_again(
    kernel: FakeKernel, tmp_path: Path
) -> None:
    mine, others = work_of(tmp_path, "mine"), work_of(tmp_path, "others")
    number, other = quotas().bind(mine, 8 * MIB), quotas().bind(others, 64 * MIB)
    assert number != other
    for taken in (other, NOBODY):
        for place in (mine, mine / "file"):
            kernel.move(place, taken)
        again = quotas()
        assert again.project_of(mine) == number
        assert again.bind(mine, 8 * MIB) == number
        assert [kernel.project_of(place) for place in (mine, mine / "file", others)] == [number, number, other]
        assert (again.limit_of(number), again.limit_of(other)) == (8 * MIB, 64 * MIB)


@pytest.mark.parametrize(("state", "holds"), [(0, False), (1 << 4, False), (1 << 4 | 1 << 5, True)])
def test_quotas_that_the_kernel_only_counts_are_no_limits(
    monkeypatch: pytest.MonkeyPatch, state: int, holds: bool
) -> None:
    def answer(_command: int, _device: str, _number: int, buffer: bytearray) -> None:
        struct.pack_into("=bxH", buffer, 0, 1, state)

    monkeypatch.setattr(project_quota, "_quotactl", answer)
    mount = Mount(root="/", point="/", filesystem="xfs", device="/dev/none", super_options=frozenset())
    monkeypatch.setattr(project_quota, "read_mounts", lambda: (mount,))
    assert (quota_support(Path("/")).why_not == "") is holds


def test_what_is_made_later_bears_the_number_too_and_empty_files_are_bounded(
    kernel: FakeKernel, tmp_path: Path
) -> None:
    work = work_of(tmp_path, "t")
    number = quotas().bind(work, 64 * MIB)
    assert struct.unpack("=5I8x", kernel.marks[work.stat().st_ino])[0] == 0x200, "FS_XFLAG_PROJINHERIT"
    assert struct.unpack("=5I8x", kernel.marks[(work / "file").stat().st_ino])[0] == 0, "which only directories have"
    assert kernel.limits[number] == (64 * 1024, 64 * MIB // LEAST_BYTES)
    assert kernel.limits[quotas().bind(work_of(tmp_path, "small"), 1)] == (1, 1024)


def test_a_number_is_nobody_elses_before_what_bore_it_is_gone(
    kernel: FakeKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lifting comes first, and a removal that fails leaves what bears the number, perhaps empty files alone."""
    drawn = iter((7, 7, 8))
    monkeypatch.setattr(project_quota.random, "randrange", lambda _end: next(drawn))
    first, second = work_of(tmp_path, "first"), work_of(tmp_path, "second")
    number = quotas().bind(first, MIB)
    quotas().lift(number)
    assert quotas().limit_of(number) is None
    assert quotas().bind(second, MIB) == number + 1
