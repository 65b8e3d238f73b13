"""Reads amounts as people write them: `64m`, `1.5g`, `0.5` CPUs, `1h30m`. Exact, or an error that names the option."""

from __future__ import annotations

import re
from decimal import Decimal

from nodeservice.errors import RequestError

_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([bkmgt]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_CPUS = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)", re.ASCII)
_MILLI_CPUS = re.compile(r"([0-9]+)m", re.ASCII)
_SECONDS = re.compile(r"[0-9]+(?:\.[0-9]+)?", re.ASCII)
_DURATION = re.compile(
    r"(?:([0-9]+(?:\.[0-9]+)?)d)?(?:([0-9]+(?:\.[0-9]+)?)h)?(?:([0-9]+(?:\.[0-9]+)?)m)?"
    r"(?:([0-9]+(?:\.[0-9]+)?)s)?(?:([0-9]+(?:\.[0-9]+)?)ms)?",
    re.ASCII,
)
_FACTORS = {"": 1, "b": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_UNIT_SECONDS = (Decimal(86400), Decimal(3600), Decimal(60), Decimal(1), Decimal("0.001"))
_LONGEST_TEXT = 40
_MOST_BYTES = 2**60
_MOST_CPUS = 1_000_000
_MOST_SECONDS = 10 * 366 * 86400


def parse_bytes(text: str, *, option: str = "--memory") -> int:
    """`64m`, `1.5g`, `512MiB`, `1048576`; units are powers of 1,024, and one byte is the least."""
    match = _BYTES.fullmatch(text.strip()) if len(text) <= _LONGEST_TEXT else None
    if match is None:
        raise _refused(option, text, "give bytes or a number with k, m, g or t, such as 64m or 1.5g")
    amount = Decimal(match[1]) * _FACTORS[match[2].lower()]
    if amount != int(amount):
        raise _refused(option, text, "that is not a whole number of bytes")
    if not 0 < amount <= _MOST_BYTES:
        raise _refused(option, text, "give an amount that a machine can have, more than 0")
    return int(amount)


def parse_cpus(text: str) -> int:
    """Cores in thousandths: `0.5` or `500m` is 500."""
    stripped = text.strip() if len(text) <= _LONGEST_TEXT else ""
    if match := _MILLI_CPUS.fullmatch(stripped):
        amount = Decimal(match[1])
    elif _CPUS.fullmatch(stripped):
        amount = Decimal(stripped) * 1000
    else:
        raise _refused("--cpus", text, "give cores, such as 2 or 0.5")
    if amount != int(amount):
        raise _refused("--cpus", text, "give at most three decimals")
    if not 0 < amount <= _MOST_CPUS * 1000:
        raise _refused("--cpus", text, "give a number of cores that a machine can have, more than 0")
    return int(amount)


def parse_seconds(text: str, *, option: str = "--timeout") -> float:
    """`20s`, `5m`, `1h30m`, `2d`, `250ms`, or seconds without a unit."""
    stripped = text.strip().lower() if len(text) <= _LONGEST_TEXT else ""
    if _SECONDS.fullmatch(stripped):
        seconds = Decimal(stripped)
    else:
        match = _DURATION.fullmatch(stripped)
        if match is None or not stripped:
            raise _refused(option, text, "give a duration such as 20s, 5m or 1h30m")
        parts = zip(match.groups(), _UNIT_SECONDS, strict=True)
        seconds = sum((Decimal(number) * unit for number, unit in parts if number), Decimal(0))
    if seconds > _MOST_SECONDS:
        raise _refused(option, text, "give at most ten years")
    return float(seconds)


def _refused(option: str, text: str, remedy: str) -> RequestError:
    shown = ascii(text[:_LONGEST_TEXT])
    return RequestError(f"{option} is {shown}", reason="INVALID_REQUEST", field=option.lstrip("-"), hint=remedy)
