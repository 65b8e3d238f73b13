"""What the master remembers of a task attempt and of a node."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from nodeservice.wire import master_worker_pb2 as pb

Key = tuple[str, int]
"""(task_id, attempt)."""


class State(StrEnum):
    """Of one attempt. RUNNING means that a node has reported a phase."""

    QUEUED = "QUEUED"
    ASSIGNED = "ASSIGNED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    REJECTED = "REJECTED"
    LOST = "LOST"
    """Given up with its node; another was queued in its place."""
    DROPPED = "DROPPED"
    """Was queued in the place of one that came back; no node ever had it."""

    @property
    def is_final(self) -> bool:
        return self not in (State.QUEUED, State.ASSIGNED, State.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One attempt. The messages in it are never changed in place. Instants are Unix milliseconds, 0 for not yet."""

    task_id: str
    attempt: int
    sequence: int
    """Order of the queue; rises with every attempt that was ever queued. The highest of a task is its current attempt."""
    task: pb.Task
    traceparent: str = ""
    state: State = State.QUEUED
    worker_id: str = ""
    accepted: bool = False
    """The node has answered AssignTask with success: it has the task durably."""
    cancel_requested: bool = False
    """By a client; of a LOST one by us, when its node came back too late."""
    phase: str = ""
    reason: str = ""
    message: str = ""
    result: pb.TaskResult | None = None
    late_result: pb.TaskResult | None = None
    """Reported after it had been given up; decides nothing."""
    node_retries: int = 0
    """Attempts before this one that ended by a fault of their node; likewise `user_retries`, of what the user asked for."""
    user_retries: int = 0
    avoid: tuple[str, ...] = ()
    """Nodes on which attempts before this one ended so; they are taken where no other is to be had."""
    submitted_at_ms: int
    queued_at_ms: int
    assigned_at_ms: int = 0
    finished_at_ms: int = 0

    @property
    def key(self) -> Key:
        return self.task_id, self.attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRow:
    worker_id: str
    address: str
    info: pb.WorkerInfo = field(default_factory=pb.WorkerInfo)
    registered_at_ms: int
    heard_at_ms: int
    """When it was heard of at the last write; heartbeats in between are not written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrphanRow:
    """A report that belongs to no attempt that is open here: of an unknown task, or of a node that lost the attempt."""

    task_id: str
    attempt: int
    worker_id: str
    result: pb.TaskResult
    received_at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which tasks are to be listed, by their current attempts. What is empty leaves none out."""

    states: frozenset[str] = frozenset()
    worker_id: str = ""
    since_ms: int = 0
    """Submitted then or later."""


@dataclass(frozen=True, slots=True)
class Untold:
    """Of which nodes may have more to tell: all of `worker_ids`, which are away, and tasks that others list."""

    worker_ids: frozenset[str] = frozenset()
    task_ids: frozenset[str] = frozenset()
