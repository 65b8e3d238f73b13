"""What the kernel's log tells of kills for lack of memory: whose limit it was.

Source: mm/oom_kill.c writes, since Linux 5.0, for a kill a line of `oom-kill:constraint=…,…,oom_memcg=…,task_memcg=…,pid=…`;
`global_oom` stands in the place of `oom_memcg` where the host itself ran out. It writes at most ten in five seconds, so a
line says that there was a kill, and no line says nothing. Reading needs CAP_SYSLOG or kernel.dmesg_restrict=0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

_KILL = re.compile(
    r"oom-kill:constraint=[A-Z_]+,.*?(?:,oom_memcg=(?P<limit>[^,]*)|,global_oom),task_memcg=(?P<task>[^,]*),"
)
_RECORD_BYTES = 8192
_MOST_KILLS = 10_000


@dataclass(frozen=True, slots=True)
class LoggedKill:
    """`limit_place` is the cgroup whose limit was reached, `` for the host's memory; `task_place` the victim's cgroup."""

    limit_place: str
    task_place: str


class OomLog:
    """Reads the kernel's log from its beginning, since names of attempts never return. Only for use from one thread."""

    def __init__(self) -> None:
        self._kills: list[LoggedKill] = []
        self._descriptor: int | None = None
        with suppress(OSError):
            self._descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def kills_below(self, place: str) -> list[LoggedKill]:
        """Those of processes in this cgroup or below it."""
        self._kills += (kill for line in self._new_lines() if (kill := parse(line)) is not None)
        del self._kills[:-_MOST_KILLS]
        return [kill for kill in self._kills if kill.task_place == place or kill.task_place.startswith(f"{place}/")]

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _new_lines(self) -> Iterator[str]:
        while self._descriptor is not None:
            try:
                record = os.read(self._descriptor, _RECORD_BYTES)
            except BrokenPipeError:
                continue  # the kernel overwrote what we had not read yet; the next read goes on after it
            except OSError:
                return
            if not record:
                return
            yield record.decode(errors="replace")


def parse(line: str) -> LoggedKill | None:
    found = _KILL.search(line)
    return LoggedKill(limit_place=found["limit"] or "", task_place=found["task"]) if found else None
