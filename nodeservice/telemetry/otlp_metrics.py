"""Sends metrics to an OTLP/gRPC collector now and then, in the background, and does without when there is none.

How often, for how long and in which form are OpenTelemetry's own variables: OTEL_METRIC_EXPORT_INTERVAL (milliseconds),
OTEL_EXPORTER_OTLP_TIMEOUT, …_METRICS_TEMPORALITY_PREFERENCE, …_METRICS_DEFAULT_HISTOGRAM_AGGREGATION and the like
(opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import structlog
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData, PeriodicExportingMetricReader

import nodeservice
from nodeservice.errors import ConfigError
from nodeservice.telemetry.collector import CLOSE_SECONDS, Outage, is_plain, sender
from nodeservice.telemetry.metrics import Attributes, Instrument, Kind, Reading

log = structlog.get_logger(__name__)

_LOOP_SECONDS = 5.0
"""For the event loop to come round to a reading. One that is busy for so long is told next time."""


class OtlpMetrics:
    """A Metrics with one background thread. All values of one export are of one moment: they are read in one go.

    Nothing here touches OpenTelemetry's global meter.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        insecure: bool,
        worker_id: str,
        instruments: Sequence[Instrument],
        read: Callable[[], Reading],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._read = read
        self._reading: Reading = {}
        self._has_failed = False
        try:
            # Without a word of ours on plain text, OpenTelemetry's variables have theirs.
            exporter = _OutageExporter(endpoint, plain=is_plain(endpoint, insecure=insecure) or None)
            reader = PeriodicExportingMetricReader(exporter)
        except ValueError as error:
            raise ConfigError(
                f"a variable of OpenTelemetry has a value that can't be: {' '.join(str(error).split())}",
                field="OTEL_METRIC_EXPORT_INTERVAL",
                hint="give OTEL_METRIC_EXPORT_INTERVAL in milliseconds, OTEL_EXPORTER_OTLP_TIMEOUT in seconds",
            ) from error
        self._provider = MeterProvider([reader], resource=sender(worker_id), shutdown_on_exit=False)
        meter = self._provider.get_meter("nodeservice", nodeservice.__version__)
        make: dict[Kind, Any] = {
            Kind.GAUGE: meter.create_observable_gauge,
            Kind.LEVEL: meter.create_observable_up_down_counter,
            Kind.COUNTER: meter.create_observable_counter,
        }
        # Callbacks are called in the order in which they were made: the first reads for all.
        meter.create_observable_gauge("nodeservice.reading", [self._take_reading])
        self._histograms = {}
        for name, kind, unit, _, meaning, bounds in instruments:
            if kind is Kind.HISTOGRAM:
                self._histograms[name] = meter.create_histogram(
                    name, unit, meaning, explicit_bucket_boundaries_advisory=bounds
                )
            else:
                make[kind](name, [self._values_of(name)], unit, meaning)

    def record(self, name: str, value: float, attributes: Attributes) -> None:
        self._histograms[name].record(value, attributes)

    async def close(self) -> None:
        """Send the last values, for CLOSE_SECONDS at most. Closing twice is success."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        try:
            # Waits for the thread for so long, then closes the channel, which ends a call that is still under way.
            self._provider.shutdown(timeout_millis=CLOSE_SECONDS * 1000)
        except Exception as error:
            log.debug("metrics.close_failed", error=repr(error))

    def _values_of(self, name: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda _options: [Observation(value, attributes) for value, attributes in self._reading.get(name, ())]

    def _take_reading(self, _options: CallbackOptions) -> Iterable[Observation]:
        """In OpenTelemetry's thread. Observes nothing itself."""
        self._reading = {}
        future: Future[Reading] = Future()
        try:
            self._loop.call_soon_threadsafe(self._read_into, future)
        except RuntimeError:  # the loop has ended
            return ()
        try:
            self._reading = future.result(_LOOP_SECONDS)
            self._has_failed = False
        except Exception as error:  # the loop hangs, or this is a bug of ours
            if not self._has_failed:
                log.warning("metrics.not_read", error=repr(error))
            self._has_failed = True
        return ()

    def _read_into(self, future: Future[Reading]) -> None:
        try:
            future.set_result(self._read())
        except Exception as error:
            future.set_exception(error)


class _OutageExporter(OTLPMetricExporter):
    """Tells of outages, once each."""

    def __init__(self, endpoint: str, *, plain: bool | None) -> None:
        super().__init__(endpoint=endpoint, insecure=plain)
        self._is_over = False
        self._outage = Outage(
            endpoint,
            away="metrics.collector_unreachable",
            back="metrics.collector_back",
            what="export",
            hint="no metrics are there until it is back, or has a pipeline for them",
        )

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> MetricExportResult:
        try:
            result = super().export(metrics_data, timeout_millis, **kwargs)
        except Exception as error:  # a channel closed in mid-call raises ValueError
            log.debug("metrics.export_failed", error=repr(error))
            result = MetricExportResult.FAILURE
        if not self._is_over:
            self._outage.note(1, taken=result is MetricExportResult.SUCCESS)
        return result

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        self._is_over = True
        super().shutdown(timeout_millis, **kwargs)
