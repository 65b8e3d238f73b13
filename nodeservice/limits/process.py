"""Reads the limits that a container's first process really has, through /proc (proc(5)).

What a task controls is not trusted to be what it looks like: below its root nothing is followed through a link.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from nodeservice.limits.device_nodes import to_word
from nodeservice.limits.device_rules import DEVICE_RULES, read_device_rules
from nodeservice.ports import Reading

ENDED = "it had ended before it could be read"
_STATUS = {
    "CapEff": "capabilities",
    "CapBnd": "capabilities",
    "Seccomp": "seccomp",
    "NoNewPrivs": "no_new_privileges",
}
_RESOURCE_LIMITS = {"Max open files": "open_files_limit", "Max core file size": "core_file_bytes"}
_LIMIT_NAME_WIDTH = 25
"""/proc/PID/limits is a table of fixed columns (fs/proc/base.c, proc_pid_limits)."""
_SUFFIXES = {"k": 1024, "m": 1024**2, "g": 1024**3, "%": 0}
_UNREAD_DIRECTORIES = ("pts", "shm", "mqueue")
"""Terminals, and what the task itself keeps there."""
_MAX_ENTRY_COUNT = 1024
_LIMITS = ("capabilities", "seccomp", "no_new_privileges", "oom_score_adj", "open_files_limit", "core_file_bytes")


class ProcReader:
    """Implements `ports.ProcessReader`. Takes well below a millisecond, so it needs no thread."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def readings(self, pid: int) -> Sequence[Reading]:
        return read_process(pid, self._root)

    def network(self, pid: int) -> tuple[int, int] | None:
        return read_network(pid, self._root)


def read_process(pid: int, root: Path = Path("/")) -> list[Reading]:
    """The limits of the first process of a container. Never raises.

    A number that some other process bears by now is told like one that ended: the first process of a container has the
    number 1 in its own namespace.
    """
    directory = root / "proc" / str(pid)
    readings = _from_status(directory)
    if readings is None:
        return [_unread(limit, directory) for limit in (*_LIMITS, "shm_bytes", "devices", DEVICE_RULES)]
    readings += _guarded(directory, "oom_score_adj", ("oom_score_adj",), _score)
    readings += _guarded(directory, "limits", tuple(_RESOURCE_LIMITS.values()), _resource_limits)
    readings += _guarded(directory, "mountinfo", ("shm_bytes",), lambda path: [_shm(path)])
    readings += _guarded(directory, "root/dev", ("devices",), _devices)
    readings += _guarded(directory, "cgroup", (DEVICE_RULES,), lambda _: [read_device_rules(pid, root)])
    return readings


def read_network(pid: int, root: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes received and sent by all interfaces but the loopback; None where it is no container's first process now."""
    directory = root / "proc" / str(pid)
    try:
        if not _is_first(_fields(directory / "status")):
            return None
        lines = (directory / "net" / "dev").read_text(encoding="ascii").splitlines()[2:]
        rows = [(name.strip(), counts.split()) for name, _, counts in (line.partition(":") for line in lines)]
        counted = [counts for name, counts in rows if name != "lo"]
        return sum(int(counts[0]) for counts in counted), sum(int(counts[8]) for counts in counted)
    except (OSError, ValueError, IndexError):
        return None


def holds_file(pid: int, path: str, root: Path = Path("/")) -> bool:
    """Whether the container of that process has a plain file there, not a link. Raises OSError where it is gone."""
    *parents, name = path.strip("/").split("/")
    try:
        with _opened(root / "proc" / str(pid) / "root", *parents) as descriptor:
            return stat.S_ISREG(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        if not (root / "proc" / str(pid) / "root").exists():
            raise
        return False


def _from_status(directory: Path) -> list[Reading] | None:
    """None for a process that ended, or that is another one by now."""
    path = directory / "status"
    try:
        fields = _fields(path)
    except (OSError, ValueError):
        return None
    if not _is_first(fields):
        return None
    readings: list[Reading] = []
    for field, limit in _STATUS.items():
        source = f"{path} {field}"
        value = fields.get(field)
        if value is None or not (value.isdecimal() or limit == "capabilities"):
            readings.append(
                Reading(limit=limit, value=None, source=source, readable=False, note="this kernel does not tell")
            )
        else:
            readings.append(Reading(limit=limit, value=value if limit == "capabilities" else int(value), source=source))
    return readings


def _fields(path: Path) -> dict[str, str]:
    # The name of the process is its own choice, and may hold any byte.
    lines = path.read_bytes().decode("ascii", errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _is_first(fields: dict[str, str]) -> bool:
    """Whether it lives, and is number 1 of a namespace of its own. Kernels before 4.1 don't tell the number."""
    state = fields.get("State", "")
    numbers = fields.get("NSpid", "").split()
    return not state.startswith(("Z", "X")) and (not numbers or (len(numbers) > 1 and numbers[-1] == "1"))


def _guarded(
    directory: Path, name: str, limits: tuple[str, ...], read: Callable[[Path], list[Reading]]
) -> list[Reading]:
    path = directory / name
    try:
        return read(path)
    except (OSError, ValueError) as error:
        # One that has just ended still shows in /proc for a while, without root and mounts.
        ended = not isinstance(error, PermissionError) and not (directory / "root").exists()
        note = ENDED if ended else str(error)
        return [Reading(limit=limit, value=None, source=str(path), readable=False, note=note) for limit in limits]


def _unread(limit: str, path: Path) -> Reading:
    return Reading(limit=limit, value=None, source=str(path), readable=False, note=ENDED)


def _score(path: Path) -> list[Reading]:
    return [Reading(limit="oom_score_adj", value=int(path.read_text(encoding="ascii")), source=str(path))]


def _resource_limits(path: Path) -> list[Reading]:
    """The hard limits: the soft ones are the process's own to choose."""
    readings: list[Reading] = []
    for line in path.read_text(encoding="ascii").splitlines():
        name = line[:_LIMIT_NAME_WIDTH].strip()
        if name in _RESOURCE_LIMITS:
            hard = line[_LIMIT_NAME_WIDTH:].split()[1]
            value = None if hard == "unlimited" else int(hard)
            readings.append(Reading(limit=_RESOURCE_LIMITS[name], value=value, source=f"{path} {name}"))
    if len(readings) != len(_RESOURCE_LIMITS):
        raise ValueError("not the table that proc(5) shows")
    return readings


def _shm(path: Path) -> Reading:
    """The size of the memory file system at /dev/shm; the kernel leaves the option out where it is its own default."""
    for line in reversed(path.read_bytes().decode("utf-8", errors="replace").splitlines()):
        mounted, _, behind = line.partition(" - ")
        if mounted.split(" ")[4:5] != ["/dev/shm"]:  # noqa: S108 a mount point, no file of ours
            continue
        options = behind.split()[2].split(",")
        sizes = [option.removeprefix("size=") for option in options if option.startswith("size=")]
        size = _bytes(sizes[-1]) if sizes else None
        if size is not None:
            return Reading(limit="shm_bytes", value=size, source=f"{path} /dev/shm")
        with _opened(path.parent / "root", "dev", "shm") as descriptor:
            told = os.fstatvfs(descriptor)
        size = told.f_blocks * told.f_frsize
        return Reading(limit="shm_bytes", value=size or None, source=f"{path.parent}/root/dev/shm statvfs")
    if not (path.parent / "root").exists():
        return _unread("shm_bytes", path)
    # No such mount: nothing to put there but the container's layer, which the bound on the disk covers.
    return Reading(limit="shm_bytes", value=0, source=f"{path} /dev/shm")


def _bytes(text: str) -> int | None:
    scale = _SUFFIXES.get(text[-1:].lower(), 1)
    digits = text.rstrip("kKmMgG")
    return int(digits) * scale if scale and digits.isdecimal() else None


def _devices(path: Path) -> list[Reading]:
    """The device nodes in the container's /dev, two levels deep, each by name and numbers."""
    with _opened(path.parent, "dev") as descriptor:
        words = sorted(_device_words(descriptor))
    return [Reading(limit="devices", value=" ".join(words), source=str(path))]


def _device_words(descriptor: int, prefix: str = "") -> Iterator[str]:
    with os.scandir(descriptor) as entries:
        found = list(islice(entries, _MAX_ENTRY_COUNT + 1))
    if len(found) > _MAX_ENTRY_COUNT:
        raise ValueError(f"more than {_MAX_ENTRY_COUNT} entries")
    for entry in found:
        status = entry.stat(follow_symlinks=False)
        mode, number = status.st_mode, (os.major(status.st_rdev), os.minor(status.st_rdev))
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            yield to_word(prefix + entry.name, number, is_block=stat.S_ISBLK(mode))
        elif stat.S_ISDIR(mode) and not prefix and entry.name not in _UNREAD_DIRECTORIES:
            inner = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            try:
                yield from _device_words(inner, f"{entry.name}/")
            finally:
                os.close(inner)


@contextmanager
def _opened(root: Path, *names: str) -> Iterator[int]:
    """A directory below the container's root, opened name by name, never through a link of the container's making."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in names:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)
