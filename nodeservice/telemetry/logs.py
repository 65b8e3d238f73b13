"""Sets up logging: events with fields, in the journal or one line each on stderr, as JSON or in columns for people."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
from contextlib import suppress
from typing import Any, Literal, TextIO

import structlog

from nodeservice.telemetry import journald
from nodeservice.telemetry.plain import plain

_PIECE_CHARS = 1024
"""In UTF-8 no more than a page, which a pipe takes at once when poll(2) says that it takes something."""
_PATIENCE_MILLISECONDS = 200

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
    processors: list[structlog.typing.Processor] = [structlog.processors.add_log_level]
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
    """Passes text on, forgets errors and never waits for long.

    A full disk or a closed pipe behind stderr must not end a task. Nor may one that nobody empties (a journald that hangs, a
    pager) stop the daemon, which keeps limits: what it does not take is lost, and counted.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._descriptor: int | None = None
        with suppress(OSError, ValueError):  # no file at all
            self._descriptor = stream.fileno()
        self._lost_count = 0
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock, suppress(OSError, ValueError):
            if self._lost_count and self._takes_more():
                count, self._lost_count = self._lost_count, 0
                # Not by structlog, which calls us and takes no call meanwhile. The first that was lost may have begun.
                told = json.dumps({"count": count, "event": "log.lost", "level": "warning"})
                self._stream.write(f"\n{told}\n")
            for begin in range(0, len(text), _PIECE_CHARS):
                if not self._takes_more():
                    self._lost_count += 1
                    break
                self._stream.write(text[begin : begin + _PIECE_CHARS])
                self._stream.flush()
        return len(text)

    def _takes_more(self) -> bool:
        """A piece, without blocking. Of the first that finds no room some time is waited, for a reader that is only slow."""
        if self._descriptor is None:
            return True
        poll = select.poll()  # of its own: threads may write at the same time
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(0 if self._lost_count else _PATIENCE_MILLISECONDS))

    def flush(self) -> None:
        """Called by structlog. Nothing is left: each piece is flushed when it is written."""


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
