"""Where the cgroup file systems are mounted, which cgroups this process sits in, and which are above the tasks.

Sources: proc_pid_mountinfo(5), proc_pid_cgroup(5), cgroups(7). Paths are never guessed: a controller is looked up among the
mounts, our own place in /proc/self/cgroup. `root` stands before every absolute path, so that a saved tree can be read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

TASKS_DIRECTORY, TASKS_SLICE = "nodeservice", "nodeservice.slice"
"""Above all tasks of all nodes of a host: of engines with the driver `cgroupfs`, and with `systemd`."""
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One line of mountinfo. `root` is the directory of the file system that shows at `point`."""

    root: str
    point: str
    filesystem: str
    device: str
    super_options: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroup:
    """A cgroup in one hierarchy. `directories` run from it up to the topmost that can be seen."""

    version: int
    directories: tuple[Path, ...]


def read_mounts(root: Path = Path("/")) -> tuple[Mount, ...]:
    """All mounts in mount order, so that of two on one point the later is what shows. Unreadable means none."""
    mounts = []
    for line in _lines(root / "proc/self/mountinfo"):
        before, separator, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if separator and len(fields) >= 5 and len(tail) >= 3:
            mounts.append(
                Mount(
                    root=_unescape(fields[3]),
                    point=_unescape(fields[4]),
                    filesystem=tail[0],
                    device=_unescape(tail[1]),
                    super_options=frozenset(tail[2].split(",")),
                )
            )
    return tuple(mounts)


def mount_of(path: Path, mounts: Iterable[Mount]) -> Mount | None:
    """The mount with the longest point that leads to the path; of two on one point the later, which hides the other.

    Links in the path must be resolved.
    """
    found: Mount | None = None
    for mount in mounts:
        if path.is_relative_to(mount.point) and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def v1_mount(mounts: tuple[Mount, ...], controller: str) -> Mount | None:
    """The mount of a v1 controller; one that shows the hierarchy from its root wins over a part of it."""
    found = [m for m in mounts if m.filesystem == "cgroup" and controller in m.super_options]
    return next((m for m in found if m.root == "/"), found[0] if found else None)


def v2_mount(mounts: tuple[Mount, ...]) -> Mount | None:
    """The mount of the unified hierarchy, if there is one (on a hybrid host it may hold no controller)."""
    found = [m for m in mounts if m.filesystem == "cgroup2"]
    return next((m for m in found if m.root == "/"), found[0] if found else None)


def host_cgroup_version(root: Path = Path("/")) -> int:
    """1 where any v1 controller is mounted (hybrid included), else 2; 0 where there are no cgroups at all."""
    mounts = read_mounts(root)
    if any(v1_mount(mounts, controller) for controller in ("memory", "cpu", "cpuset", "pids")):
        return 1
    return 2 if v2_mount(mounts) else 0


def cgroups_of(process: Path) -> dict[str, str]:
    """By controller, where the process of this directory in /proc is; the unified one has no name. Gone means nowhere."""
    places: dict[str, str] = {}
    for line in _lines(process / "cgroup"):
        _, _, rest = line.partition(":")
        names, colon, place = rest.partition(":")
        if colon:
            places.update(dict.fromkeys(names.split(","), place))
    return places


def own_cgroup(controller: str, root: Path = Path("/")) -> Cgroup | None:
    """Our cgroup for that controller, v1 before v2; None where the controller is not to be seen.

    A place outside what is mounted (a cgroup namespace shows `/../…`) becomes the top of the mount, which is the nearest
    ancestor that can be read.
    """
    mounts = read_mounts(root)
    places = cgroups_of(root / "proc/self")
    version, name, mount = 1, controller, v1_mount(mounts, controller)
    if mount is None:
        version, name, mount = 2, "", v2_mount(mounts)
    if mount is None or name not in places:
        return None
    return Cgroup(version=version, directories=_up_to_the_top(root, mount, places[name]))


def tasks_cgroup(controller: str, place: str | None, root: Path = Path("/")) -> Cgroup | None:
    """The cgroup above all tasks, which lies at `place` below the root, as far as it is there.

    Ours where no place is known, or the hierarchy is not mounted from its root: what an engine makes lies where we do then.
    """
    mounts = read_mounts(root)
    mount, version = v1_mount(mounts, controller), 1
    if mount is None:
        mount, version = v2_mount(mounts), 2
    if place is None or mount is None or mount.root != "/":
        return own_cgroup(controller, root)
    return Cgroup(version=version, directories=_up_to_the_top(root, mount, f"/{place}"))


def _up_to_the_top(root: Path, mount: Mount, place: str) -> tuple[Path, ...]:
    top = root / mount.point.lstrip("/")
    inside = PurePosixPath(place)
    if ".." in inside.parts or not inside.is_relative_to(mount.root):
        return (top,)
    below = inside.relative_to(mount.root).parts
    chain = [top.joinpath(*below[:depth]) for depth in range(len(below), -1, -1)]
    return tuple(directory for directory in chain if directory.is_dir()) or (top,)


def _lines(path: Path) -> list[str]:
    """No other character than the newline ends one, though Python knows some: names may hold them."""
    try:
        return path.read_bytes().decode(errors="surrogateescape").split("\n")
    except OSError:
        return []


def _unescape(text: str) -> str:
    """The kernel writes blanks, tabs, newlines and backslashes in paths as three octal digits."""
    return _ESCAPE.sub(lambda match: chr(int(match.group(1), 8)), text)
