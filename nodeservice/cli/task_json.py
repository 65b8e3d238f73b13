"""The master's views as plain objects: what the client commands print with `--json`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from nodeservice.cli.gpu_json import asked_of_task, bill_document, gpus_document, part_document

if TYPE_CHECKING:
    from nodeservice.wire import master_worker_pb2 as pb

Document = dict[str, object]

FINAL_STATES = ("SUCCEEDED", "FAILED", "CANCELLED", "REJECTED")

_USAGE = (
    "memory_peak_bytes",
    "cpu_seconds",
    "cpu_throttled_seconds",
    "pids_peak_count",
    "oom_kill_count",
    "read_bytes",
    "written_bytes",
    "disk_peak_bytes",
    "network_received_bytes",
    "network_sent_bytes",
    "log_bytes",
    "result_bytes",
    "result_file_count",
)


def task_summary(view: pb.TaskView) -> Document:
    """One task in a list. Instants ISO 8601 or null; `outcome` is null while the task has not ended."""
    final = view.state in FINAL_STATES
    result = view.result
    gpu_count, gpu = asked_of_task(view.task)
    # While it runs, its node tells; once it has ended, the result does.
    held = view.running if view.HasField("running") else result
    return {
        "task_id": view.task.task_id,
        "attempt": view.task.attempt or 1,
        "name": view.task.task_name,
        "image": view.task.docker_image,
        "state": view.state,
        "phase": view.phase or None,
        "worker_id": view.worker_id or None,
        "outcome": view.state if final else None,
        "reason": view.reason or None,
        "message": view.message or None,
        "exit_code": result.exit_code if result.HasField("exit_code") else None,
        "submitted_at": _instant_ms(view.submitted_at_unix_ms),
        "assigned_at": _instant_ms(view.assigned_at_unix_ms),
        "finished_at": _instant_ms(view.finished_at_unix_ms),
        "result_location": result.result_location or None,
        "trace_id": result.trace_id or None,
        "gpu_count": gpu_count,
        "gpu": gpu,
        "gpu_uuids": list(held.gpu_uuids),
        "gpu_part": part_document(held.gpu_part) if held.HasField("gpu_part") else None,
    }


def task_document(view: pb.TaskView) -> Document:
    """The whole story of one task, with the keys of `run --json`. Durations in seconds, sizes in bytes."""
    task, result = view.task, view.result
    summary = task_summary(view)
    gpu_count, gpu = summary.pop("gpu_count"), summary.pop("gpu")
    return summary | {
        "command": task.command or None,
        "argv": list(task.argv),
        "env": [variable.name for variable in task.env],
        "request": {
            "cpu_milli": task.cpu_milli if task.HasField("cpu_milli") else round(task.req_cpu * 1000),
            "memory_bytes": task.memory_bytes if task.HasField("memory_bytes") else round(task.req_memory * 1024**3),
            "disk_bytes": task.disk_bytes if task.HasField("disk_bytes") else round(task.req_storage * 1024**3),
            "gpu_count": gpu_count,
            "gpu": gpu,
            "timeout_seconds": task.timeout_seconds if task.HasField("timeout_seconds") else None,
        },
        "image_digest": result.image_digest or None,
        "limits": _limits(result),
        "usage": {
            **{name: getattr(result.usage, name) if result.usage.HasField(name) else None for name in _USAGE},
            "gpus": bill_document(result.usage.gpus),
        },
        "phases": [
            {
                "name": phase.name,
                "start": _instant_ms(phase.started_at_unix_ns // 1_000_000),
                "duration": phase.duration_ns / 1e9,
            }
            for phase in result.phases
        ],
        "output_files": list(result.output_files),
        "manifest": {"sha256": result.manifest_sha256} if result.manifest_sha256 else None,
        "remarks": list(result.remarks),
        "retryable": result.retryable if result.HasField("retryable") else None,
        "attempts": [_attempt_document(attempt) for attempt in view.attempts],
    }


def _attempt_document(view: pb.AttemptView) -> Document:
    """One try. `late_outcome`: what its node told after the attempt had been given up."""
    return {
        "attempt": view.attempt,
        "state": view.state,
        "worker_id": view.worker_id or None,
        "reason": view.reason or None,
        "message": view.message or None,
        "queued_at": _instant_ms(view.queued_at_unix_ms),
        "assigned_at": _instant_ms(view.assigned_at_unix_ms),
        "finished_at": _instant_ms(view.finished_at_unix_ms),
        "exit_code": view.exit_code if view.HasField("exit_code") else None,
        "result_location": view.result_location or None,
        "late_outcome": view.late_outcome or None,
        "late_reason": view.late_reason or None,
    }


def node_document(view: pb.NodeView) -> Document:
    return {
        "worker_id": view.worker_id,
        "address": view.address,
        "version": view.node_version or None,
        "state": view.state,
        "capacity": _amounts(view.capacity),
        "allocatable": _amounts(view.allocatable),
        "assigned": _amounts(view.assigned),
        "last_heartbeat_at": _instant_ms(view.last_heartbeat_unix_ms),
        "cpu_usage_percent": view.cpu_usage_percent,
        "memory_usage_percent": view.memory_usage_percent,
        "storage_usage_percent": view.storage_usage_percent,
        "draining": view.draining,
        "conditions": list(view.conditions),
        "warnings": list(view.warnings),
        "gpus": gpus_document(view.gpus),
        "gpu_driver_version": view.gpu_driver_version or None,
        "cuda_version": view.cuda_version or None,
        "running_tasks": [
            {
                "task_id": task.task_id,
                "attempt": task.attempt or 1,
                "phase": task.phase or task.status,
                "gpu_uuids": list(task.gpu_uuids),
                "gpu_part": part_document(task.gpu_part) if task.HasField("gpu_part") else None,
            }
            for task in view.running_tasks
        ],
    }


def _amounts(message: pb.Resources) -> Document:
    return {
        "cpu_milli": message.cpu_milli,
        "memory_bytes": message.memory_bytes,
        "disk_bytes": message.disk_bytes,
        "gpu_count": message.gpu_count,
    }


def _limits(result: pb.TaskResult) -> object:
    try:
        return json.loads(result.limits_json or "{}")
    except (ValueError, RecursionError):
        return {}


def _instant_ms(unix_ms: int) -> str | None:
    """Nodes can send anything; an instant that no calendar has is shown as none."""
    if unix_ms <= 0:
        return None
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None
