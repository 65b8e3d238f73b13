"""What the driver's error events mean for the task and for the GPU. Pure.

Source: NVIDIA's XID catalogue (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html), by what it says to do at once:
restart the application, ignore it, reset the GPU. And the list of those that applications cause in NVIDIA's device plugin
for Kubernetes (13, 31, 43, 45, 68, 109).
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
    8: "GPU stopped processing",
    13: "graphics engine exception",
    25: "invalid push buffer stream",
    31: "GPU memory page fault",
    **dict.fromkeys((39, 40, 41, 70, 71, 72, 75, 76, 77, 85, *range(126, 136)), "copy engine exception"),
    43: "GPU stopped processing",
    45: "preemptive clean-up, due to earlier errors",
    60: "video processor exception",
    **dict.fromkeys((68, 83, 84, 88, 89, 96, 97, 98), "video decoder exception"),
    69: "graphics engine class error",
    **dict.fromkeys((82, *range(99, 106)), "JPEG decoder exception"),
    86: "optical flow engine exception",
    109: "context switch timeout",
    139: "optical flow engine exception",
}
_NOTICE = {
    37: "driver firmware error",
    38: "driver firmware error",
    44: "graphics engine fault during a context switch",
    63: "a memory page or row is to be retired",
    66: "illegal access by the driver",
    67: "illegal access by the driver",
    92: "high rate of single-bit memory errors",
    93: "the InfoROM is not to be written",
    106: "SMBPBI test message",
    107: "SMBPBI test message",
    108: "NVLink remote translation error",
    121: "corrected errors of the link to the processor",
    **dict.fromkeys((122, 123, 124, 125), "the InfoROM could not be read or written"),
    137: "NVLink privilege error",
    141: "CUDA fast path error",
    # What each is, harmless or not, is in a detail that NVML does not tell; an action that is needed is told beside.
    **dict.fromkeys(range(144, 151), "NVLink error"),
    154: "the recovery action changed",
    157: "a part could not be retired",
    160: "a memory channel was retired",
    161: "a memory channel could not be retired",
    **dict.fromkeys(range(162, 166), "power smoothing"),
    **dict.fromkeys((171, 172), "details of an uncorrectable memory error"),
}
_TASK = {94: "contained memory error"}
_GPU = {
    32: "corrupted push buffer stream",
    54: "auxiliary power is not connected",
    61: "internal micro-controller breakpoint",
    80: "corrupted data sent to the GPU",
    155: "NVLink went down",
    159: "error of the link to the processor",
}
_RESET = {
    46: "GPU stopped processing, reset timed out",
    48: "double-bit memory error",
    62: "internal micro-controller halt",
    64: "a memory page or row could not be retired",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    95: "uncontained memory error",
    110: "security fault",
    119: "GSP firmware does not answer",
    120: "GSP firmware error",
    136: "link training failed",
    140: "unrecovered memory error",
    143: "GPU initialisation failed",
    156: "a part is to be retired",
    158: "GPU fatal timeout",
    167: "PCI Express fatal timeout",
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
