"""What a benchmark gives: measures with all their samples, ratios with their baselines, targets and whether they hold."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One arm of one case. `what` and `unit` name the quantity; `x` places the case on an axis where it has one."""

    what: str
    unit: str
    case: str
    arm: str
    samples: Sequence[float]
    x: float | None = None
    more_is_better: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "samples": [round(sample, 4) for sample in self.samples], **spread(self.samples)}


@dataclass(frozen=True, kw_only=True)
class Target:
    """`kind` is "at least" or "at most". A target is judged on its worst case, whose name is in `case`."""

    name: str
    measured: float
    bound: float
    kind: str
    case: str = ""

    @property
    def holds(self) -> bool:
        return self.measured >= self.bound if self.kind == "at least" else self.measured <= self.bound

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "measured": round(self.measured, 4), "holds": self.holds}


@dataclass(kw_only=True)
class Finding:
    """`about` says what was compared with what."""

    about: str
    measures: list[Measure] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, unit: str, case: str, arm: str, samples: Sequence[float], **more: Any) -> None:
        self.measures.append(Measure(what=what, unit=unit, case=case, arm=arm, samples=tuple(samples), **more))

    def as_dict(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "measures": [measure.as_dict() for measure in self.measures],
            "ratios": {name: round(value, 4) for name, value in self.ratios.items()},
            "targets": [target.as_dict() for target in self.targets],
            "notes": self.notes,
        }


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes; p99 is the nearest rank, so with fewer than 100 samples it is the largest."""
    ordered = sorted(samples)
    return {
        "median": round(statistics.median(ordered), 4),
        "quartile_low": round(percentile(ordered, 25), 4),
        "quartile_high": round(percentile(ordered, 75), 4),
        "p99": round(percentile(ordered, 99), 4),
        "least": round(ordered[0], 4),
        "most": round(ordered[-1], 4),
    }


def percentile(samples: Sequence[float], percent: float) -> float:
    """The nearest rank."""
    ordered = sorted(samples)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1).__int__()]


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """By round, what ours is of theirs: what disturbed a whole round falls out."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]
