"""How the attempts of one task follow each other: what a report, a lost node and a node that comes back change. Pure.

Of a task's attempts the one with the highest `sequence` is the current one; how it ends is how the task ends, once. An
attempt that is given up with its node (LOST) is followed by another. As long as that one is queued no node has it, and the
lost one may still be taken: it becomes the current one again, the other is DROPPED. Afterwards what the lost one reports is
kept beside it and decides nothing. Numbers of attempts only rise and are never used twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from nodeservice.master.reports import outcome_of
from nodeservice.master.rows import State, TaskRow
from nodeservice.wire import master_worker_pb2 as pb

NODE_GONE = "NODE_GONE"
SURROUNDINGS = frozenset({"IMAGE_PULL_FAILED", "IMAGE_PULL_TIMEOUT", "RESULTS_NOT_STORED", "WAIT_TIMEOUT"})
"""Retryable reasons that another node need not change: a registry, the store, time. Whether to go on is the user's to say.

All other retryable ones are faults of the node.
"""
_AVOIDED_COUNT = 8


class Budget(StrEnum):
    """What a further attempt is taken from: the master's for faults of nodes, or the task's own `max_retries`."""

    NODE = "node"
    USER = "user"


class Taken(StrEnum):
    """What became of a report; the words are those of the answer."""

    ENDED = "stored"
    FOLLOWED = "stored; another attempt follows"
    KNOWN = "known before"
    LATE = "too late: kept beside its attempt, which was given up"
    ASIDE = "of no attempt that this node holds; kept aside"


class Claim(StrEnum):
    """What to do about an attempt that a node lists and, as far as is known here, does not hold."""

    IGNORE = "ignore"
    RECALL = "recall"
    TAKE_BACK = "take back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    now_ms: int
    next_sequence: int


def current(attempts: Sequence[TaskRow]) -> TaskRow:
    return max(attempts, key=lambda row: row.sequence)


def ended(row: TaskRow, state: State, reason: str, message: str, *, now_ms: int) -> TaskRow:
    return replace(row, state=state, reason=reason, message=message, phase="", finished_at_ms=now_ms)


def rejected(row: TaskRow, reason: str, message: str, *, now_ms: int) -> TaskRow:
    """REJECTED means that nothing of the task ever ran: one that follows another FAILED."""
    state = State.FAILED if row.node_retries or row.user_retries else State.REJECTED
    return ended(row, state, reason, message, now_ms=now_ms)


def retry_of(row: TaskRow, result: pb.TaskResult, *, node_retries: int) -> Budget | None:
    """Which budget pays for another attempt after this result; None where the task ends with it."""
    state, reason, _ = outcome_of(result)
    if state is not State.FAILED or row.cancel_requested:
        return None
    if result.retryable and reason not in SURROUNDINGS:
        return Budget.NODE if row.node_retries < node_retries else None
    is_meant = result.retryable or row.task.retry_own_failures
    return Budget.USER if is_meant and row.user_retries < row.task.max_retries else None


def lose(
    attempts: Sequence[TaskRow], row: TaskRow, message: str, *, node_retries: int, moment: Moment
) -> tuple[TaskRow, ...]:
    """Its node is given up. What changes: the attempt, and the one that follows it."""
    if row.cancel_requested:
        return (ended(row, State.CANCELLED, NODE_GONE, message, now_ms=moment.now_ms),)
    if row.node_retries >= node_retries:
        spent = f"{message}; it is not tried again, after {row.node_retries} retries for faults of nodes"
        return (ended(row, State.FAILED, NODE_GONE, spent, now_ms=moment.now_ms),)
    lost = ended(row, State.LOST, NODE_GONE, message, now_ms=moment.now_ms)
    return lost, _following(attempts, row, Budget.NODE, moment)


def report(
    attempts: Sequence[TaskRow], row: TaskRow, result: pb.TaskResult, *, node_retries: int, moment: Moment
) -> tuple[Taken, tuple[TaskRow, ...]]:
    """The node of the attempt `row` reports how it ended. What became of that, and what changes."""
    if row.result is not None or row.late_result is not None:
        return Taken.KNOWN, ()
    state, reason, message = outcome_of(result)
    end = replace(ended(row, state, reason, message, now_ms=moment.now_ms), result=result, accepted=True)
    budget = retry_of(row, result, node_retries=node_retries)
    if not row.state.is_final:
        if budget is None:
            return Taken.ENDED, (end,)
        return Taken.FOLLOWED, (end, _following(attempts, end, budget, moment))
    # Nobody but a recall can have cancelled it: that the user wants no more of the task would have ended it.
    if budget is None and state is not State.CANCELLED and _may_come_back(attempts, row):
        return Taken.ENDED, (replace(end, sequence=moment.next_sequence), _dropped(attempts, row, moment))
    return Taken.LATE, (replace(row, late_result=result),)


def claim(attempts: Sequence[TaskRow], row: TaskRow, worker_id: str) -> Claim:
    """A node lists the attempt `row`."""
    is_its_own = row.worker_id == worker_id
    if is_its_own and (not row.state.is_final or row.result is not None or row.late_result is not None):
        return Claim.IGNORE
    return Claim.TAKE_BACK if is_its_own and _may_come_back(attempts, row) else Claim.RECALL


def recalled(row: TaskRow) -> TaskRow:
    """Its node is told to end it; written down before."""
    return replace(row, cancel_requested=True)


def take_back(attempts: Sequence[TaskRow], row: TaskRow, phase: str, *, moment: Moment) -> tuple[TaskRow, ...]:
    """The lost attempt goes on where it was; only after `claim` said so."""
    back = replace(
        row,
        state=State.RUNNING,
        accepted=True,
        phase=phase,
        reason="",
        message="",
        finished_at_ms=0,
        sequence=moment.next_sequence,
    )
    return back, _dropped(attempts, row, moment)


def _may_come_back(attempts: Sequence[TaskRow], row: TaskRow) -> bool:
    """Not once its node was told to end it: it may be ending."""
    return row.state is State.LOST and not row.cancel_requested and current(attempts).state is State.QUEUED


def _dropped(attempts: Sequence[TaskRow], row: TaskRow, moment: Moment) -> TaskRow:
    message = f"attempt {row.attempt} came back before this one was given to a node"
    return ended(current(attempts), State.DROPPED, "SUPERSEDED", message, now_ms=moment.now_ms)


def _following(attempts: Sequence[TaskRow], row: TaskRow, budget: Budget, moment: Moment) -> TaskRow:
    number = max(attempt.attempt for attempt in attempts) + 1
    task = pb.Task()
    task.CopyFrom(row.task)
    task.attempt = number
    avoid = (*(worker for worker in row.avoid if worker != row.worker_id), row.worker_id)
    return TaskRow(
        task_id=row.task_id,
        attempt=number,
        sequence=moment.next_sequence,
        task=task,
        traceparent=row.traceparent,
        node_retries=row.node_retries + (budget is Budget.NODE),
        user_retries=row.user_retries + (budget is Budget.USER),
        avoid=avoid[-_AVOIDED_COUNT:],
        submitted_at_ms=row.submitted_at_ms,
        queued_at_ms=moment.now_ms,
    )
