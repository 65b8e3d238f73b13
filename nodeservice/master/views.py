"""What clients are shown of tasks and nodes."""

from __future__ import annotations

import math

from nodeservice.master.amounts import Amounts, to_message
from nodeservice.master.nodes import Node
from nodeservice.master.reports import outcome_of
from nodeservice.master.rows import TaskRow
from nodeservice.wire import master_worker_pb2 as pb

_BRIEF_MAX_BYTES = 64 * 1024
"""Of one result in a list. A node can send 4 MiB; a thousand of those no client would take."""


def task_view(row: TaskRow, *, running: pb.RunningTask | None = None, brief: bool = False) -> pb.TaskView:
    """`running` is the attempt as its node listed it last. `brief` leaves out what makes a list of many tasks large.

    Values of the environment are never shown.
    """
    task = pb.Task()
    task.CopyFrom(row.task)
    task.attempt = row.attempt
    for variable in task.env:
        variable.value = ""
    view = pb.TaskView(
        task=task,
        state=row.state.value,
        worker_id=row.worker_id,
        phase=row.phase,
        message=row.message,
        reason=row.reason,
        running=running,
        submitted_at_unix_ms=row.submitted_at_ms,
        assigned_at_unix_ms=row.assigned_at_ms,
        finished_at_unix_ms=row.finished_at_ms,
    )
    if row.cancel_requested and not row.state.is_final:
        view.reason, view.message = "CANCELLING", view.message or "cancellation requested"
    if row.result is not None:
        view.result.CopyFrom(row.result)
    if brief:
        for field in ("logs", "output_files", "limits_json", "remarks"):
            view.result.ClearField(field)
        if row.result is None:
            view.ClearField("result")
        elif view.result.ByteSize() > _BRIEF_MAX_BYTES:
            exit_code = row.result.exit_code if row.result.HasField("exit_code") else None
            view.result.CopyFrom(pb.TaskResult(exit_code=exit_code))
        for field in ("env", "argv", "command"):
            view.task.ClearField(field)
    return view


def attempt_view(row: TaskRow) -> pb.AttemptView:
    """One line of a task's story."""
    view = pb.AttemptView(
        attempt=row.attempt,
        state=row.state.value,
        worker_id=row.worker_id,
        reason=row.reason,
        message=row.message,
        queued_at_unix_ms=row.queued_at_ms,
        assigned_at_unix_ms=row.assigned_at_ms,
        finished_at_unix_ms=row.finished_at_ms,
    )
    told = row.result if row.result is not None else row.late_result
    if told is not None:
        view.result_location = told.result_location
        if told.HasField("exit_code"):
            view.exit_code = told.exit_code
    if row.late_result is not None:
        state, reason, _ = outcome_of(row.late_result)
        view.late_outcome, view.late_reason = state.value, reason
    return view


def node_view(node: Node, active: bool, assigned: Amounts) -> pb.NodeView:
    beat = node.heartbeat
    return pb.NodeView(
        worker_id=node.worker_id,
        address=node.address,
        state="ACTIVE" if active else "INACTIVE",
        capacity=to_message(node.capacity),
        allocatable=to_message(node.allocatable),
        assigned=to_message(assigned),
        last_heartbeat_unix_ms=node.heard_at_ms,
        cpu_usage_percent=_percent(beat.cpu_usage),
        memory_usage_percent=_percent(beat.memory_usage),
        storage_usage_percent=_percent(beat.storage_usage),
        gpus=node.gpus,
        running_tasks=beat.running_tasks,
        conditions=beat.conditions,
        warnings=node.warnings,
        draining=beat.draining,
        gpu_driver_version=node.info.gpu_driver_version,
        cuda_version=node.info.cuda_version,
        node_version=node.info.node_version,
    )


def _percent(value: float) -> float:
    """Nodes can send anything; what is shown is a number."""
    return min(100.0, max(0.0, value)) if math.isfinite(value) else 0.0
