"""Translates between the wire and the core. What comes from the wire is hostile until it has passed here.

Old fields count CPU in cores and memory and storage in GiB; the extension fields are exact and win.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from nodeservice.core.gpus import GpuUnit
from nodeservice.core.model import (
    DEFAULT_OPEN_FILES,
    GIB,
    AttemptId,
    Outcome,
    Phase,
    PullPolicy,
    Resources,
    TaskRecord,
    TaskSpec,
)
from nodeservice.core.verdict import is_retryable
from nodeservice.errors import invalid_request
from nodeservice.rpc.convert_gpu import gpu_part, gpu_request, gpu_usage, gpus_allocated
from nodeservice.wire import master_worker_pb2 as pb

_MAX_AMOUNT = 2**60
_ROUNDING = 0.01
_OLD_STATUS = {Outcome.SUCCEEDED: "success", Outcome.FAILED: "failed", Outcome.CANCELLED: "cancelled"}
_LOG_STATUS = {Outcome.SUCCEEDED: "completed", Outcome.FAILED: "failed", Outcome.CANCELLED: "cancelled"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDefaults:
    """What a task gets that asks for nothing in particular (0 in an old field)."""

    request: Resources
    pids_limit: int
    timeout_seconds: float | None
    grace_seconds: float


# ---- from the wire ----------------------------------------------------------------------------------------------------


def spec_from_task(task: pb.Task, defaults: TaskDefaults) -> TaskSpec:
    """Normalise a Task. Raises RequestError naming the field; `core.admission` checks the rest."""
    gpu_count, gpu = gpu_request(task)
    request = Resources(
        cpu_milli=_amount(task, "req_cpu", 1000, "cpu_milli", defaults.request.cpu_milli),
        memory_bytes=_amount(task, "req_memory", GIB, "memory_bytes", defaults.request.memory_bytes),
        disk_bytes=_amount(task, "req_storage", GIB, "disk_bytes", defaults.request.disk_bytes),
        gpu_count=gpu_count,
    )
    return TaskSpec(
        id=AttemptId(task.task_id, task.attempt if task.HasField("attempt") else 1),
        image=task.docker_image,
        command=task.command or None,
        argv=tuple(task.argv),
        env=tuple((variable.name, variable.value) for variable in task.env),
        request=request,
        gpu=gpu,
        pids_limit=task.pids_limit if task.HasField("pids_limit") else defaults.pids_limit,
        timeout_seconds=_timeout(task, defaults),
        grace_seconds=_finite("grace_seconds", task.grace_seconds)
        if task.HasField("grace_seconds")
        else defaults.grace_seconds,
        stop_signal=task.stop_signal or "SIGTERM",
        wait_timeout_seconds=_limit(task, "wait_timeout_seconds"),
        pull_timeout_seconds=_limit(task, "pull_timeout_seconds"),
        total_timeout_seconds=_limit(task, "total_timeout_seconds"),
        disconnect_limit_seconds=_limit(task, "disconnect_limit_seconds"),
        exclusive_cpus=task.exclusive_cpus,
        open_files_limit=task.open_files_limit if task.HasField("open_files_limit") else DEFAULT_OPEN_FILES,
        open_files_asked=task.HasField("open_files_limit"),
        read_bytes_per_second=_exact(task, "read_bytes_per_second") or None,
        write_bytes_per_second=_exact(task, "write_bytes_per_second") or None,
        pull_policy=_pull_policy(task),
        user_id=task.user_id,
        task_name=task.task_name,
        task_type=task.task_type,
        sla_multiplier=_finite("sla_multiplier", task.sla_multiplier),
        submitted_at_unix=task.submitted_at,
        fingerprint=fingerprint(task),
    )


def fingerprint(task: pb.Task) -> str:
    """Digest of what is asked, without when it was submitted and to whom: a master may send those anew."""
    asked = pb.Task()
    asked.CopyFrom(task)
    asked.ClearField("submitted_at")
    asked.ClearField("target_worker_id")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()


def _exact(task: pb.Task, field: str) -> int | None:
    return int(getattr(task, field)) if task.HasField(field) else None


def _amount(task: pb.Task, field: str, unit: int, exact_field: str, default: int) -> int:
    """The exact amount; the old field's, converted; or the default for 0."""
    value, exact = _finite(field, getattr(task, field)), _exact(task, exact_field)
    for name, told, amount in ((field, value, value * unit), (exact_field, exact or 0, exact or 0)):
        if amount < 0:
            raise invalid_request(name, f"is {told!r}", "ask for zero or more")
        if amount > _MAX_AMOUNT:
            raise invalid_request(name, f"is {told!r}", "ask for an amount that a machine can have")
    if exact is None:
        return round(value * unit) if value else default
    if value and abs(value * unit - exact) > _ROUNDING * max(value * unit, exact):
        raise invalid_request(
            field, f"is {value!r}", f"it disagrees with the exact field, which says {exact}; send one, or the same"
        )
    return exact


def _timeout(task: pb.Task, defaults: TaskDefaults) -> float | None:
    if not task.HasField("timeout_seconds"):
        return defaults.timeout_seconds
    return _limit(task, "timeout_seconds")


def _limit(task: pb.Task, field: str) -> float | None:
    """0, and nothing, mean no limit."""
    return _finite(field, getattr(task, field)) or None


def _pull_policy(task: pb.Task) -> PullPolicy:
    text = task.pull_policy if task.HasField("pull_policy") and task.pull_policy else PullPolicy.IF_NOT_PRESENT
    try:
        return PullPolicy(text)
    except ValueError as error:
        raise invalid_request("pull_policy", f"is {text[:40]!r}", "use always, if-not-present or never") from error


def _finite(field: str, value: float) -> float:
    if not math.isfinite(value):
        raise invalid_request(field, f"is {value!r}", "use a finite number")
    return value


# ---- to the wire ------------------------------------------------------------------------------------------------------


def resources(amount: Resources) -> pb.Resources:
    return pb.Resources(
        cpu_milli=amount.cpu_milli,
        memory_bytes=amount.memory_bytes,
        disk_bytes=amount.disk_bytes,
        gpu_count=amount.gpu_count,
    )


def running_task(record: TaskRecord, units: Iterable[GpuUnit] = ()) -> pb.RunningTask:
    """`units` are the GPUs of this node, for the size of a part of one."""
    held = Resources() if record.compute_released else record.lease.granted
    return pb.RunningTask(
        task_id=record.id.task_id,
        cpu_allocated=held.cpu_milli / 1000,
        memory_allocated=held.memory_bytes / GIB,
        status="stuck" if record.stuck else record.phase.name.lower(),
        gpu_allocated=0.0 if record.compute_released else gpus_allocated(record.lease, units),
        gpu_uuids=() if record.compute_released else record.lease.gpu_uuids,
        gpu_part=None if record.compute_released else gpu_part(record.lease),
        attempt=record.id.attempt,
        phase=record.phase.name,
        phase_started_at_unix_ms=round(record.timings[-1].started_at.timestamp() * 1000),
        compute_released=record.compute_released,
    )


def log_status(record: TaskRecord) -> str | None:
    """The status of a log's last chunk; None while the end may still change (the results are not stored yet)."""
    if record.verdict is None or record.phase < Phase.REPORTING:
        return None
    return _LOG_STATUS[record.verdict.outcome]


def task_result(record: TaskRecord, worker_id: str) -> pb.TaskResult:
    """The report on an attempt that has reached REPORTING."""
    verdict, collected = record.verdict, record.collected
    if verdict is None:
        raise ValueError(f"{record.id} has no verdict to report")
    result = pb.TaskResult(
        task_id=record.id.task_id,
        worker_id=worker_id,
        status=_OLD_STATUS[verdict.outcome],
        logs=collected.log_tail if collected else "",
        result_location=record.result_location or "",
        output_files=list(collected.paths) if collected else [],
        attempt=record.id.attempt,
        outcome=verdict.outcome.value,
        reason=verdict.reason.value,
        message=verdict.message,
        trace_id=record.trace.trace_id,
        phases=[
            pb.PhaseTiming(
                name=timing.name,
                started_at_unix_ns=_unix_ns(timing.started_at),
                duration_ns=_unix_ns(timing.ended_at) - _unix_ns(timing.started_at),
            )
            for timing in record.timings
            if timing.ended_at is not None
        ],
        limits_json=json.dumps(record.limits, sort_keys=True),
        usage=_usage(record),
        remarks=list(record.remarks),
        gpu_uuids=list(record.lease.gpu_uuids),
        gpu_part=gpu_part(record.lease),
        retryable=is_retryable(verdict.reason),
    )
    if verdict.exit_code is not None:
        result.exit_code = verdict.exit_code
    if record.image_digest is not None:
        result.image_digest = record.image_digest
    if collected is not None:
        result.manifest_sha256 = collected.manifest_sha256
    return result


def _usage(record: TaskRecord) -> pb.Usage:
    usage = pb.Usage()
    for field in dataclasses.fields(record.usage):
        value = getattr(record.usage, field.name)
        if value is not None and field.name != "gpus":
            setattr(usage, field.name, value)
    usage.gpus.extend(gpu_usage(used) for used in record.usage.gpus)
    if record.collected is not None:
        usage.log_bytes = record.collected.log_bytes
        usage.result_bytes = record.collected.total_bytes
        usage.result_file_count = record.collected.file_count
    return usage


def _unix_ns(instant: datetime) -> int:
    """Exact for microseconds, unlike a float."""
    whole = instant.replace(microsecond=0)
    return int(whole.timestamp()) * 1_000_000_000 + instant.microsecond * 1000
