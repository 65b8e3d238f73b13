"""What an NVML error means for this node, and what an operator can do about it. Pure.

Codes: enum nvmlReturn_t in nvml.h. Only their numbers are used: the binding's error class has no hash and fails on `==`.
"""

from __future__ import annotations

INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NO_PERMISSION = 4
NOT_FOUND = 6
DRIVER_NOT_LOADED = 9
TIMEOUT = 10
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15
RESET_REQUIRED = 16
UNKNOWN = 999
OF_ONE_GPU = frozenset({INVALID_ARGUMENT, NOT_FOUND, GPU_IS_LOST, RESET_REQUIRED, UNKNOWN})
"""What a call with one GPU's handle can fail with while the others are well."""

_FAULTS = {
    1: ("NVML is not initialised", "the driver went away; it is initialised again at the next look"),
    4: ("NVML does not permit it", "run the node with access to /dev/nvidiactl and /dev/nvidia*"),
    9: ("the NVIDIA driver is not loaded", "load it with `modprobe nvidia` and look at `dmesg`"),
    15: ("a GPU has fallen off the bus", "look for Xid 79 in `dmesg`; reset the GPU or restart the machine"),
    16: ("a GPU needs a reset", "stop what uses it and run `nvidia-smi --gpu-reset`, or restart the machine"),
    17: ("the operating system blocks the driver", "allow the NVIDIA devices in the cgroup that the node runs in"),
    18: ("driver and NVML library have different versions", "restart the machine after a driver update"),
    999: ("the driver reports an unknown error", "check that the NVIDIA devices may be opened here, and `dmesg`"),
}


def explain(code: int, subject: str = "") -> str:
    """One sentence with the cause and the remedy."""
    what, remedy = _FAULTS.get(code, ("the driver reports an error", "look at `nvidia-smi` and `dmesg`"))
    return f"{subject}{': ' if subject else ''}{what} (NVML error {code}); {remedy}"
