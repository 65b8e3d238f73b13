"""What the engine's own process may do, and which programs it finds: its limits end those of its containers.

Sources: unix(7) (SO_PEERCRED of a connected socket names the process that listens), getrlimit(2) (raising a hard limit needs
CAP_SYS_RESOURCE), capabilities(7), systemd.exec(5) (the PATH of a service).
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from nodeservice.runtime.endpoint import Endpoint

GPU_HOOK = "nvidia-container-runtime-hook"

_CAP_SYS_RESOURCE = 1 << 24
_CREDENTIALS = struct.Struct("3i")
_CONNECT_SECONDS = 5.0
_GPU_DRIVER = "proc/driver/nvidia/version"
_SYSTEMD = 1
"""It listens in the place of an engine that it starts when asked, which then has this PATH and the host's root."""
_DOCKER_PIDFILE = "/run/docker.pid"
_SYSTEMD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProcess:
    """`open_files_max` and `processes_max` are the most that it can give to a container, None where not known."""

    open_files_max: int | None = None
    processes_max: int | None = None
    has_sys_resource: bool | None = None
    root: Path = Path("/")
    """Its root directory, as seen from here."""
    has_gpu_hook: bool | None = None
    """Whether NVIDIA's hook is on its PATH; Docker looks there once, when it starts."""
    has_gpu_driver: bool = False
    """Whether this host runs NVIDIA's kernel driver."""


def read_engine_process(endpoint: Endpoint, *, root: Path = Path("/")) -> EngineProcess:
    """Blocks shortly. All of the process unknown where the engine listens on TCP, or it can't be seen.

    Raises OSError where the engine has just gone, or this process is out of descriptors: what is not known for now must not
    be taken for unknown.
    """
    unknown = EngineProcess(root=root, has_gpu_driver=(root / _GPU_DRIVER).exists())
    with endpoint.connect(timeout_seconds=_CONNECT_SECONDS) as connection:
        if endpoint.socket_path is None:
            return unknown
        pid = _listener(connection)
    place = root / "proc" / str(pid)
    try:
        process = _of(place, root, unknown)
    except (OSError, ValueError) as error:
        _raise_if_for_now(error, pid)
        return unknown
    try:
        own_root, path = (root, _SYSTEMD_PATH) if pid == _SYSTEMD else (place / "root", _path(place))
        return replace(process, root=own_root, has_gpu_hook=has_program(GPU_HOOK, path, own_root))
    except OSError as error:
        _raise_if_for_now(error, pid)
        return process


def _raise_if_for_now(error: Exception, pid: int) -> None:
    if isinstance(error, OSError) and (error.errno in (errno.EMFILE, errno.ENFILE) or _has_gone(pid)):
        raise error


def _has_gone(pid: int) -> bool:
    """0 is a process that cannot be seen from here; /proc may hide others (proc(5), hidepid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def peer_pid(connection: socket.socket) -> int | None:
    """The engine's process at the other end of a Unix socket; None where that cannot be told.

    Where systemd listens in its place, Docker's own pid file names it (dockerd(8), --pidfile).
    """
    pid = _listener(connection)
    if pid != _SYSTEMD:
        return pid or None  # 0: it lives outside of our pid namespace
    try:
        named = int(Path(_DOCKER_PIDFILE).read_text(encoding="ascii"))
        is_docker = Path(f"/proc/{named}/comm").read_text(encoding="ascii").strip() == "dockerd"
    except (OSError, ValueError):
        return None
    return named if is_docker else None


def _listener(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(credentials)[0]
    return pid


def has_program(name: str, path: str, root: Path) -> bool:
    """Whether one of the directories in `path`, all below `root`, has an executable file of that name. Raises OSError."""
    os.stat(root / ".")
    candidates = (root / directory.lstrip("/") / name for directory in path.split(":") if directory.startswith("/"))
    return any(candidate.is_file() and os.access(candidate, os.X_OK) for candidate in candidates)


def _path(place: Path) -> str:
    """As it was when the process began (proc_pid_environ(5)). Raises OSError."""
    variables = (place / "environ").read_bytes().split(b"\0")
    return next((os.fsdecode(entry[5:]) for entry in variables if entry.startswith(b"PATH=")), "")


def _of(place: Path, root: Path, unknown: EngineProcess) -> EngineProcess:
    limits, status = (place / "limits").read_text(), (place / "status").read_text()
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    may_raise = bool(effective and int(effective[1], 16) & _CAP_SYS_RESOURCE)
    ceiling = int((root / "proc/sys/fs/nr_open").read_text())
    hard = _hard_limit(limits, "Max open files")
    if not may_raise and hard is not None:
        ceiling = min(ceiling, hard)
    return replace(
        unknown, open_files_max=ceiling, processes_max=_hard_limit(limits, "Max processes"), has_sys_resource=may_raise
    )


def _hard_limit(limits: str, name: str) -> int | None:
    found = re.search(rf"^{name}\s+\S+\s+(\S+)", limits, re.MULTILINE)
    return int(found[1]) if found is not None and found[1].isdecimal() else None
