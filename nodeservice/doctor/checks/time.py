"""Probe for the deadline: what ignores it, and left its family, is gone all the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from nodeservice.core.model import Reason
from nodeservice.doctor.finding import Finding, State
from nodeservice.doctor.probe import Probe, Seen, not_tried

_RUN_SECONDS = 2.0
_LATE_SECONDS = 5.0
"""Grace, SIGKILL and the engine's own work, on a busy machine."""
_DEAF = 'trap "" TERM INT HUP; while :; do sleep 1; done'
_SCRIPT = f"( ({_DEAF}) & ); {_DEAF}"


def probes(patience: float = 1.0) -> tuple[Probe, ...]:
    judge = partial(judge_time, late_seconds=_LATE_SECONDS * patience)
    return (Probe(name="time", script=_SCRIPT, judge=judge, cpu_milli=200, timeout_seconds=_RUN_SECONDS * patience),)


def judge_time(seen: Seen, *, late_seconds: float) -> Sequence[Finding]:
    if missing := not_tried(seen, ["time"], "see the message"):
        return missing
    record, ended_at = seen.record, seen.ended_at
    if seen.reason is not Reason.DEADLINE or record is None or record.deadline_at is None or ended_at is None:
        evidence = f"a task that was to be ended at its deadline ended with {seen.reason}: {seen.message}"
        return [Finding(limit="time", state=State.FAILED, evidence=evidence)]
    late = (ended_at - record.deadline_at).total_seconds()
    gone = "all its processes are gone"
    if seen.processes_left:
        gone = f"alive still: {', '.join(str(pid) for pid in seen.processes_left)}"
    evidence = f"a task that ignores SIGTERM, with a daemon of its own, ended {late:.2f} s after its deadline; {gone}"
    state = State.FAILED if seen.processes_left or late > late_seconds else State.HARD
    return [Finding(limit="time", state=state, evidence=evidence)]
