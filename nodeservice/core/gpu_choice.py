"""Which of several GPUs that would all do are taken: pure.

The least capable ones, several of them as close together as can be had, and in a way that leaves the others close together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

from nodeservice.core.gpus import GpuUnit

_MOST_COMBINATIONS = 600
"""All choices of 4 from 8 are 70, of 3 from 16 are 560. Where there are more, the choice is made one by one."""
_MOST_BEGINNINGS = 16
"""So many GPUs are tried as the first one then."""
_SAME_SIZE_PERCENT = 3
"""GPUs of one kind differ by some MiB in what the driver keeps for itself; that makes none of them the lesser one."""


def closest(free: Sequence[GpuUnit], count: int) -> list[GpuUnit]:
    """The least capable that will do; of equally capable ones, those that are close together and leave the rest so."""
    worth = _Worth.among(free)
    everyone = sorted(free, key=lambda unit: (worth.of[unit.uuid], unit.uuid))
    if not any(unit.closeness for unit in free):
        return everyone[:count]
    if comb(len(free), count) <= _MOST_COMBINATIONS:
        choices: Iterable[Sequence[GpuUnit]] = combinations(everyone, count)
    else:
        choices = [_grown(first, everyone, count, worth) for first in everyone[:_MOST_BEGINNINGS]]
    best: Sequence[GpuUnit] = min(choices, key=lambda chosen: _cost(chosen, everyone, worth))
    return list(best)


@dataclass(frozen=True, slots=True)
class _Worth:
    """How capable each of some GPUs is, by UUID: by its memory, and among equals by its compute capability."""

    of: Mapping[str, tuple[int, int]]

    @classmethod
    def among(cls, units: Sequence[GpuUnit]) -> _Worth:
        of: dict[str, tuple[int, int]] = {}
        size = 0
        for unit in sorted(units, key=lambda unit: unit.memory_bytes):
            if unit.memory_bytes * 100 > size * (100 + _SAME_SIZE_PERCENT):
                size = unit.memory_bytes
            major, minor = unit.compute_capability
            of[unit.uuid] = size, 100 * major + minor
        return cls(of)

    def together(self, units: Iterable[GpuUnit]) -> tuple[int, int]:
        worths = [self.of[unit.uuid] for unit in units]
        return sum(size for size, _ in worths), sum(capability for _, capability in worths)


def _cost(chosen: Sequence[GpuUnit], free: Sequence[GpuUnit], worth: _Worth) -> tuple[tuple[int, int], int, int]:
    names = {unit.uuid for unit in chosen}
    inside = sum(_near(one, other) for one, other in combinations(chosen, 2))
    torn = sum(_near(one, other) for one in chosen for other in free if other.uuid not in names)
    return worth.together(chosen), -inside, torn


def _grown(first: GpuUnit, free: Sequence[GpuUnit], count: int, worth: _Worth) -> list[GpuUnit]:
    """One after the other: each next is the least capable, and of those the one that is closest to those chosen."""
    chosen, last = [first], first
    nearness = {unit.uuid: 0 for unit in free if unit is not first}
    left = {unit.uuid: unit for unit in free if unit is not first}
    while len(chosen) < count:
        for uuid, unit in left.items():
            nearness[uuid] += _near(last, unit)
        last = min(left.values(), key=lambda unit: (worth.of[unit.uuid], -nearness[unit.uuid], unit.uuid))
        del left[last.uuid]
        chosen.append(last)
    return chosen


def _near(one: GpuUnit, other: GpuUnit) -> int:
    return one.closeness.get(other.uuid, 0)
