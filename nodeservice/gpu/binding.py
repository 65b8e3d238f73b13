"""The way into NVIDIA's Python binding: what its calls give, where an older driver lacks one, what its errors mean."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nodeservice.gpu.faults import FUNCTION_NOT_FOUND, NOT_SUPPORTED

T = TypeVar("T")

LIBRARY = "libnvidia-ml.so.1"
"""The name that the binding loads; it takes no other."""
_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASS = "0x03"


def binding() -> Any:
    """The module `pynvml` of nvidia-ml-py. It takes several MiB, so it is imported only where there is a library."""
    import pynvml

    return pynvml


def optional(nvml: Any, call: Callable[..., T], *args: Any) -> T | None:
    """None where this device or driver does not tell; a real fault goes on as an error.

    The binding raises NVMLLibraryMismatchError, which is no NVMLError, for a call that the driver is too old for.
    """
    try:
        return call(*args)
    except nvml.NVMLLibraryMismatchError:
        return None
    except nvml.NVMLError as error:
        if int(error.value) in (NOT_SUPPORTED, FUNCTION_NOT_FOUND):
            return None
        raise


def text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def can_load(library: str = LIBRARY) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def library_file(nvml: Any) -> Path | None:
    """The file that the binding's library was loaded from, by its own name and not by a link to it; None where untold."""
    address = ctypes.cast(nvml.nvmlLib.nvmlInitWithFlags, ctypes.c_void_p).value or 0
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        span, *_, rest = line.split(maxsplit=4)
        begin, _, end = span.partition("-")
        if int(begin, 16) <= address < int(end, 16):
            _, _, path = rest.partition(" ")
            return Path(path.strip().removesuffix(" (deleted)"))
    return None


def has_nvidia_hardware(pci_devices: Path) -> bool:
    """Whether the host has an NVIDIA GPU, driver or not."""
    for device in pci_devices.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == _NVIDIA_VENDOR and kind.startswith(_DISPLAY_CLASS):
            return True
    return False
