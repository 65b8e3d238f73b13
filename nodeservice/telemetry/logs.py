"""Sets up logging: events with fields, in the journal or one line each on stderr, as JSON or in columns for people."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, Literal, TextIO

import structlog

from nodeservice.telemetry import journald
from nodeservice.telemetry.plain import plain

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure_logging(
    level: str = "info", fmt: Literal["auto", "json", "console"] = "auto", stream: TextIO | None = None
) -> None:
    """Configure the process. Calling it again replaces the earlier set-up. `stream` None is stderr as it is now.

    `auto` is the journal with a field for each of the event's where the stream is the journal, else JSON.

    Warnings of libraries, which use the standard `logging`, come out as events `library.warning` in the same form.
    """
    out = sys.stderr if stream is None else stream
    unfailing = _UnfailingStream(out)
    factory: Any = structlog.WriteLoggerFactory(file=unfailing)  # type: ignore[arg-type]
    into_journal = fmt == "auto" and journald.is_journal(out, os.environ)
    renderer: structlog.typing.Processor
    if into_journal:
        renderer = journald.render
        journal = journald.JournalLogger(unfailing)
        factory = lambda *_: journal  # noqa: E731
    elif fmt != "console":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback, pad_event_to=28
        )
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
    ]
    if not into_journal:  # which notes the time itself
        processors.append(structlog.processors.TimeStamper(fmt="iso", utc=True))
    if fmt == "console":  # JSON escapes by itself
        processors.append(_plain_texts)
    else:
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=factory,
        # Cached loggers would keep the first set-up for ever, also across tests.
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _LibraryHandler)]:
        root.removeHandler(handler)
    root.addHandler(_LibraryHandler(level=logging.WARNING))


def _plain_texts(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {key: plain(value) if isinstance(value, str) else value for key, value in event.items()}


class _UnfailingStream:
    """Passes text on and forgets errors: a full disk or a closed pipe behind stderr must not end a task."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return 0

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return


class _LibraryHandler(logging.Handler):
    """Turns a record of the standard `logging` into an event."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            structlog.get_logger().log(
                record.levelno,
                "library.error" if record.levelno >= logging.ERROR else "library.warning",
                logger=record.name,
                message=record.getMessage(),
                exc_info=record.exc_info,
            )
        except Exception:
            self.handleError(record)
