"""What `run` shows while it goes: the log, a line for each phase, the verdict."""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, BinaryIO

from nodeservice.cli.streams import to_nowhere
from nodeservice.telemetry.plain import plain

if TYPE_CHECKING:
    from nodeservice.core.model import TaskRecord


class RunView:
    """Phases and words go to stderr; the log to stdout, or to stderr where stdout is for JSON."""

    def __init__(self, *, log_to_stderr: bool) -> None:
        self._log = sys.stderr.buffer if log_to_stderr else sys.stdout.buffer
        self._shown = 0
        self._percent = -1
        self.closed = False
        """Whether the output takes nothing any more: somebody closed it, as `head` does, or its disk is full."""

    def say(self, text: str) -> None:
        """A line for a person. That nobody reads it any more is no reason to stop."""
        try:
            sys.stderr.write(f"nodeservice: {plain(text)}\n")
            sys.stderr.flush()
        except OSError:
            to_nowhere(sys.stderr.fileno())

    def put(self, line: str) -> None:
        """A line on stdout."""
        self._write(sys.stdout.buffer, f"{line}\n".encode())

    def changed(self, record: TaskRecord) -> None:
        """One line for each phase as it ends."""
        ended = [timing for timing in record.timings if timing.ended_at is not None]
        for timing in ended[self._shown :]:
            seconds = (timing.ended_at - timing.started_at).total_seconds() if timing.ended_at else 0.0
            self.say(f"{timing.name:<9} {seconds:8.3f} s")
        self._shown = len(ended)

    def pulling(self, done: int, total: int) -> None:
        percent = 100 * done // total if total else 0
        if percent // 10 != self._percent // 10:
            self._percent = percent
            self.say(f"pull      {percent:3d} % of {total / 1e6:.1f} MB")

    def log(self, block: bytes) -> None:
        self._write(self._log, block)
        if self.closed:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def verdict(self, record: TaskRecord) -> None:
        verdict = record.verdict
        if verdict is not None:
            self.say(f"{verdict.outcome} ({verdict.reason}): {verdict.message}")
        from nodeservice.cli.gpu_json import bill_of_record
        from nodeservice.cli.gpu_tables import bill_words
        from nodeservice.cli.receipt_view import receipt_summary

        for line in (*receipt_summary(record.limits), *bill_words(bill_of_record(record))):
            self.say(line)
        for remark in record.remarks:
            self.say(f"remark: {remark}")
        if record.result_location:
            self.say(f"results: {record.result_location}")

    def _write(self, stream: BinaryIO, block: bytes) -> None:
        if self.closed:
            return
        try:
            stream.write(block)
            stream.flush()
        except OSError as error:
            self.closed = True
            if not isinstance(error, BrokenPipeError):
                self.say(f"the output takes nothing any more: {error.strerror}")
            to_nowhere(stream.fileno())
