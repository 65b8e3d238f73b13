"""A real OTLP/gRPC receiver on loopback that keeps the spans it gets, for tests and for the demo."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK, Span, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedSpan:
    """One span as it came over the wire. Ids are hex; `parent_span_id` is None for a root; times are Unix nanoseconds."""

    name: str
    trace_id: str
    span_id: str
    parent_span_id: str | None
    start_ns: int
    end_ns: int
    attributes: Mapping[str, object]
    resource: Mapping[str, object]
    kind: str
    """INTERNAL, CONSUMER, …"""
    is_parent_remote: bool
    status: str
    """UNSET, OK or ERROR."""
    status_message: str


SpanPredicate = Callable[[Sequence[ReceivedSpan]], bool]


class OtlpReceiver:
    """Listens from `start` to `stop`; can be started again, then on the same port. Spans are kept over a restart."""

    def __init__(self) -> None:
        self._port = 0
        self._server: grpc.Server | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._spans: list[ReceivedSpan] = []
        self._arrived = threading.Condition()

    @property
    def port(self) -> int:
        """The port in use; 0 before the first start."""
        return self._port

    @property
    def endpoint(self) -> str:
        """For `otlp_endpoint` and OTEL_EXPORTER_OTLP_ENDPOINT: plain text."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def spans(self) -> tuple[ReceivedSpan, ...]:
        """All so far, in the order of arrival."""
        with self._arrived:
            return tuple(self._spans)

    def start(self) -> None:
        """Raises OSError when the port is taken. A receiver that runs is left alone."""
        if self._server is not None:
            return
        threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="otlp-receiver")
        server = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_TraceServiceServicer_to_server(_Servicer(self._take), server)
        try:
            self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        except RuntimeError as error:
            threads.shutdown(wait=False)
            raise OSError(f"port {self._port} cannot be listened on: {error}") from error
        server.start()
        self._server, self._threads = server, threads

    def stop(self) -> None:
        """One that does not run is success."""
        if self._server is not None and self._threads is not None:
            self._server.stop(grace=0.5).wait()
            self._threads.shutdown(wait=True)
            self._server = self._threads = None

    def wait_for(self, wanted: int | SpanPredicate, *, timeout_seconds: float = 10.0) -> tuple[ReceivedSpan, ...]:
        """Block until so many spans came, or until the predicate on all spans holds; return all. Raises TimeoutError."""
        holds: SpanPredicate = (lambda spans: len(spans) >= wanted) if isinstance(wanted, int) else wanted
        with self._arrived:
            if not self._arrived.wait_for(lambda: holds(tuple(self._spans)), timeout_seconds):
                names = [span.name for span in self._spans]
                raise TimeoutError(f"after {timeout_seconds:g} s there are {len(names)} spans: {names[:50]}")
            return tuple(self._spans)

    async def wait_for_async(self, wanted: int | SpanPredicate) -> tuple[ReceivedSpan, ...]:
        """`wait_for` without blocking the event loop."""
        return await asyncio.to_thread(self.wait_for, wanted)

    def __enter__(self) -> OtlpReceiver:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _take(self, spans: Iterable[ReceivedSpan]) -> None:
        with self._arrived:
            self._spans.extend(spans)
            self._arrived.notify_all()


class _Servicer(pb_grpc.TraceServiceServicer):
    def __init__(self, take: Callable[[Iterable[ReceivedSpan]], None]) -> None:
        self._take = take

    def Export(  # noqa: N802
        self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        self._take(
            [
                _received(span, _plain(group.resource.attributes))
                for group in request.resource_spans
                for scope in group.scope_spans
                for span in scope.spans
            ]
        )
        return pb.ExportTraceServiceResponse()


def _received(span: Span, resource: Mapping[str, object]) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex() or None,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_plain(span.attributes),
        resource=resource,
        kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        is_parent_remote=bool(span.flags & SPAN_FLAGS_CONTEXT_IS_REMOTE_MASK),
        status=Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        status_message=span.status.message,
    )


def _plain(pairs: Iterable[KeyValue]) -> dict[str, object]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _plain(value.kvlist_value.values)
    return getattr(value, kind)
