"""Formats of cgroup files that cgroupspy lacks, as descriptors like its own."""

from __future__ import annotations

from cgroupspy.interfaces import BaseFileInterface


class LimitFile(BaseFileInterface):  # type: ignore[misc]
    """A number, or `max` for None."""

    def sanitize_get(self, value: str) -> int | None:
        return None if value == "max" else int(value)

    def sanitize_set(self, value: int | None) -> str:
        return "max" if value is None else str(value)


class BandwidthFile(BaseFileInterface):  # type: ignore[misc]
    """`cpu.max` of v2: quota and period in microseconds; a quota of None is no limit."""

    def sanitize_get(self, value: str) -> tuple[int | None, int]:
        quota, period = value.split()
        return (None if quota == "max" else int(quota)), int(period)

    def sanitize_set(self, value: tuple[int, int]) -> str:
        return f"{value[0]} {value[1]}"


class FlatKeyedFile(BaseFileInterface):  # type: ignore[misc]
    """Lines of a key and a number."""

    def sanitize_get(self, value: str) -> dict[str, int]:
        return {key: int(number) for key, number in (line.split() for line in value.splitlines())}
