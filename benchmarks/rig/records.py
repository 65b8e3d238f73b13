"""Journal records as a node writes them, of tasks that never ran."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from nodeservice.core.model import (
    MIB,
    AttemptId,
    Collected,
    Lease,
    Outcome,
    Phase,
    PhaseTiming,
    Reason,
    Resources,
    TaskRecord,
    TaskSpec,
    Usage,
    Verdict,
)
from nodeservice.telemetry.tracing import new_trace_ids

_PHASES = ("pull", "create", "start", "run", "collect", "upload")


def record(task_id: str) -> TaskRecord:
    """Of a task that waits for its report to be delivered: nearly as long as a record gets."""
    now = datetime.now(UTC)
    request = Resources(cpu_milli=10, memory_bytes=16 * MIB, disk_bytes=1 * MIB)
    spec = TaskSpec(
        id=AttemptId(task_id), image="nodeservice/demo", command="echo done; echo result > /results/out.txt",
        request=request, pids_limit=64, fingerprint="0" * 64, grace_seconds=1.0,
    )  # fmt: skip
    limits = {"asked": {"cpu_milli": 10, "memory_bytes": 16 * MIB, "pids_limit": 64}, "effective": {"cpu_milli": 10}}
    return TaskRecord(
        spec=spec,
        lease=Lease(granted=request),
        trace=new_trace_ids(None),
        accepted_at=now,
        phase=Phase.REPORTING,
        timings=(
            *(PhaseTiming(name=name, started_at=now, ended_at=now) for name in _PHASES),
            PhaseTiming(name="report", started_at=now),
        ),
        verdict=Verdict(outcome=Outcome.SUCCEEDED, reason=Reason.COMPLETED, message="", exit_code=0),
        image_digest="sha256:" + "0" * 64,
        container_id="0" * 64,
        started_at=now,
        limits=limits,
        usage=Usage(memory_peak_bytes=2 * MIB, cpu_seconds=0.1),
        collected=Collected(
            manifest_sha256="0" * 64, file_count=2, total_bytes=20, log_bytes=5, log_tail="done\n",
            paths=("out.txt", "stdout.log"),
        ),
        result_location=f"s3://benchmark/{task_id}/1",
        compute_released=True,
    )  # fmt: skip


def finished(task_id: str) -> TaskRecord:
    return replace(record(task_id), phase=Phase.FINISHED, disk_released=True, reported=True)
