"""Says whose a process is, by the cgroup that the kernel keeps it in: implements the port ProcessOwners.

Source: proc(5), cgroups(7). The path is compared from its beginning: a task may make cgroups of its own below the one that
it was given, and call them as it likes, but it can't leave that one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nodeservice.core.model import AttemptId
from nodeservice.limits.hierarchy import cgroups_of
from nodeservice.ports import NOBODY

_STARTED = 19
"""Field 22 of /proc/PID/stat, starttime, counted behind the name, which may hold spaces and parentheses."""
_CONTROLLER_OF_V1 = "memory"
_MPS_SERVER = b"nvidia-cuda-mps\n"
"""The name of nvidia-cuda-mps-server, cut to the 15 characters that the kernel keeps."""


class ProcOwners:
    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._ticks = os.sysconf("SC_CLK_TCK")

    def owners(
        self, pids: Sequence[int], attempts: Mapping[AttemptId, int], *, before_seconds: float
    ) -> Mapping[int, AttemptId]:
        places = self._places(attempts)
        found: dict[int, AttemptId] = {}
        for pid in pids:
            place = self._place(pid)
            if place is None or not self._started_before(pid, before_seconds):
                continue
            owner = _owner(place, places)
            if owner is not NOBODY or not self._is_mps_server(pid):
                found[pid] = owner
        return found

    def cgroup(self, pid: int) -> str | None:
        place = cgroups_of(self._proc / str(pid)).get("")
        # Beside the root of a cgroup namespace there is no path to it from here.
        if place is None or not _is_own(place) or ".." in place.split("/"):
            return None
        return f"/sys/fs/cgroup{place}"

    def _places(self, attempts: Mapping[AttemptId, int]) -> dict[str, AttemptId]:
        """Whose each cgroup is. One that two attempts seem to live in is neither's."""
        places: dict[str, AttemptId] = {}
        for id_, pid in attempts.items():
            place = self._place(pid)
            if place is not None and _is_own(place):
                places[place] = NOBODY if place in places else id_
        return places

    def _place(self, pid: int) -> str | None:
        """Its path below the hierarchy that counts memory; below the unified one where there is no other."""
        places = cgroups_of(self._proc / str(pid))
        return places.get(_CONTROLLER_OF_V1, places.get(""))

    def _started_before(self, pid: int, seconds: float) -> bool:
        try:
            stat = (self._proc / str(pid) / "stat").read_bytes()
            started = int(stat.rpartition(b")")[2].split()[_STARTED]) / self._ticks
        except (OSError, ValueError, IndexError):
            return False
        return started <= seconds

    def _is_mps_server(self, pid: int) -> bool:
        """Asked only of processes outside of every task, so no task can hide one by this name."""
        try:
            return (self._proc / str(pid) / "comm").read_bytes() == _MPS_SERVER
        except OSError:
            return False


def _is_own(place: str) -> bool:
    """Without a cgroup of its own, everybody would seem to live below it. `..` is what lies above a cgroup namespace."""
    return any(part not in ("", "..") for part in place.split("/"))


def _owner(place: str, places: Mapping[str, AttemptId]) -> AttemptId:
    parts = place.split("/")
    for count in range(len(parts), 0, -1):
        owner = places.get("/".join(parts[:count]))
        if owner is not None:
            return owner
    return NOBODY
