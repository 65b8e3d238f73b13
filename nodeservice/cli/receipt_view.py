"""Shows a receipt: of each limit what was asked, what was in force, how it was kept, and where that was read. Pure.

A receipt may come over the wire, so nothing is taken for granted of its shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PARTS = ("asked", "effective", "enforcement", "read_from", "unread", "mismatches", "cgroup", "why_watched")


def receipt_rows(limits: object) -> Iterator[tuple[str, str, str, str, str]]:
    """Limit, asked, in force, how it is kept, where it was read or why it was not. None for what is no receipt."""
    asked, effective, kept, read_from, unread = (
        _part(limits, name) for name in ("asked", "effective", "enforcement", "read_from", "unread")
    )
    for name in dict.fromkeys((*asked, *effective, *unread)):
        held = "no limit" if effective.get(name, "") is None else _text(effective.get(name, "?"))
        source = [_text(read_from[name])] if name in read_from else []
        source += [f"not read: {_text(unread[name])}"] if name in unread else []
        yield name, _text(asked.get(name, "")), held, _text(kept.get(name, "?")), "; ".join(source)


def receipt_summary(limits: object) -> Iterator[str]:
    """A few lines: how many limits are kept in which way, which are not, and what could not be read."""
    kept: dict[str, list[str]] = {}
    for name, how in _part(limits, "enforcement").items():
        if name in _part(limits, "asked"):
            kept.setdefault(_text(how), []).append(name)
    counted = [f"{len(names)} {how}" for how, names in kept.items() if how == "hard"]
    counted += [f"{how}: {', '.join(names)}" for how, names in kept.items() if how != "hard"]
    if counted:
        hint = " (nodeservice doctor tells why)" if kept.keys() - {"hard"} else ""
        yield f"limits: {'; '.join(counted)}{hint}"
    mismatches = limits.get("mismatches") if isinstance(limits, Mapping) else None
    for sentence in mismatches if isinstance(mismatches, list) else ():
        yield f"limit not as asked: {_text(sentence)}"
    missing: dict[str, list[str]] = {}
    for name, reason in _part(limits, "unread").items():
        missing.setdefault(_text(reason), []).append(name)
    for reason, names in missing.items():
        yield f"limits not read: {', '.join(names)}: {reason}"


def other_limits(limits: object) -> dict[str, Any]:
    """What stands beside the receipt, such as the running time."""
    return {name: value for name, value in limits.items() if name not in PARTS} if isinstance(limits, Mapping) else {}


def _part(limits: object, name: str) -> Mapping[str, Any]:
    part = limits.get(name) if isinstance(limits, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _text(value: object) -> str:
    return str(value)
