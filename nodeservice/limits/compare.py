"""Compares what was asked of one limit with what is in force, knowing how the kernel rounds; pure."""

from __future__ import annotations

from collections.abc import Sequence

from nodeservice.limits.asked import Value, capability_names, ids_of
from nodeservice.limits.plan import CPU_PERIOD_US, cpu_milli_of, cpu_quota_us, whole_pages
from nodeservice.ports import Reading

_AT_MOST = frozenset({"open_files_limit", "core_file_bytes"})
"""Less is no breach: a process may lower its own, and the engine may not be allowed to raise them as far as was asked."""
_AT_LEAST = frozenset({"no_new_privileges", "oom_score_adj", "oom_group"})
_SYSTEMD_CPU_STEP = 10
"""systemd keeps CPU quotas in whole percents of a core, and the runtime rounds up to them."""
_DISK_BLOCK_BYTES = 4096


def in_force(name: str, readings: Sequence[Reading]) -> Reading:
    """Of several places that limit the same thing, the one that counts. Raises ValueError for an empty sequence."""
    if not readings:
        raise ValueError(f"nothing was read of {name}")
    limiting = [reading for reading in readings if reading.value is not None]
    if not limiting:
        return readings[0]
    if name == "capabilities":
        return max(limiting, key=lambda reading: _mask(reading.value).bit_count())
    if name == "cpu_ids":
        return min(limiting, key=lambda reading: len(ids_of(str(reading.value))))
    if name in _AT_LEAST or name == "seccomp":
        return min(limiting, key=lambda reading: _number(reading.value) or 0)
    if all(isinstance(reading.value, int) for reading in limiting):
        return min(limiting, key=lambda reading: _number(reading.value) or 0)
    return limiting[-1]


def difference(name: str, asked: Value, held: Value | None, *, page_bytes: int) -> str:
    """In words, how what is in force differs from what was asked; empty where it doesn't.

    A limit that the task can't change itself was not set as promised where it is tighter, either.
    """
    if held is None:
        return f"asked {asked}, in force no limit"
    plain = f"asked {asked}, in force {held}"
    match name:
        case "capabilities":
            extra = _mask(held) & ~_mask(asked)
            return f"may also use {capability_names(extra)}" if extra else ""
        case "cpu_ids":
            return "" if ids_of(str(held)) == ids_of(str(asked)) else plain
        case "seccomp":
            return "" if held in (1, 2) else plain
    number, wanted = _number(held), _number(asked)
    if number is None or wanted is None:
        return "" if held == asked else plain
    if name in _AT_MOST:
        return plain if number > wanted else ""
    if name in _AT_LEAST:
        return plain if number < wanted else ""
    return "" if _equal(name, wanted, number, page_bytes) else plain


def _equal(name: str, asked: int, held: int, page_bytes: int) -> bool:
    if held == asked:
        return True
    if name in ("memory_bytes", "memory_swap_bytes", "shm_bytes"):
        # /dev/shm is counted in pages too, but upwards.
        return held in (whole_pages(asked, page_bytes=page_bytes), -(-asked // page_bytes) * page_bytes)
    if name == "cpu_milli":
        return held in (
            cpu_milli_of(cpu_quota_us(asked), CPU_PERIOD_US),
            -(-asked // _SYSTEMD_CPU_STEP) * _SYSTEMD_CPU_STEP,
        )
    return name == "disk_bytes" and abs(held - asked) < _DISK_BLOCK_BYTES


def _mask(value: Value | None) -> int:
    """Raises ValueError for what is no hexadecimal number."""
    return value if isinstance(value, int) else int(value or "0", 16)


def _number(value: Value | None) -> int | None:
    return value if isinstance(value, int) else None
