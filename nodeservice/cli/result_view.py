"""An attempt's outcome as one JSON object: what `run --json` prints."""

from __future__ import annotations

from dataclasses import asdict

from nodeservice.cli.gpu_json import asked_document, bill_of_record, held_by_record
from nodeservice.core.model import Manifest, Outcome, Reason, TaskRecord
from nodeservice.errors import InvariantError, NodeFaultError, NodeServiceError


def record_as_dict(record: TaskRecord, manifest: Manifest | None) -> dict[str, object]:
    """Durations in seconds, sizes in bytes, instants ISO 8601."""
    verdict, collected = record.verdict, record.collected
    return {
        "task_id": record.id.task_id,
        "attempt": record.id.attempt,
        "outcome": verdict.outcome.value if verdict else None,
        "reason": verdict.reason.value if verdict else None,
        "message": verdict.message if verdict else None,
        "exit_code": verdict.exit_code if verdict else None,
        "image": record.spec.image,
        "image_digest": record.image_digest,
        "request": {
            **asdict(record.spec.request),
            "gpu": asked_document(record.spec.gpu),
            "timeout_seconds": record.spec.timeout_seconds,
        },
        "gpu_uuids": list(record.lease.gpu_uuids),
        "gpu_part": held_by_record(record),
        "limits": {
            **record.limits,
            "timeout_seconds": record.spec.timeout_seconds,
            "grace_seconds": record.spec.grace_seconds,
            "gpu_uuids": list(record.lease.gpu_uuids),
        },
        "usage": {
            **asdict(record.usage),
            "log_bytes": collected.log_bytes if collected else None,
            "result_bytes": collected.total_bytes if collected else None,
            "result_file_count": collected.file_count if collected else None,
            "gpus": bill_of_record(record),
        },
        "phases": [
            {
                "name": timing.name,
                "start": timing.started_at.isoformat(),
                "duration": (timing.ended_at - timing.started_at).total_seconds(),
            }
            for timing in record.timings
            if timing.ended_at is not None
        ],
        "result_location": record.result_location,
        "manifest": _manifest_as_dict(manifest, collected.manifest_sha256) if manifest and collected else None,
        "remarks": list(record.remarks),
        "trace_id": record.trace.trace_id,
    }


def failure_as_dict(*, task_id: str, image: str, error: NodeServiceError) -> dict[str, object]:
    """The same keys for a task that was not accepted, or of which the node itself lost hold."""
    was_refused = not isinstance(error, NodeFaultError | InvariantError)
    outcome = Outcome.REJECTED if was_refused else Outcome.FAILED
    return _untried(task_id, image, outcome=outcome, reason=error.reason, message=str(error), field=error.field)


def interrupted_as_dict(*, task_id: str, image: str) -> dict[str, object]:
    """The same keys for a task that was cancelled before it was accepted."""
    message = "Cancelled by a signal before it was accepted."
    return _untried(task_id, image, outcome=Outcome.CANCELLED, reason=Reason.CANCELLED, message=message)


def _untried(
    task_id: str, image: str, *, outcome: Outcome, reason: str, message: str, field: str | None = None
) -> dict[str, object]:
    return {
        "task_id": task_id,
        "attempt": 1,
        "outcome": outcome.value,
        "reason": str(reason),
        "message": message,
        "field": field,
        "exit_code": None,
        "image": image,
        "image_digest": None,
        "request": {},
        "gpu_uuids": [],
        "gpu_part": None,
        "limits": {},
        "usage": {},
        "phases": [],
        "result_location": None,
        "manifest": None,
        "remarks": [],
        "trace_id": None,
    }


def _manifest_as_dict(manifest: Manifest, sha256: str) -> dict[str, object]:
    return {
        "sha256": sha256,
        "files": [
            {"path": entry.path, "size_bytes": entry.size_bytes, "sha256": entry.sha256} for entry in manifest.files
        ],
        "skipped": list(manifest.skipped),
    }
