"""Which devices a container's cgroup lets it open, read back: the rules of cgroup v1, the program of cgroup v2.

Sources: Documentation/admin-guide/cgroup-v1/devices.rst, Documentation/admin-guide/cgroup-v2.rst (device controller).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nodeservice.limits.bpf_devices import UnreadableProgramError, allowed_devices
from nodeservice.limits.device_nodes import FIRST_CONTROL_MINOR, NVIDIA_MAJOR, DeviceNumber, GpuNodes
from nodeservice.limits.hierarchy import Mount, cgroups_of, read_mounts, v1_mount, v2_mount
from nodeservice.ports import Reading

DEVICE_RULES = "device_rules"
EVERYTHING = "a *:* rwm"
_PF_EXITING = 4
_RULE = re.compile(r"([abc]) (\*|\d+):(\*|\d+) ([rwm]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """`kind` is a (all), b or c; None is any number. `access` has r, w, and m for making nodes."""

    kind: str
    major: int | None
    minor: int | None
    access: str

    def covers(self, number: DeviceNumber) -> bool:
        return (
            self.kind in "ac" and self.major in (None, number[0]) and self.minor in (None, number[1]) and self.may_open
        )

    @property
    def may_open(self) -> bool:
        return "r" in self.access or "w" in self.access


def read_device_rules(pid: int, root: Path = Path("/")) -> Reading:
    """Of the cgroup that the process is in, joined by commas. Raises OSError where the process is gone."""
    process = root / "proc" / str(pid)
    places = cgroups_of(process)
    if _is_ending(process):
        # From then on v1 shows every process in the topmost cgroup, where everything is allowed (proc_cgroup_show).
        raise ProcessLookupError("it was ending when it was read")
    mounts = read_mounts(root)
    mount = v1_mount(mounts, "devices")
    if mount is not None and "devices" in places:
        return _v1(_inside(root, mount, places["devices"]) / "devices.list")
    mount = v2_mount(mounts)
    if mount is None or "" not in places:
        return _unread("/proc/self/mountinfo", "no cgroup of it holds rules for devices")
    return _v2(_inside(root, mount, places[""]))


def rules_of(text: str) -> Iterator[Rule]:
    """What can't be understood counts as everything, so that nothing is overlooked."""
    for line in filter(None, text.split(",")):
        match = _RULE.fullmatch(line.strip())
        kind, major, minor, access = match.groups() if match else ("a", "*", "*", "rwm")
        yield Rule(
            kind=kind,
            major=None if major == "*" else int(major),
            minor=None if minor == "*" else int(minor),
            access=access,
        )


def forbidden(text: str, gpus: Sequence[GpuNodes], granted: Sequence[str]) -> str:
    """What these rules open and a task may not have, in words: everything, disks, GPUs that it was not granted."""
    own = {number for gpu in gpus if gpu.uuid in granted for number in gpu.numbers}
    others = {number: gpu.uuid for gpu in gpus for number in gpu.numbers if number not in own}
    found: dict[str, None] = {}
    for rule in rules_of(text):
        if not rule.may_open:
            continue
        if rule.major is None:
            found["every device" if rule.kind != "b" else "every block device"] = None
        elif rule.kind == "b":
            found[f"block devices {_text(rule)}"] = None
        else:
            found |= {f"{_text(number)} of {uuid}": None for number, uuid in others.items() if rule.covers(number)}
            if _is_unknown_gpu(rule, own, set(others)) and not (granted and not own):
                found[f"the GPU {_text(rule)}"] = None
    return f"may open {', '.join(found)}, which it was not granted" if found else ""


def _is_ending(process: Path) -> bool:
    """Whether its flags have PF_EXITING (proc_pid_stat(5), linux/sched.h), which outlasts a long clearing of memory."""
    fields = (process / "stat").read_bytes().rpartition(b")")[2].split()
    return bool(int(fields[6]) & _PF_EXITING)


def _is_unknown_gpu(rule: Rule, own: set[DeviceNumber], others: set[DeviceNumber]) -> bool:
    """A GPU's node by its number, although nobody told of such a GPU."""
    if rule.major != NVIDIA_MAJOR or (rule.minor is not None and rule.minor >= FIRST_CONTROL_MINOR):
        return False
    if rule.minor is None:
        return not own
    return (NVIDIA_MAJOR, rule.minor) not in own | others


def _text(what: Rule | DeviceNumber) -> str:
    major, minor = (what.major, what.minor) if isinstance(what, Rule) else what
    return f"{major}:{'*' if minor is None else minor}"


def _inside(root: Path, mount: Mount, place: str) -> Path:
    path = PurePosixPath(place)
    inner = path.relative_to(mount.root) if path.is_relative_to(mount.root) else PurePosixPath(place.lstrip("/"))
    return root / mount.point.lstrip("/") / inner


def _v1(file: Path) -> Reading:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError) as error:
        return _unread(str(file), str(error))
    return Reading(limit=DEVICE_RULES, value=", ".join(lines), source=str(file))


def _v2(directory: Path) -> Reading:
    source = f"{directory} (BPF)"
    try:
        programs = allowed_devices(directory)
    except UnreadableProgramError as error:
        return _unread(source, str(error))
    except OSError as error:
        return _unread(source, f"the kernel does not tell which programs are attached: {error}")
    return Reading(limit=DEVICE_RULES, value=", ".join(programs) if programs is not None else EVERYTHING, source=source)


def _unread(source: str, note: str) -> Reading:
    return Reading(limit=DEVICE_RULES, value=None, source=source, readable=False, note=note)
