"""Counts what became of tasks since this process began, on the way of their phases to the sink of spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from nodeservice.core.machine import PHASE_NAMES
from nodeservice.core.model import Outcome, Phase, PhaseTiming, Reason, TaskRecord
from nodeservice.ports import TraceSink

_OUTCOMES = {Reason.COMPLETED: Outcome.SUCCEEDED, Reason.CANCELLED: Outcome.CANCELLED}
_REPORT = PHASE_NAMES[Phase.REPORTING]


class Tally:
    """A TraceSink before another one. `on_phase` gets each phase that ended, and its seconds; it must be quick."""

    def __init__(self, sink: TraceSink) -> None:
        self._sink = sink
        self.on_phase: Callable[[str, float], None] = lambda _name, _seconds: None
        # With those that have not come yet: a rate is told from a series' second value on, so each first one was missed.
        self.finished = Counter({(_OUTCOMES.get(reason, Outcome.FAILED), reason): 0 for reason in Reason})
        """Attempts that have come to their report, after which no end changes."""
        self.refused: Counter[str] = Counter()
        """Assignments that were not accepted, by reason."""
        self.stored_bytes = 0
        """Of results that the configured store has."""
        self.removed_image_bytes = 0

    def phase_ended(self, record: TaskRecord, timing: PhaseTiming) -> None:
        self._sink.phase_ended(record, timing)
        if timing.ended_at is not None:
            self.on_phase(timing.name, (timing.ended_at - timing.started_at).total_seconds())
        following = record.timings[record.timings.index(timing) + 1 :]
        if following and following[0].name == _REPORT and record.verdict is not None:
            self.finished[record.verdict.outcome, record.verdict.reason] += 1

    def task_ended(self, record: TaskRecord) -> None:
        self._sink.task_ended(record)

    def note_refusal(self, reason: str) -> None:
        self.refused[reason] += 1

    def note_stored(self, size_bytes: int) -> None:
        self.stored_bytes += size_bytes

    def note_removed_image(self, size_bytes: int) -> None:
        self.removed_image_bytes += size_bytes

    async def close(self) -> None:
        await self._sink.close()
