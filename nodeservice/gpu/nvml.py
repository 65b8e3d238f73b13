"""The GPUs of this host through NVML: implements the port GpuProvider.

NVML is initialised once and used from one thread: a look-up of handles is cheap then, and a driver that hangs blocks that
thread alone. GPUs are keyed by UUID, since the index order changes across restarts.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import structlog

from nodeservice.gpu.faults import (
    DRIVER_NOT_LOADED,
    FUNCTION_NOT_FOUND,
    LIBRARY_NOT_FOUND,
    NO_PERMISSION,
    NOT_SUPPORTED,
    explain,
)
from nodeservice.gpu.worker import Worker
from nodeservice.ports import Gpu, GpuInventory

log = structlog.get_logger(__name__)
T = TypeVar("T")

_LIBRARY = "libnvidia-ml.so.1"
"""The name that the binding loads; it takes no other."""
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASS = "0x03"
_CLOSE_SECONDS = 1.0


class NvmlGpuProvider:
    """No library, or a library without driver and without hardware: no GPUs, no error. Anything else broken: an error."""

    def __init__(
        self, *, timeout_seconds: float = 5.0, pci_devices: Path = _PCI_DEVICES, library: str = _LIBRARY
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._pci_devices = pci_devices
        self._library = library
        self._worker: Worker[GpuInventory] = Worker("nodeservice-nvml")
        self._session = _Session(pci_devices)
        self._call: Future[GpuInventory] | None = None
        self._call_started = 0.0
        self._last = GpuInventory()
        self._closed = False

    async def inventory(self) -> GpuInventory:
        """As the port says. Callers at the same time share one look. When NVML does not answer within the time limit, the
        last known inventory comes with an error, and at once for as long as that call hangs."""
        if self._closed:
            return self._last
        if self._call is None:
            # Without the library, the binding (several MiB) is never imported and no thread is started.
            if not self._worker.is_started and not _can_load(self._library):
                return GpuInventory()
            self._call = self._worker.submit(self._session.read)
            self._call_started = time.monotonic()
        call = self._call
        left_seconds = self._timeout_seconds - (time.monotonic() - self._call_started)
        if left_seconds > 0:
            await asyncio.wait([asyncio.wrap_future(call)], timeout=left_seconds)
        if not call.done():
            return replace(
                self._last,
                error=f"NVML has not answered for {self._timeout_seconds:g} s; look at `nvidia-smi` and `dmesg`",
            )
        if self._call is call:
            self._call = None
            found = call.result()
            if found.error is not None and found.error != self._last.error:
                log.warning("gpu.faulty", error=found.error)
            self._last = found
        return self._last

    async def close(self) -> None:
        """Shut NVML down, unless it hangs. Repeating is harmless."""
        if self._closed:
            return
        self._closed = True
        if self._worker.is_started:
            ending = asyncio.wrap_future(self._worker.submit(self._session.end))
            await asyncio.wait([ending], timeout=_CLOSE_SECONDS)
        self._worker.end()


class _Session:
    """NVML between init and shutdown. Only for the worker's thread."""

    def __init__(self, pci_devices: Path) -> None:
        self._pci_devices = pci_devices
        self._initialised = False

    def read(self) -> GpuInventory:
        """One look; raises nothing."""
        try:
            return self._read()
        except Exception as error:
            # Not an error of NVML, so the binding's or ours: the node goes on without GPUs and says so.
            log.exception("gpu.inventory_failed")
            return GpuInventory(error=f"the GPUs could not be read: {error!r}")

    def _read(self) -> GpuInventory:
        nvml = _binding()
        try:
            if not self._initialised:
                nvml.nvmlInit()
                self._initialised = True
            return _inventory(nvml)
        except nvml.NVMLError as error:
            code = int(error.value)
            self.end()
            if code == LIBRARY_NOT_FOUND or (code == DRIVER_NOT_LOADED and not _has_nvidia_hardware(self._pci_devices)):
                return GpuInventory()
            return GpuInventory(error=explain(code))

    def end(self) -> GpuInventory:
        if self._initialised:
            self._initialised = False
            nvml = _binding()
            try:
                nvml.nvmlShutdown()
            except nvml.NVMLError as error:
                log.debug("gpu.shutdown_failed", code=int(error.value))
        return GpuInventory()


def _inventory(nvml: Any) -> GpuInventory:
    driver_version = _text(nvml.nvmlSystemGetDriverVersion())
    gpus: list[Gpu] = []
    errors: list[str] = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            gpus.append(_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index)))
        except nvml.NVMLError as error:
            code = int(error.value)
            # The count includes devices that this process may not open: they are not ours, which is no fault.
            if code != NO_PERMISSION:
                errors.append(explain(code, f"GPU {index}"))
    gpus.sort(key=lambda gpu: (gpu.pci_address or "", gpu.uuid))
    return GpuInventory(gpus=tuple(gpus), driver_version=driver_version, error="; ".join(errors) or None)


def _gpu(nvml: Any, handle: Any) -> Gpu:
    memory = _memory(nvml, handle)
    utilization = _optional(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
    pci = _optional(nvml, lambda: nvml.nvmlDeviceGetPciInfo(handle))
    return Gpu(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_total_bytes=int(memory.total) if memory is not None else 0,
        memory_used_bytes=int(memory.used) if memory is not None else None,
        utilization_percent=float(utilization.gpu) if utilization is not None else None,
        pci_address=_text(pci.busId).lower() if pci is not None else None,
    )


def _memory(nvml: Any, handle: Any) -> Any:
    """Version 2, whose `used` leaves out what the driver reserves; version 1 from drivers that lack it."""
    v2 = _optional(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2))
    return v2 if v2 is not None else _optional(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))


def _optional(nvml: Any, call: Callable[[], T]) -> T | None:
    """None where this device or driver does not tell; a real fault goes on as an error."""
    try:
        return call()
    except nvml.NVMLError as error:
        if int(error.value) in (NOT_SUPPORTED, FUNCTION_NOT_FOUND):
            return None
        raise


def _binding() -> Any:
    import pynvml

    return pynvml


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _has_nvidia_hardware(pci_devices: Path) -> bool:
    for device in pci_devices.glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        if vendor == _NVIDIA_VENDOR and kind.startswith(_DISPLAY_CLASS):
            return True
    return False


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
