"""A real OTLP/gRPC receiver on loopback that keeps the spans and metrics it gets, for tests and for the demo."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_pb_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric, NumberDataPoint
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedPoint:
    """One value of a metric as it came over the wire."""

    name: str
    kind: str
    """gauge, counter, updowncounter or histogram."""
    unit: str
    value: float
    """Of a histogram the sum."""
    count: int
    """How many values a histogram holds; 1 for all else."""
    bounds: tuple[float, ...] = ()
    """Between the buckets of a histogram."""
    attributes: Mapping[str, object]
    resource: Mapping[str, object]


class ReceivedExport(tuple[ReceivedPoint, ...]):
    """What came in one call."""

    __slots__ = ()

    def of(self, name: str, *values: object) -> list[ReceivedPoint]:
        """The points of a metric that have these among the values of their attributes."""
        return [point for point in self if point.name == name and {*values} <= {*point.attributes.values()}]

    def value(self, name: str, *values: object) -> float | None:
        """Of the only such point; None where there is none."""
        points = self.of(name, *values)
        assert len(points) < 2, points
        return points[0].value if points else None


SpanPredicate = Callable[[Sequence[ReceivedSpan]], bool]


class OtlpReceiver:
    """Listens from `start` to `stop`; can be started again, then on the same port. What came is kept over a restart.

    While `takes_metrics` is False it answers them as a collector does that has no pipeline for them.
    """

    def __init__(self) -> None:
        self.takes_metrics = True
        self.refused_export_count = 0
        self._exports: list[ReceivedExport] = []
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

    @property
    def exports(self) -> tuple[ReceivedExport, ...]:
        """Of metrics, all so far, in the order of arrival."""
        with self._arrived:
            return tuple(self._exports)

    def start(self) -> None:
        """Raises OSError when the port is taken. A receiver that runs is left alone."""
        if self._server is not None:
            return
        threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="otlp-receiver")
        server = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_TraceServiceServicer_to_server(_Servicer(self._take), server)
        metrics_pb_grpc.add_MetricsServiceServicer_to_server(_MetricsServicer(self._take_export), server)
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

    def wait_for_metrics(
        self, holds: Callable[[ReceivedExport], bool], *, timeout_seconds: float = 10.0
    ) -> ReceivedExport:
        """Block until the predicate holds on the last export; return that. Raises TimeoutError."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: bool(self._exports) and holds(self._exports[-1]), timeout_seconds):
                last = "\n".join(map(str, self._exports[-1] if self._exports else ()))
                raise TimeoutError(
                    f"after {timeout_seconds:g} s there are {len(self._exports)} exports, the last:\n{last}"
                )
            return self._exports[-1]

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

    def _take_export(self, export: ReceivedExport) -> bool:
        """Whether it did."""
        with self._arrived:
            if not self.takes_metrics:
                self.refused_export_count += 1
                return False
            self._exports.append(export)
            self._arrived.notify_all()
            return True


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


class _MetricsServicer(metrics_pb_grpc.MetricsServiceServicer):
    def __init__(self, take: Callable[[ReceivedExport], bool]) -> None:
        self._take = take

    def Export(  # noqa: N802
        self, request: metrics_pb.ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> metrics_pb.ExportMetricsServiceResponse:
        export = ReceivedExport(
            point
            for group in request.resource_metrics
            for scope in group.scope_metrics
            for metric in scope.metrics
            for point in _points(metric, _plain(group.resource.attributes))
        )
        if not self._take(export):
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "unknown service MetricsService")
        return metrics_pb.ExportMetricsServiceResponse()


def _points(metric: Metric, resource: Mapping[str, object]) -> Iterable[ReceivedPoint]:
    data = metric.WhichOneof("data")
    kind = {"gauge": "gauge", "sum": "counter" if metric.sum.is_monotonic else "updowncounter"}.get(data or "")
    for point in metric.histogram.data_points:
        yield ReceivedPoint(
            name=metric.name,
            kind="histogram",
            unit=metric.unit,
            value=point.sum,
            count=point.count,
            bounds=tuple(point.explicit_bounds),
            attributes=_plain(point.attributes),
            resource=resource,
        )
    for number in (*metric.gauge.data_points, *metric.sum.data_points):
        yield ReceivedPoint(
            name=metric.name,
            kind=kind or "",
            unit=metric.unit,
            value=_number(number),
            count=1,
            attributes=_plain(number.attributes),
            resource=resource,
        )


def _number(point: NumberDataPoint) -> float:
    return point.as_int if point.WhichOneof("value") == "as_int" else point.as_double


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
