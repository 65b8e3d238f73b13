"""The driver's bits for what holds a GPU's clocks back (nvmlClocksEventReasons in nvml.h). Pure."""

from __future__ import annotations

_NAMES = {
    0x04: "SW_POWER_CAP",
    0x08: "HW_SLOWDOWN",
    0x20: "SW_THERMAL",
    0x40: "HW_THERMAL",
    0x80: "HW_POWER_BRAKE",
}
HARMFUL = 0x08 | 0x20 | 0x40 | 0x80
"""Heat, or power that is missing. A cap on the power is how many GPUs are run, and no fault."""
HELD_BACK = HARMFUL | 0x04
"""Idle clocks and those that somebody chose are not among them."""


def throttle_names(mask: int) -> tuple[str, ...]:
    return tuple(name for bit, name in _NAMES.items() if mask & bit)
