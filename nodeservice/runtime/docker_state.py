"""Reads the engine's description of a container into a ContainerState; pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nodeservice.ports import ContainerState

_STATUS = {
    "created": "created",
    "configured": "created",  # Podman
    "initialized": "created",  # Podman
    "running": "running",
    "paused": "running",
    "restarting": "running",
    "stopping": "running",  # Podman
    "exited": "exited",
    "stopped": "exited",  # Podman
    "removing": "dead",
    "dead": "dead",
}
_INSTANT = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d)")
# tini and catatonit say this when the command cannot be executed; it is then all that the container wrote.
_INIT_FAILURE = re.compile(
    rb"\[FATAL tini \(\d+\)\] exec (.{0,4096}) failed: (No such file or directory|Permission denied|Exec format error"
    rb"|Is a directory|Not a directory)\n?|"
    rb"ERROR \(catatonit:\d+\): failed to exec pid1: ([^\n]{0,200})\n?",
    re.DOTALL,
)


def if_named(state: ContainerState | None, name_or_id: str) -> ContainerState | None:
    """The engine also takes the beginning of an id."""
    return state if state is not None and name_or_id in {state.id, state.id[:12], state.name} else None


def read_state(inspected: Mapping[str, Any]) -> ContainerState:
    """From the answer to GET /containers/ID/json."""
    state = inspected.get("State") or {}
    config = inspected.get("Config") or {}
    status = read_status(str(state.get("Status", "")))
    ended = status in {"exited", "dead"}
    started_at, finished_at = read_instant(state.get("StartedAt")), read_instant(state.get("FinishedAt"))
    if started_at is not None and finished_at is not None:
        # The engine notes the start after the fact; of a very short run it may have noted the end before.
        finished_at = max(started_at, finished_at)
    return ContainerState(
        id=str(inspected["Id"]),
        name=str(inspected.get("Name", "")).removeprefix("/"),
        status=status,
        pid=int(state.get("Pid") or 0) or None,
        started_at=started_at,
        finished_at=finished_at if ended else None,
        exit_code=int(state.get("ExitCode") or 0) if ended else None,
        oom_killed=bool(state.get("OOMKilled")),
        error=str(state.get("Error") or ""),
        labels=dict(config.get("Labels") or {}),
        limits=_limits(inspected.get("HostConfig") or {}),
        layer=_layer(inspected.get("GraphDriver") or {}),
        beside=_beside(inspected),
    )


def read_listed(entry: Mapping[str, Any]) -> ContainerState:
    """From one in the answer to GET /containers/json, which tells whose it is, and not when it started or how it ended."""
    names = entry.get("Names") or ("",)
    return ContainerState(
        id=str(entry["Id"]),
        name=str(names[0]).removeprefix("/"),
        status=read_status(str(entry.get("State", ""))),
        pid=None,
        started_at=None,
        finished_at=None,
        exit_code=None,
        oom_killed=False,
        error="",
        labels=dict(entry.get("Labels") or {}),
    )


def _layer(graph_driver: Mapping[str, Any]) -> tuple[Path, ...]:
    """Of overlay drivers: what the container writes, and where the file system prepares it."""
    data = graph_driver.get("Data") or {}
    return tuple(Path(str(data[name])) for name in ("UpperDir", "WorkDir") if data.get(name))


def _beside(inspected: Mapping[str, Any]) -> tuple[Path, ...]:
    """Volumes that an image declares, and the engine's own files in /etc, which a task may write to as well."""
    volumes = [mount.get("Source") for mount in inspected.get("Mounts") or () if mount.get("Type") == "volume"]
    files = [inspected.get(name) for name in ("HostsPath", "HostnamePath", "ResolvConfPath")]
    return tuple(Path(str(place)) for place in (*volumes, *files) if place)


def read_status(status: str) -> str:
    """Created, running, exited or dead; a word not known counts as running, so that nothing is taken for ended."""
    return _STATUS.get(status.lower(), "running")


def read_instant(text: object) -> datetime | None:
    """An RFC 3339 instant with up to nanoseconds, cut to microseconds. The engine's "never" is the year 1: None."""
    match = _INSTANT.fullmatch(str(text or ""))
    if match is None:
        return None
    base, fraction, zone = match.groups()
    instant = datetime.fromisoformat(f"{base}{(fraction or '.0')[:7]}{'+00:00' if zone == 'Z' else zone}")
    return instant.astimezone(UTC) if instant.year > 1 else None


def init_failure(log: bytes) -> str | None:
    """What the init process said if the whole log is its complaint that the command cannot be executed."""
    match = _INIT_FAILURE.fullmatch(log)
    if match is None:
        return None
    command, why, other = match.groups()
    said = other if command is None else command + b": " + why
    return f"exec {said.decode(errors='replace')}"


def _limits(host_config: Mapping[str, Any]) -> dict[str, object]:
    quota, period = int(host_config.get("CpuQuota") or 0), int(host_config.get("CpuPeriod") or 0) or 100_000
    nano_cpus = int(host_config.get("NanoCpus") or 0)
    return {
        "cpu_milli": (nano_cpus // 1_000_000) or (quota * 1000 // period if quota > 0 else None),
        "memory_bytes": int(host_config.get("Memory") or 0) or None,
        "memory_swap_bytes": int(host_config.get("MemorySwap") or 0) or None,
        "pids_limit": int(host_config.get("PidsLimit") or 0) or None,
    }
