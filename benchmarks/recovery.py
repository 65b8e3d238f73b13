"""How long a node takes to start on a journal with many unfinished tasks, beside its start on an empty one."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from benchmarks.rig.finding import Finding, Target, median
from benchmarks.rig.records import record
from benchmarks.rig.scale import Scale
from benchmarks.rig.service import running_service
from nodeservice.journal.sqlite import JOURNAL_NAME, SqliteJournal

ABOUT = (
    "A journal of so many attempts that wait to be reported (a master that was long away), then `serve` in a new process. "
    "ready: from the start of the process to `node.ready`. reported: until the master has all reports. The row with 0 is "
    "the baseline: the start of an empty node."
)
BOUND_SECONDS = 5.0


async def measure(scale: Scale) -> Finding:
    found = Finding(about=ABOUT)
    home = scale.directory("recovery")
    counts = scale.pick((0, 1_000, 10_000), (0, 10, 1_000, 10_000))
    ready: dict[int, list[float]] = {count: [] for count in counts}
    reported: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(scale.pick(1, 3)):
        for count in counts:
            waits = count <= scale.pick(0, 10_000)
            until_ready, until_reported = await _start(home / f"{count}-{number}", count, waits=waits)
            ready[count].append(until_ready)
            if until_reported is not None:
                reported[count].append(until_reported)
    for count in counts:
        found.add("recovery", "s", f"{count:,} tasks", "ready", ready[count], x=count)
        if count and reported[count]:
            found.add("recovery", "s", f"{count:,} tasks", "reported", reported[count], x=count)
    found.ratios["recovery_10000_ready_seconds"] = median(ready[10_000])
    found.ratios["recovery_10000_ready_added_seconds"] = median(ready[10_000]) - median(ready[0])
    found.targets.append(
        Target(
            name="recovery of 10,000 tasks, s until ready",
            measured=median(ready[10_000]),
            bound=BOUND_SECONDS,
            kind="at most",
        )
    )
    return found


async def _start(home: Path, count: int, *, waits: bool) -> tuple[float, float | None]:
    """Seconds until it is ready, and until all were reported."""
    (home / "state").mkdir(parents=True)
    journal = SqliteJournal(home / "state" / JOURNAL_NAME)
    ids = [f"r-{number}" for number in range(count)]
    await journal.save([record(task_id) for task_id in ids])
    await journal.close()
    began = time.monotonic()
    async with running_service(home, minio=None) as service:
        ready = service.ready_after_seconds
        if not waits:
            return ready, None
        await asyncio.gather(*(service.master.reported(task_id) for task_id in ids))
        return ready, time.monotonic() - began
