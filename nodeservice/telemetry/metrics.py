"""Where metrics go: to an OTLP collector if one is configured, else nowhere.

OpenTelemetry is imported only by `telemetry.otlp_metrics`, and that only when there is a collector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

Attributes = Mapping[str, str]
Reading = Mapping[str, Sequence[tuple[float, Attributes]]]
"""By an instrument's name, its values now. One that has none is left out: what is not known is not told."""


class Kind(StrEnum):
    """As OpenTelemetry calls them."""

    GAUGE = "gauge"
    """A level of which sums mean nothing."""
    LEVEL = "updowncounter"
    """A level of which sums over nodes mean something."""
    COUNTER = "counter"
    """The sum since this process began."""
    HISTOGRAM = "histogram"
    """Each value is recorded as it comes; no part of a reading."""


class Instrument(NamedTuple):
    """`unit` is one of UCUM; `attributes` are those that each of its values has; `bounds` are those of a histogram."""

    name: str
    kind: Kind
    unit: str
    attributes: tuple[str, ...]
    meaning: str
    bounds: tuple[float, ...] = ()


class Metrics(Protocol):
    def record(self, name: str, value: float, attributes: Attributes) -> None:
        """Into a histogram. Never blocks, never raises."""
        ...

    async def close(self) -> None:
        """Send what is left, within a bound of seconds."""
        ...


def open_metrics(
    endpoint: str | None,
    *,
    insecure: bool,
    worker_id: str,
    instruments: Sequence[Instrument],
    read: Callable[[], Reading],
) -> Metrics | None:
    """None without an endpoint, which is given as for `open_trace_sink`. Call it in the event loop.

    `read` is called there too, each time that metrics are sent: so often, and in whatever other way, as OpenTelemetry's own
    variables say. Raises ConfigError for those that can't be.
    """
    if endpoint is None:
        return None
    from nodeservice.telemetry.otlp_metrics import OtlpMetrics

    return OtlpMetrics(endpoint, insecure=insecure, worker_id=worker_id, instruments=instruments, read=read)
