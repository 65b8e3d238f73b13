"""NVML between init and shutdown: opens the GPUs, looks at them again and again, and begins anew after a fault.

Only for the poller's thread. NVML is initialised once and the handles are kept: both are slow to get (a second and more
where the driver does not stay loaded), and cheap to use. GPUs are keyed by UUID, since the index order changes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import structlog

from nodeservice.gpu.binding import binding, has_nvidia_hardware, library_file, text
from nodeservice.gpu.faults import (
    DRIVER_NOT_LOADED,
    LIBRARY_NOT_FOUND,
    NO_PERMISSION,
    OF_ONE_GPU,
    explain,
)
from nodeservice.gpu.reader import Device, as_lost, open_device, read_closeness, read_fast, read_slow
from nodeservice.ports import Gpu, GpuInventory

log = structlog.get_logger(__name__)

_NONE_LISTED = (
    "the driver lists no GPU though this host has one: it could not be initialised; look for NVRM and Xid in `dmesg`,"
    " reset the GPU or restart the machine"
)
_OUTDATED = (
    "the driver was updated or removed while it runs ({} is there no more), and containers would get what does not fit the"
    " kernel's part of it; restart the machine"
)
_PAUSE_FACTOR = 1000
"""One that takes long to fail holds up the look at the others: no more than a thousandth of the time goes to it."""


class NvmlSession:
    """`slow_every`: how many looks there are from one at what changes slowly to the next.

    `open_again_seconds`: how long to wait at least before GPUs that could not be opened are tried again.
    """

    def __init__(self, *, pci_devices: Path, slow_every: int = 5, open_again_seconds: float = 60.0) -> None:
        self._pci_devices = pci_devices
        self._slow_every = slow_every
        self._open_again_seconds = open_again_seconds
        self._open = False
        self._looks = 0
        self._devices: dict[str, Device] = {}
        self._unreachable: dict[int, str] = {}
        self._none_listed = False
        self._library: Path | None = None
        self._is_outdated = False
        self._open_again_at = 0.0
        self._versions: tuple[str | None, str | None] = (None, None)

    @property
    def uuids(self) -> tuple[str, ...]:
        """Of the GPUs that are open now, and answer."""
        return tuple(uuid for uuid, device in self._devices.items() if not device.gpu.lost) if self._open else ()

    def look(self) -> GpuInventory:
        """Raises nothing. With an error, the GPUs are those that were known before it."""
        try:
            return self._look()
        except Exception as error:
            # Not an error of NVML, so the binding's or ours: the node goes on without GPUs and says so.
            log.exception("gpu.look_failed")
            self.end()  # what was begun may be half done
            return self._told(_boot_seconds(), error=f"the GPUs could not be read: {error!r}")

    def look_closely(self) -> GpuInventory:
        """As `look`, at what changes slowly too: a task's energy is what the counter says at its end."""
        self._looks = 0
        return self.look()

    def device(self, uuid: str) -> Device | None:
        return self._devices.get(uuid)

    def end(self) -> None:
        """Shut NVML down. Repeating is harmless."""
        if not self._open:
            return
        self._open = False
        nvml = binding()
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError as error:
            log.debug("gpu.shutdown_failed", code=int(error.value))

    def _look(self) -> GpuInventory:
        nvml = binding()
        began = _boot_seconds()
        if self._none_listed and began >= self._open_again_at:
            self.end()  # NVML lists what there was when it was begun
        try:
            if not self._open:
                self._begin(nvml)
            is_slow = self._looks % self._slow_every == 0
            self._looks += 1
            if is_slow:
                self._is_outdated = self._library is not None and not self._library.exists()
                nvml.nvmlDeviceGetCount()  # tells of a driver that went away where there is no GPU to ask
                if self._unreachable and began >= self._open_again_at:
                    self._take_up(nvml, self._devices | self._open_all(nvml, self._unreachable))
            for device in self._devices.values():
                self._look_at(nvml, device, is_slow=is_slow)
        except nvml.NVMLError as error:
            code = int(error.value)
            self.end()
            absent = code == DRIVER_NOT_LOADED and not has_nvidia_hardware(self._pci_devices)
            if not self._devices and (absent or code == LIBRARY_NOT_FOUND):
                return GpuInventory()
            return self._told(began, error=explain(code))
        return self._told(began)

    def _begin(self, nvml: Any) -> None:
        nvml.nvmlInit()
        self._open = True
        self._looks = 0
        self._library = library_file(nvml)
        cuda = int(nvml.nvmlSystemGetCudaDriverVersion())
        self._versions = text(nvml.nvmlSystemGetDriverVersion()), f"{cuda // 1000}.{cuda % 1000 // 10}"
        known = {
            # One that was there before and is no more is lost; its tasks must hear of it.
            uuid: Device(None, as_lost(device.gpu, "the driver lists it no more"))
            for uuid, device in self._devices.items()
        }
        count = nvml.nvmlDeviceGetCount()
        self._none_listed = count == 0 and not known and has_nvidia_hardware(self._pci_devices)
        self._take_up(nvml, known | self._open_all(nvml, range(count)))

    def _take_up(self, nvml: Any, devices: dict[str, Device]) -> None:
        self._devices = devices
        read_closeness(nvml, [device for device in devices.values() if device.handle is not None])

    def _open_all(self, nvml: Any, indices: Iterable[int]) -> dict[str, Device]:
        """By UUID. Those that can't be opened are tried again later: a reset may mend them."""
        unreachable: dict[int, str] = {}
        found: dict[str, Device] = {}
        lost_seconds = 0.0
        for index in indices:
            began = _boot_seconds()
            try:
                device = open_device(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
                found[device.gpu.uuid] = device
            except nvml.NVMLError as error:
                # The count includes devices that this process may not open: they are not ours, which is no fault.
                if int(error.value) != NO_PERMISSION:
                    unreachable[index] = explain(int(error.value), f"GPU {index}")
                    lost_seconds += _boot_seconds() - began
        self._unreachable = unreachable
        self._open_again_at = _boot_seconds() + max(self._open_again_seconds, _PAUSE_FACTOR * lost_seconds)
        return found

    def _look_at(self, nvml: Any, device: Device, *, is_slow: bool) -> None:
        """What fails for one GPU is that GPU's; what fails for all goes on as an error."""
        try:
            if device.gpu.lost:
                if not is_slow:
                    return
                device.handle = nvml.nvmlDeviceGetHandleByUUID(device.gpu.uuid)
            if is_slow:
                read_slow(nvml, device)
            read_fast(nvml, device)
        except nvml.NVMLError as error:
            code = int(error.value)
            if code not in OF_ONE_GPU and not device.gpu.lost:
                raise
            device.gpu = as_lost(device.gpu, explain(code))

    def _told(self, began: float, *, error: str | None = None) -> GpuInventory:
        driver, cuda = self._versions
        return GpuInventory(
            gpus=tuple(sorted((device.gpu for device in self._devices.values()), key=_place)),
            driver_version=driver,
            cuda_version=cuda,
            error=error,
            unreachable=(*self._unreachable.values(), *([_NONE_LISTED] if self._none_listed else ())),
            outdated=_OUTDATED.format(self._library) if self._is_outdated else "",
            looked_at_seconds=began,
        )


def _boot_seconds() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _place(gpu: Gpu) -> tuple[str, str]:
    return gpu.pci_address or "", gpu.uuid
