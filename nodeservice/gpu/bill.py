"""Adds up what an attempt uses of its GPUs, look by look. Pure.

The driver keeps no account for a task: what it tells at each look is held together here, and can be written down and taken
up again, so that a restart of the service loses no more than what happened meanwhile. Energy is the difference of two
readings of the driver's own counter, so it loses nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nodeservice.core.gpus import GpuUsage
from nodeservice.gpu.throttle import HELD_BACK

_MOST = 2**63
_LONGEST_GAP_SECONDS = 5.0
_MOST_LOOKS = 3
"""Between two looks, in seconds or in looks that were left out; over a longer time nothing is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSample:
    """One GPU or MIG instance at one look, as far as the attempt is concerned. None: not known."""

    uuid: str
    name: str
    utilization_percent: float | None = None
    memory_bytes: int | None = None
    energy_millijoules: int | None = None
    """None on a GPU that is shared or split: the driver counts the whole."""
    throttle_reasons: int = 0


@dataclass(slots=True)
class _Meter:
    name: str = ""
    seconds: float = 0.0
    load_seconds: float = 0.0
    """Seconds with a known load, and the load in percent times seconds."""
    percent_seconds: float = 0.0
    peak_percent: float | None = None
    memory_peak_bytes: int | None = None
    energy_joules: float | None = None
    energy_millijoules: int | None = None
    throttled_seconds: float = 0.0
    xids: list[int] = field(default_factory=list)


class GpuBill:
    """Of one attempt."""

    def __init__(self) -> None:
        self._meters: dict[str, _Meter] = {}
        self._last_at: float | None = None

    def add(self, samples: Sequence[GpuSample], *, now_seconds: float, every_seconds: float = 1.0) -> None:
        """One look, at a time of a clock that nobody sets; `every_seconds` there is one, as far as the driver answers."""
        gap = 0.0 if self._last_at is None else now_seconds - self._last_at
        self._last_at = now_seconds
        seconds = gap if 0 <= gap <= max(_LONGEST_GAP_SECONDS, _MOST_LOOKS * every_seconds) else 0.0
        for sample in samples:
            meter = self._meters.setdefault(sample.uuid, _Meter())
            meter.name = sample.name
            meter.seconds += seconds
            if sample.throttle_reasons & HELD_BACK:
                meter.throttled_seconds += seconds
            if sample.utilization_percent is not None:
                meter.load_seconds += seconds
                meter.percent_seconds += seconds * sample.utilization_percent
                meter.peak_percent = max(meter.peak_percent or 0.0, sample.utilization_percent)
            if sample.memory_bytes is not None:
                meter.memory_peak_bytes = max(meter.memory_peak_bytes or 0, sample.memory_bytes)
            _add_energy(meter, sample.energy_millijoules)

    def note_xid(self, uuid: str, code: int) -> None:
        """Also before the first look."""
        meter = self._meters.setdefault(uuid, _Meter())
        if code not in meter.xids:
            meter.xids.append(code)

    def usage(self) -> tuple[GpuUsage, ...]:
        return tuple(_usage(uuid, meter) for uuid, meter in sorted(self._meters.items()))

    def as_text(self) -> str:
        return json.dumps({uuid: asdict(meter) for uuid, meter in self._meters.items()})

    @classmethod
    def from_text(cls, text: str) -> GpuBill:
        """An empty bill for a text that is none: it was cut off by whatever ended the service."""
        bill = cls()
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            bill._meters = {uuid: _meter_of(told) for uuid, told in json.loads(text).items()}
        return bill


def _meter_of(told: Mapping[str, Any]) -> _Meter:
    """Raises ValueError or TypeError for what is none: later sums must not fail over it."""
    meter = _Meter(**told)
    if not isinstance(meter.name, str) or not isinstance(meter.xids, list):
        raise TypeError("a name or a list is none")
    counts = [count for count in (meter.memory_peak_bytes, meter.energy_millijoules) if count is not None]
    sums = [meter.seconds, meter.load_seconds, meter.percent_seconds, meter.throttled_seconds]
    others = [number for number in (meter.peak_percent, meter.energy_joules) if number is not None]
    if not all(isinstance(count, int) for count in (*counts, *meter.xids)):
        raise TypeError("a count is not whole")
    if not all(0 <= number < _MOST for number in (*counts, *meter.xids, *sums, *others)):  # false for NaN
        raise ValueError("a number is out of bounds")
    return meter


def _add_energy(meter: _Meter, counter: int | None) -> None:
    if counter is None:  # not told at this look; the next one tells of both
        return
    before, meter.energy_millijoules = meter.energy_millijoules, counter
    # A counter that began anew with the driver counts from 0.
    used = 0 if before is None else counter - before if counter >= before else counter
    meter.energy_joules = (meter.energy_joules or 0.0) + used / 1000


def _usage(uuid: str, meter: _Meter) -> GpuUsage:
    return GpuUsage(
        uuid=uuid,
        name=meter.name,
        seconds=round(meter.seconds, 3),
        utilization_mean_percent=round(meter.percent_seconds / meter.load_seconds, 1) if meter.load_seconds else None,
        utilization_peak_percent=meter.peak_percent,
        memory_peak_bytes=meter.memory_peak_bytes,
        energy_joules=None if meter.energy_joules is None else round(meter.energy_joules, 3),
        throttled_seconds=round(meter.throttled_seconds, 3),
        xids=tuple(meter.xids),
    )
