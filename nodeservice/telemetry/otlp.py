"""Sends one trace per task to an OTLP/gRPC collector, in the background, and does without when there is none.

Spans are made after the fact, from the journalled timings. All ids follow from the record, so a span that is sent again
after a crash is the same span.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import structlog
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

import nodeservice
from nodeservice.core.model import Outcome, PhaseTiming, Reason, TaskRecord
from nodeservice.telemetry.collector import CLOSE_SECONDS, Outage, is_plain, sender

log = structlog.get_logger(__name__)

Attributes = dict[str, str | int | float | bool | Sequence[str]]

EXPORT_TIMEOUT_SECONDS = 3.0
_QUEUE_LENGTH = 4096
_BATCH_LENGTH = 512
_DELAY_SECONDS = 1.0
_LONGEST_TEXT = 1000
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PHASE_OF_REASON = {Reason.COLLECT_FAILED: "collect", Reason.RESULTS_NOT_STORED: "upload"}


class OtlpTraceSink:
    """A TraceSink over a bounded queue and one background thread. When the queue is full, the oldest spans go.

    A task whose caller does not sample leaves no spans. Nothing here touches OpenTelemetry's global tracer.
    """

    def __init__(self, endpoint: str, *, insecure: bool, worker_id: str) -> None:
        plain = is_plain(endpoint, insecure=insecure)
        self._exporter = _OutageExporter(
            OTLPSpanExporter(endpoint=endpoint, insecure=plain, timeout=EXPORT_TIMEOUT_SECONDS), endpoint
        )
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=_QUEUE_LENGTH,
            max_export_batch_size=_BATCH_LENGTH,
            schedule_delay_millis=_DELAY_SECONDS * 1000,
        )
        self._resource = sender(worker_id)
        self._scope = InstrumentationScope("nodeservice", nodeservice.__version__)
        self._worker_id = worker_id

    def phase_ended(self, record: TaskRecord, timing: PhaseTiming) -> None:
        """One span `task.<phase>` below the root. Said again, it is the same span."""
        try:
            attributes = self._identity(record)
            attributes["nodeservice.phase"] = timing.name
            self._send(
                record,
                name=f"task.{timing.name}",
                span_id=_phase_span_id(record, timing.name),
                parent_span_id=record.trace.span_id,
                started_at=timing.started_at,
                ended_at=timing.ended_at or timing.started_at,
                attributes=attributes,
                failed=timing.name == _failed_phase(record),
            )
        except Exception as error:
            log.warning("trace.span_lost", task_id=record.id.task_id, phase=timing.name, error=repr(error))

    def task_ended(self, record: TaskRecord) -> None:
        """The root span `task`, over everything from admission to clean-up."""
        try:
            self._send(
                record,
                name="task",
                span_id=record.trace.span_id,
                parent_span_id=record.trace.parent_span_id,
                started_at=min(timing.started_at for timing in record.timings),
                ended_at=max(timing.ended_at or timing.started_at for timing in record.timings),
                attributes=self._identity(record) | _story(record),
                failed=_is_failure(record),
            )
        except Exception as error:
            log.warning("trace.span_lost", task_id=record.id.task_id, phase="task", error=repr(error))

    async def close(self) -> None:
        """Send what is left, for CLOSE_SECONDS and a little more at most. Closing twice is success."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        # The processor's own shutdown waits up to 30 s for a collector that does not answer.
        flush = threading.Thread(target=self._processor.shutdown, name="nodeservice-trace-flush", daemon=True)
        flush.start()
        flush.join(CLOSE_SECONDS)
        # Closes the channel, which ends a call that is still under way.
        self._exporter.shutdown()
        flush.join(0.5)

    def _send(
        self,
        record: TaskRecord,
        *,
        name: str,
        span_id: str,
        parent_span_id: str | None,
        started_at: datetime,
        ended_at: datetime,
        attributes: Attributes,
        failed: bool,
    ) -> None:
        if not record.trace.sampled:
            return
        trace_id, is_root = int(record.trace.trace_id, 16), name == "task"
        parent = None
        if parent_span_id is not None:
            parent = SpanContext(trace_id, int(parent_span_id, 16), is_remote=is_root, trace_flags=_SAMPLED)
        status = Status(StatusCode.UNSET)
        if failed and record.verdict is not None:
            text = f"{record.verdict.reason}: {record.verdict.message}"[:_LONGEST_TEXT]
            status = Status(StatusCode.ERROR, text)
        # A tracer would begin it now and choose its id; this one has been, and its id follows from the record.
        self._processor.on_end(
            ReadableSpan(
                name,
                context=SpanContext(trace_id, int(span_id, 16), is_remote=False, trace_flags=_SAMPLED),
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                kind=SpanKind.CONSUMER if is_root else SpanKind.INTERNAL,
                status=status,
                start_time=_nanoseconds(started_at),
                end_time=_nanoseconds(ended_at),
                instrumentation_scope=self._scope,
            )
        )

    def _identity(self, record: TaskRecord) -> Attributes:
        return {
            "nodeservice.task_id": record.id.task_id,
            "nodeservice.attempt": record.id.attempt,
            "nodeservice.worker_id": self._worker_id,
        }


class _OutageExporter(SpanExporter):
    """Tells of outages, once each."""

    def __init__(self, inner: SpanExporter, endpoint: str) -> None:
        self._inner = inner
        self._endpoint = endpoint
        self._outage = Outage(
            endpoint,
            away="trace.collector_unreachable",
            back="trace.collector_back",
            what="span",
            hint="spans are dropped until it is back",
        )

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._inner.export(spans)
        except Exception as error:  # a channel closed in mid-call raises ValueError
            log.debug("trace.export_failed", endpoint=self._endpoint, error=repr(error))
            result = SpanExportResult.FAILURE
        self._outage.note(len(spans), taken=result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()


def _story(record: TaskRecord) -> Attributes:
    request, verdict = record.spec.request, record.verdict
    known: dict[str, str | int | float | Sequence[str] | None] = {
        "container.image.name": record.spec.image,
        "nodeservice.image_digest": record.image_digest,
        "nodeservice.limit.cpu_milli": request.cpu_milli,
        "nodeservice.limit.memory_bytes": request.memory_bytes,
        "nodeservice.limit.disk_bytes": request.disk_bytes,
        "nodeservice.limit.gpu_count": request.gpu_count,
        "nodeservice.limit.pids": record.spec.pids_limit,
        "nodeservice.limit.timeout_seconds": record.spec.timeout_seconds,
        "nodeservice.gpu_uuids": record.lease.gpu_uuids or None,
        "nodeservice.usage.memory_peak_bytes": record.usage.memory_peak_bytes,
        "nodeservice.usage.cpu_seconds": record.usage.cpu_seconds,
        "nodeservice.result_location": record.result_location,
    }
    if verdict is not None:
        known |= {
            "nodeservice.outcome": verdict.outcome.value,
            "nodeservice.reason": verdict.reason.value,
            "nodeservice.message": verdict.message[:_LONGEST_TEXT],
            "nodeservice.exit_code": verdict.exit_code,
        }
    return {name: value for name, value in known.items() if value is not None}


def _is_failure(record: TaskRecord) -> bool:
    """A task that was cancelled ended as it was asked to, which is no error."""
    return record.verdict is not None and record.verdict.outcome is Outcome.FAILED


def _failed_phase(record: TaskRecord) -> str | None:
    """The phase to blame. A failure before collecting jumps there, so it lies in the phase that came right before."""
    if record.verdict is None or not _is_failure(record):
        return None
    if phase := _PHASE_OF_REASON.get(record.verdict.reason):
        return phase
    names = [timing.name for timing in record.timings]
    return names[names.index("collect") - 1]


def _phase_span_id(record: TaskRecord, name: str) -> str:
    # The root span is part of it, since two attempts can share the caller's trace.
    story = f"{record.trace.trace_id}/{record.trace.span_id}/{name}"
    return hashlib.sha256(story.encode()).hexdigest()[:16]


def _nanoseconds(instant: datetime) -> int:
    return (instant - _EPOCH) // timedelta(microseconds=1) * 1000
