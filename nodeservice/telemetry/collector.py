"""What spans and metrics share on their way to an OTLP collector: who sends, in plain text or not, how an outage is told."""

from __future__ import annotations

import logging

import structlog
from opentelemetry.sdk.resources import Resource

import nodeservice

log = structlog.get_logger(__name__)

CLOSE_SECONDS = 2.0
"""For what is left at the end, whatever the collector does."""


def sender(worker_id: str) -> Resource:
    """What OTEL_RESOURCE_ATTRIBUTES says is in it too."""
    return Resource.create(
        {
            "service.name": "nodeservice",
            "service.version": nodeservice.__version__,
            "service.instance.id": worker_id,
        }
    )


def is_plain(endpoint: str, *, insecure: bool) -> bool:
    """http:// wins over `insecure`; https:// does so in the exporter itself."""
    return insecure or endpoint.startswith("http://")


class Outage:
    """Says once, by the event `away`, that the collector takes nothing, and by `back` that it does, with what was lost."""

    def __init__(self, endpoint: str, *, away: str, back: str, what: str, hint: str) -> None:
        # OpenTelemetry's own messages repeat with every batch.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._endpoint = endpoint
        self._away = away
        self._back = back
        self._what = what
        self._hint = hint
        self._lost_count = 0

    def note(self, count: int, *, taken: bool) -> None:
        """So many were sent."""
        if taken:
            if self._lost_count:
                log.info(self._back, endpoint=self._endpoint, **{f"lost_{self._what}_count": self._lost_count})
            self._lost_count = 0
            return
        if not self._lost_count:
            log.warning(self._away, endpoint=self._endpoint, hint=self._hint)
        self._lost_count += count
