"""Whether a task that is submitted is one that is known already. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from nodeservice.errors import RequestError
from nodeservice.master.attempts import current
from nodeservice.master.rows import TaskRow
from nodeservice.wire import master_worker_pb2 as pb


def submitted_before(task: pb.Task, attempt: int, known: Sequence[TaskRow]) -> TaskRow:
    """The task as it is now, if it is the same."""
    row = next((row for row in known if row.attempt == attempt), None)
    if row is None or row.node_retries or row.user_retries:
        raise conflict(task, f"attempt {known[-1].attempt} exists; a new one is attempt {known[-1].attempt + 1}")
    if _fingerprint(row.task) != _fingerprint(task):
        raise conflict(task, "it was submitted before and asks for something else")
    return current(known)


def _fingerprint(task: pb.Task) -> bytes:
    """What is asked, without when: a client may leave that to the master."""
    asked = pb.Task()
    asked.CopyFrom(task)
    asked.ClearField("submitted_at")
    asked.attempt = task.attempt if task.HasField("attempt") else 1
    return asked.SerializeToString(deterministic=True)


def conflict(task: pb.Task, detail: str) -> RequestError:
    return RequestError(
        f"task_id {task.task_id}: {detail}",
        reason="TASK_CONFLICT",
        field="task_id",
        hint="choose another id or attempt",
    )
