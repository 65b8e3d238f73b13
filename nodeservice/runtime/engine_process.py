"""What the engine's own process may do: its limits end those of its containers.

Sources: unix(7) (SO_PEERCRED of a connected socket names the process that listens), getrlimit(2) (raising a hard limit needs
CAP_SYS_RESOURCE), capabilities(7).
"""

from __future__ import annotations

import re
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from nodeservice.runtime.endpoint import Endpoint

_CAP_SYS_RESOURCE = 1 << 24
_CREDENTIALS = struct.Struct("3i")
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProcess:
    """`open_files_max` and `processes_max` are the most that it can give to a container, None where not known."""

    open_files_max: int | None = None
    processes_max: int | None = None
    has_sys_resource: bool | None = None


def read_engine_process(endpoint: Endpoint, *, root: Path = Path("/")) -> EngineProcess:
    """Blocks shortly. All unknown where the engine listens on TCP, or its process can't be seen."""
    try:
        connection = endpoint.connect(timeout_seconds=_CONNECT_SECONDS)
    except OSError:
        return EngineProcess()
    with connection:
        if endpoint.socket_path is None:
            return EngineProcess()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, _, _ = _CREDENTIALS.unpack(credentials)
    try:
        return _of(root / "proc" / str(pid), root)
    except (OSError, ValueError):
        return EngineProcess()


def _of(place: Path, root: Path) -> EngineProcess:
    limits, status = (place / "limits").read_text(), (place / "status").read_text()
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    may_raise = bool(effective and int(effective[1], 16) & _CAP_SYS_RESOURCE)
    ceiling = int((root / "proc/sys/fs/nr_open").read_text())
    hard = _hard_limit(limits, "Max open files")
    if not may_raise and hard is not None:
        ceiling = min(ceiling, hard)
    return EngineProcess(
        open_files_max=ceiling, processes_max=_hard_limit(limits, "Max processes"), has_sys_resource=may_raise
    )


def _hard_limit(limits: str, name: str) -> int | None:
    found = re.search(rf"^{name}\s+\S+\s+(\S+)", limits, re.MULTILINE)
    return int(found[1]) if found is not None and found[1].isdecimal() else None
