"""Where spans go: to an OTLP collector if one is configured, else nowhere.

OpenTelemetry is imported only by `telemetry.otlp`, and that only when there is a collector: a node without one pays nothing.
"""

from __future__ import annotations

import re
import secrets

from nodeservice.core.model import PhaseTiming, TaskRecord, TraceIds
from nodeservice.ports import TraceSink

_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?\Z")
_LONGEST_TRACEPARENT = 512
"""Far more than version 00 needs (55); the header comes from outside."""


class NoTraceSink:
    """A TraceSink that drops everything."""

    def phase_ended(self, record: TaskRecord, timing: PhaseTiming) -> None:
        return None

    def task_ended(self, record: TaskRecord) -> None:
        return None

    async def close(self) -> None:
        return None


def open_trace_sink(endpoint: str | None, *, insecure: bool, worker_id: str) -> TraceSink:
    """`endpoint` is HOST:PORT or a URL of an OTLP/gRPC collector; http:// and https:// win over `insecure`."""
    if endpoint is None:
        return NoTraceSink()
    from nodeservice.telemetry.otlp import OtlpTraceSink

    return OtlpTraceSink(endpoint, insecure=insecure, worker_id=worker_id)


def new_trace_ids(traceparent: str | None) -> TraceIds:
    """The ids of a new attempt: below the caller's span if the header is a valid one, else a trace of its own.

    The header follows W3C Trace Context. A malformed one is ignored as that text demands; a version above 00 is read by
    the fields of 00. A caller that does not sample is respected.
    """
    span_id = secrets.token_hex(8)
    found = _TRACEPARENT.match(traceparent) if traceparent and len(traceparent) <= _LONGEST_TRACEPARENT else None
    if found is not None:
        version, trace_id, parent_span_id, flags, more = found.groups()
        if int(trace_id, 16) and int(parent_span_id, 16) and not (version == "00" and more):
            return TraceIds(
                trace_id=trace_id, span_id=span_id, parent_span_id=parent_span_id, sampled=bool(int(flags, 16) & 1)
            )
    return TraceIds(trace_id=secrets.token_hex(16), span_id=span_id)
