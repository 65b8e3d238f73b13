"""What the driver's error events mean for the task and for the GPU. Pure.

Source: NVIDIA's "XID Errors" (docs.nvidia.com/deploy/xid-errors), and the list of those that applications cause in NVIDIA's
device plugin for Kubernetes (13, 31, 43, 45, 68, 109).
"""

from __future__ import annotations

from enum import Enum


class Blame(Enum):
    """Whose an event is."""

    APPLICATION = "application"
    """The task's own doing, or its consequence: it is told in the bill, and the GPU is well."""
    NOTICE = "notice"
    """The driver tells of something that is mended or no fault; the levels that are read tell the rest."""
    TASK = "task"
    """The memory error is contained: it ends the tasks on the GPU, which is well afterwards."""
    GPU = "gpu"
    """The GPU is not to be trusted until it was probed."""
    RESET = "reset"
    """The GPU is not to be used before it was reset, or the host restarted."""


_APPLICATION = {
    13: "graphics engine exception",
    31: "GPU memory page fault",
    43: "GPU stopped processing",
    45: "preemptive clean-up, due to earlier errors",
    68: "video processor exception",
    109: "context switch timeout",
}
_NOTICE = {
    63: "a memory page or row is to be retired",
    92: "high rate of single-bit memory errors",
    137: "NVLink privilege error",
    154: "the recovery action changed",
}
_TASK = {94: "contained memory error"}
_GPU = {
    32: "corrupted push buffer stream",
    38: "driver firmware error",
    61: "internal micro-controller breakpoint",
    62: "internal micro-controller halt",
    69: "graphics engine class error",
    74: "NVLink error",
    121: "error of the link to the processor",
    145: "NVLink error",
    149: "NVLink error",
}
_RESET = {
    46: "GPU stopped processing, reset timed out",
    48: "double-bit memory error",
    64: "a memory page or row could not be retired",
    79: "GPU has fallen off the bus",
    95: "uncontained memory error",
    110: "security fault",
    119: "GSP firmware does not answer",
    120: "GSP firmware error",
    123: "power management firmware error",
    136: "link training failed",
    140: "unrecovered memory error",
    143: "GPU initialisation failed",
    158: "GPU fatal timeout",
}
_BLAMES = (
    (_APPLICATION, Blame.APPLICATION),
    (_NOTICE, Blame.NOTICE),
    (_TASK, Blame.TASK),
    (_GPU, Blame.GPU),
    (_RESET, Blame.RESET),
)


def blame(code: int) -> Blame:
    """One that is not known, 999 among them, is taken for a fault of the GPU, which comes back when it is well."""
    return next((of for known, of in _BLAMES if code in known), Blame.GPU)


def words(code: int) -> str:
    """`XID 79 (GPU has fallen off the bus)`."""
    name = next((known[code] for known, _ in _BLAMES if code in known), "")
    return f"XID {code} ({name})" if name else f"XID {code}"
