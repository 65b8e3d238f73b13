"""The instants at which an attempt has to end, and why. Pure: the times are all in the record, so none is forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from nodeservice.core.model import Phase, StopCause, TaskRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    at: datetime
    cause: StopCause
    message: str


def deadlines(record: TaskRecord) -> list[Deadline]:
    """All that hold in its phase, be they past; none where its end was requested or is over."""
    if record.stop is not None or record.phase > Phase.RUNNING:
        return []
    spec = record.spec
    found: list[Deadline] = []
    if record.deadline_at is not None:
        found.append(of_run(record.deadline_at, spec.timeout_seconds))
    if record.expires_at is not None:
        message = "Had not ended by its absolute deadline"
        found.append(_deadline(record.expires_at, StopCause.DEADLINE, message, spec.total_timeout_seconds))
    if record.phase < Phase.RUNNING and spec.wait_timeout_seconds is not None:
        at = record.accepted_at + timedelta(seconds=spec.wait_timeout_seconds)
        message = "Had not started within its waiting time"
        found.append(_deadline(at, StopCause.WAIT_TIMEOUT, message, spec.wait_timeout_seconds))
    if record.phase is Phase.PULLING and spec.pull_timeout_seconds is not None:
        at = record.timings[-1].started_at + timedelta(seconds=spec.pull_timeout_seconds)
        message = "The image was not pulled within its time limit"
        found.append(_deadline(at, StopCause.PULL_TIMEOUT, message, spec.pull_timeout_seconds))
    return found


def of_run(at: datetime, limit_seconds: float | None) -> Deadline:
    """The end of its running time."""
    return _deadline(at, StopCause.DEADLINE, "Ran longer than its time limit", limit_seconds)


def _deadline(at: datetime, cause: StopCause, message: str, limit_seconds: float | None) -> Deadline:
    limit = "" if limit_seconds is None else f" of {limit_seconds:g} s"
    return Deadline(at=at, cause=cause, message=f"{message}{limit}.")
