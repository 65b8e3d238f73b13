"""Says whose a process is, by the cgroup that the kernel keeps it in: implements the port ProcessOwners.

Source: proc(5), cgroups(7). The path is compared from its beginning: a task may make cgroups of its own below the one that
it was given, and call them as it likes, but it can't leave that one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nodeservice.core.model import AttemptId

_STARTED = 19
"""Field 22 of /proc/PID/stat, starttime, counted behind the name, which may hold spaces and parentheses."""
_CONTROLLER_OF_V1 = "memory"


class ProcOwners:
    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._ticks = os.sysconf("SC_CLK_TCK")

    def owners(
        self, pids: Sequence[int], attempts: Mapping[AttemptId, int], *, before_seconds: float
    ) -> Mapping[int, AttemptId]:
        places: dict[str, AttemptId] = {}
        for id_, pid in attempts.items():
            place = self._place(pid)
            # Without a cgroup of its own, everybody would seem to live below it.
            if place is not None and place.strip("/"):
                places[place] = id_
        found: dict[int, AttemptId] = {}
        for pid in pids:
            if (place := self._place(pid)) is None or not self._started_before(pid, before_seconds):
                continue
            parts = place.split("/")
            for count in range(len(parts), 0, -1):
                owner = places.get("/".join(parts[:count]))
                if owner is not None:
                    found[pid] = owner
                    break
        return found

    def cgroup(self, pid: int) -> str | None:
        place = self._lines(pid).get("")
        return f"/sys/fs/cgroup{place}" if place is not None else None

    def _place(self, pid: int) -> str | None:
        """Its path below the hierarchy that counts memory; below the unified one where there is no other."""
        lines = self._lines(pid)
        return lines.get(_CONTROLLER_OF_V1, lines.get(""))

    def _lines(self, pid: int) -> dict[str, str]:
        """By controller; the unified hierarchy has no name."""
        try:
            text = (self._proc / str(pid) / "cgroup").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return {}
        found: dict[str, str] = {}
        for line in text.splitlines():
            _, _, rest = line.partition(":")
            names, _, path = rest.partition(":")
            found.update(dict.fromkeys(names.split(","), path))
        return found

    def _started_before(self, pid: int, seconds: float) -> bool:
        try:
            stat = (self._proc / str(pid) / "stat").read_bytes()
            started = int(stat.rpartition(b")")[2].split()[_STARTED]) / self._ticks
        except (OSError, ValueError, IndexError):
            return False
        return started <= seconds
