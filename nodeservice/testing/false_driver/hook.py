"""A stand-in for nvidia-container-runtime-hook: gives a container the device nodes of exactly the false GPUs it is to have.

Docker's driver "nvidia" calls a program of that name before a container's first process runs: as a prestart hook it finds
the container's state on its input (OCI runtime specification, "POSIX-platform Hooks" and "State"). The last
NVIDIA_VISIBLE_DEVICES of the container counts, as for NVIDIA's own. On cgroup v1 the nodes are also allowed; on cgroup v2 a
device rule is a BPF program, which this does not write, and says so in its record.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nodeservice.limits.hierarchy import cgroups_of, read_mounts, v1_mount
from nodeservice.testing.false_driver.state import Sections, StateFile

PROGRAM = "nvidia-container-runtime-hook"
NVIDIA_MAJOR = 195
CONTROL_MINOR = 255
"""Of /dev/nvidiactl."""
_UVM = "nvidia-uvm"
_HIGHEST_DYNAMIC_MAJOR = 511
_NOTHING = ("", "void", "none")
_ON_V2 = "on cgroup v2 this stand-in can't allow devices: the nodes are there, and can't be opened"
_SMI = "#!/bin/sh\n# A stand-in: the GPUs are pretended.\ncat <<'END'\n{}\nEND\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class HookCall:
    """What the hook notes of one call. `nodes` are those in /dev that it made; `not_allowed` says why no rule was added."""

    container_id: str
    uuids: tuple[str, ...]
    nodes: tuple[str, ...]
    not_allowed: str = ""


def hook_script(drivers: Path, record: Path) -> str:
    """The shell script to put on an engine's PATH as PROGRAM.

    Directories of false drivers lie directly in `drivers`, at the time of a call; `record` gets a file for each call.
    """
    words = [sys.executable, "-m", __name__, "--drivers", str(drivers), "--record", str(record)]
    root = Path(__file__).resolve().parents[3]
    return f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(root))} exec {shlex.join(words)} "$@"\n'


def calls(record: Path) -> list[HookCall]:
    """What was noted, in the order of the calls."""
    found = []
    for file in sorted(record.glob("*.json"), key=lambda file: file.stat().st_mtime_ns):
        noted = json.loads(file.read_text())
        found.append(HookCall(**noted | {"uuids": tuple(noted["uuids"]), "nodes": tuple(noted["nodes"])}))
    return found


def main(arguments: Sequence[str]) -> None:
    """The options of `hook_script`, then the stage. What goes wrong keeps the container from its start."""
    _, drivers, _, record, *rest = arguments
    if rest == ["prestart"]:
        state = json.load(sys.stdin)
        _prestart(str(state["id"]), int(state["pid"]), Path(state["bundle"]), Path(drivers), Path(record))


def _prestart(container_id: str, pid: int, bundle: Path, drivers: Path, record: Path) -> None:
    if any(name.startswith("nvidia") for _, name in _characters()):
        raise RuntimeError("this host has a real NVIDIA driver: its GPUs are not to be handed out as pretended ones")
    config = json.loads((bundle / "config.json").read_text())
    uuids = _visible(config["process"]["env"])
    sections = _machines(drivers)
    unknown = [uuid for uuid in uuids if not _is_known(sections, uuid)]
    if unknown:
        raise RuntimeError(f"no false driver has {', '.join(unknown)}")
    nodes = _nodes(sections, uuids)
    # The mount namespace of a process can be walked from outside; it has not yet changed its root (runc's prestart).
    root = Path(f"/proc/{pid}/root") / str(bundle / config["root"]["path"]).lstrip("/")
    for name, number in nodes.items():
        _make(root / "dev" / name, number)
    why = _allow(pid, nodes.values()) if nodes else ""
    if uuids:
        smi = root / "usr/bin/nvidia-smi"
        smi.parent.mkdir(parents=True, exist_ok=True)
        smi.write_text(_SMI.format("\n".join(_listing(sections, uuids))))
        smi.chmod(0o755)
    call = HookCall(container_id=container_id, uuids=tuple(uuids), nodes=tuple(nodes), not_allowed=why)
    new = record / f"{container_id}.new"
    new.write_text(json.dumps(asdict(call)))
    new.rename(record / f"{container_id}.json")


def _visible(env: Sequence[str]) -> list[str]:
    values = [entry.partition("=")[2] for entry in env if entry.startswith("NVIDIA_VISIBLE_DEVICES=")]
    last = values[-1] if values else ""
    return [] if last in _NOTHING else last.split(",")


def _machines(drivers: Path) -> Sections:
    """All GPUs and MIG devices of all false drivers."""
    sections: Sections = {}
    for state in sorted(drivers.glob("*/state")):
        sections |= StateFile(state).read()
    return sections


def _is_known(sections: Sections, uuid: str) -> bool:
    return f"gpu {uuid}" in sections or f"mig {uuid}" in sections


def _gpu(sections: Sections, uuid: str) -> str:
    """The GPU itself, or the one that a MIG device is a part of."""
    mig = sections.get(f"mig {uuid}")
    return mig["gpu"] if mig is not None else uuid


def _nodes(sections: Sections, uuids: Sequence[str]) -> dict[str, tuple[int, int]]:
    """By name in /dev. The nodes that serve all GPUs are there where any GPU is."""
    nodes: dict[str, tuple[int, int]] = {}
    for uuid in uuids:
        minor = int(sections[f"gpu {_gpu(sections, uuid)}"]["minor"])
        nodes[f"nvidia{minor}"] = (NVIDIA_MAJOR, minor)
    if nodes:
        nodes["nvidiactl"] = (NVIDIA_MAJOR, CONTROL_MINOR)
        nodes[_UVM] = (_unused_major(), 0)
    return nodes


def _listing(sections: Sections, uuids: Sequence[str]) -> list[str]:
    """As `nvidia-smi -L` writes it: a GPU, below it those of its MIG devices that are visible."""
    lines: list[str] = []
    for index, gpu in enumerate(dict.fromkeys(_gpu(sections, uuid) for uuid in uuids)):
        lines.append(f"GPU {index}: {sections[f'gpu {gpu}']['name']} (UUID: {gpu})")
        migs = [uuid for uuid in uuids if uuid != gpu and _gpu(sections, uuid) == gpu]
        for number, mig in enumerate(migs):
            lines.append(f"  MIG {sections[f'mig {mig}']['profile']}     Device  {number}: (UUID: {mig})")
    return lines


def _make(node: Path, number: tuple[int, int]) -> None:
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(*number))
    node.chmod(0o666)


def _allow(pid: int, numbers: Iterable[tuple[int, int]]) -> str:
    """Add a rule for each to the process's cgroup, beside those of the engine; why not, where that can't be."""
    mount = v1_mount(read_mounts(), "devices")
    place = cgroups_of(Path(f"/proc/{pid}")).get("devices")
    if mount is None or place is None:
        return _ON_V2
    rules = Path(mount.point) / os.path.relpath(place, mount.root) / "devices.allow"
    for major, minor in numbers:
        rules.write_text(f"c {major}:{minor} rw")
    return ""


def _unused_major() -> int:
    """No driver of this kernel has it, so its nodes open nothing."""
    taken = {major for major, _ in _characters()}
    return next(major for major in range(_HIGHEST_DYNAMIC_MAJOR, 0, -1) if major not in taken)


def _characters() -> Iterator[tuple[int, str]]:
    """From /proc/devices (proc(5)), whose second half has the block devices."""
    for line in Path("/proc/devices").read_text().partition("Block devices:")[0].splitlines()[1:]:
        if line.strip():
            major, _, name = line.strip().partition(" ")
            yield int(major), name


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (RuntimeError, OSError, LookupError, ValueError) as error:
        sys.exit(f"stand-in for {PROGRAM}: {error!r}")
