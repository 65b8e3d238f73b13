"""The disks behind directories, by the numbers that the kernel's I/O limits are set with.

Source: Documentation/admin-guide/cgroup-v2.rst (io.max takes whole disks, "$MAJ:$MIN"), sysfs(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_BLOCK_DEVICES = Path("/sys/dev/block")


def disks_of(directories: Iterable[Path]) -> tuple[str, ...]:
    """`MAJOR:MINOR` of each whole disk, in order, each once. A file system without a disk (tmpfs) adds none."""
    found: dict[str, None] = {}
    for directory in directories:
        number = _device_number(directory)
        disk = _whole_disk(number) if number else None
        if disk:
            found[disk] = None
    return tuple(found)


def device_file(number: str) -> Path | None:
    """The file in /dev of the device with that `MAJOR:MINOR`; None where there is none."""
    try:
        text = (_BLOCK_DEVICES / number / "uevent").read_text(encoding="ascii")
    except OSError:
        return None
    name = next((line.partition("=")[2] for line in text.splitlines() if line.startswith("DEVNAME=")), "")
    path = Path("/dev", name)
    return path if name and path.exists() else None


def _device_number(directory: Path) -> str | None:
    while True:
        try:
            device = os.stat(directory).st_dev
            return f"{os.major(device)}:{os.minor(device)}"
        except FileNotFoundError:
            if directory == directory.parent:
                return None
            directory = directory.parent
        except OSError:
            return None


def _whole_disk(number: str) -> str | None:
    try:
        real = (_BLOCK_DEVICES / number).resolve(strict=True)
        if (real / "partition").exists():
            real = real.parent
        return (real / "dev").read_text(encoding="ascii").strip()
    except OSError:
        return None
