"""How an attempt went, for people who read logs."""

from __future__ import annotations

from collections.abc import Iterable

from nodeservice.core.model import PhaseTiming, TaskRecord


def summary(record: TaskRecord) -> dict[str, object]:
    """The one canonical log line of a finished attempt."""
    verdict, collected = record.verdict, record.collected
    return {
        "task_id": record.id.task_id,
        "attempt": record.id.attempt,
        "outcome": verdict.outcome.value if verdict else None,
        "reason": verdict.reason.value if verdict else None,
        "exit_code": verdict.exit_code if verdict else None,
        "seconds": durations(record.timings),
        "memory_peak_bytes": record.usage.memory_peak_bytes,
        "gpu_uuids": list(record.lease.gpu_uuids),
        "stored_bytes": collected.total_bytes if collected else 0,
        "result_location": record.result_location,
        "trace_id": record.trace.trace_id,
    }


def durations(timings: Iterable[PhaseTiming]) -> dict[str, float]:
    return {
        timing.name: round((timing.ended_at - timing.started_at).total_seconds(), 4)
        for timing in timings
        if timing.ended_at is not None
    }
