"""The GPUs of this host through NVML: implements the port GpuProvider.

A driver may hang in any call. So nobody but two threads ever calls it: one looks at the GPUs again and again, one waits for
events. Everybody else gets what was seen last, and an error once that is too old.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from nodeservice.errors import NodeFaultError
from nodeservice.gpu.binding import LIBRARY, binding, can_load
from nodeservice.gpu.events import XidListener
from nodeservice.gpu.faults import explain
from nodeservice.gpu.poller import Poller
from nodeservice.gpu.session import NvmlSession
from nodeservice.ports import GpuInventory, GpuXid

log = structlog.get_logger(__name__)

_PCI_DEVICES = Path("/sys/bus/pci/devices")
_CLOSE_SECONDS = 1.0


class NvmlGpuProvider:
    """No library, or a library without driver and without hardware: no GPUs, no error. Anything else broken: an error."""

    def __init__(
        self,
        *,
        timeout_seconds: float = 5.0,
        poll_seconds: float = 1.0,
        pci_devices: Path = _PCI_DEVICES,
        library: str = LIBRARY,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._library = library
        self._session = NvmlSession(pci_devices=pci_devices)
        self._poller: Poller[GpuInventory] = Poller(
            "nodeservice-nvml", self._session.look, every_seconds=poll_seconds, on_look=self._looked
        )
        self._xids = XidListener(lambda: self._session.uuids)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._first_look = asyncio.Event()
        self._told_error: str | None = None
        self._closed = False

    async def inventory(self) -> GpuInventory:
        """As the port says. Without the library, no thread is started and the binding is never imported."""
        if not self._poller.is_started and not self._closed:
            if not can_load(self._library):
                return GpuInventory()
            self._loop = asyncio.get_running_loop()
            self._poller.start()
        if self._poller.last is None and not self._closed:
            left_seconds = self._timeout_seconds - self._poller.busy_seconds
            if left_seconds > 0:
                await asyncio.wait([asyncio.ensure_future(self._first_look.wait())], timeout=left_seconds)
        found = self._poller.last or GpuInventory()
        if self._poller.busy_seconds >= self._timeout_seconds:
            words = f"NVML has not answered for {self._timeout_seconds:g} s and more; look at `nvidia-smi` and `dmesg`"
            found = replace(found, error=words)
        if found.error != self._told_error:
            self._told_error = found.error
            if found.error is not None:
                log.warning("gpu.faulty", error=found.error)
            else:
                log.info("gpu.well_again")
        return found

    async def refresh(self) -> GpuInventory:
        if self._poller.last is not None and not self._closed and self._poller.busy_seconds < self._timeout_seconds:
            looking = self._poller.look_now(self._session.look_closely)
            await asyncio.wait([asyncio.wrap_future(looking)], timeout=self._timeout_seconds)
        return await self.inventory()

    def take_xids(self) -> Sequence[GpuXid]:
        return self._xids.take()

    def xid_counts(self) -> Mapping[tuple[str, int], int]:
        """The events since this process began, by UUID and code."""
        return self._xids.counts()

    async def limit_memory(self, uuid: str, cgroup: str, limit_bytes: int) -> int:
        future = self._poller.order(lambda: self._limit_memory(uuid, cgroup, limit_bytes))
        try:
            async with asyncio.timeout(self._timeout_seconds):
                held = await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise _not_enforced(f"NVML has not answered for {self._timeout_seconds:g} s") from error
        assert isinstance(held, int)
        return held

    async def close(self) -> None:
        """Shut NVML down, unless it hangs. Repeating is harmless."""
        if self._closed:
            return
        self._closed = True
        self._xids.end()
        if self._poller.is_started:
            ending = asyncio.wrap_future(self._poller.order(self._session.end))
            await asyncio.wait([ending], timeout=_CLOSE_SECONDS)
        self._poller.end()

    def _looked(self) -> None:
        """In the poller's thread."""
        if self._session.uuids:
            self._xids.start()
        if self._loop is not None and not self._first_look.is_set() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._first_look.set)

    def _limit_memory(self, uuid: str, cgroup: str, limit_bytes: int) -> int:
        """In the poller's thread. The soft limit stays 0: it would outlive the cgroup in the driver's books."""
        device = self._session.device(uuid)
        if device is None or device.handle is None:
            raise _not_enforced(f"{uuid} is not there")
        nvml = binding()
        name = cgroup.encode()
        try:
            wanted = nvml.c_nvmlSetMemoryLimits_v1_t(name, 0, limit_bytes)
            nvml.nvmlDeviceSetMemoryLimits_v1(device.handle, wanted)
            held = nvml.c_nvmlGetMemoryLimits_v1_t(name)
            nvml.nvmlDeviceGetMemoryLimits_v1(device.handle, held)
        except nvml.NVMLError as error:
            raise _not_enforced(explain(int(error.value), uuid)) from error
        return int(held.hardLimit)


def _not_enforced(words: str) -> NodeFaultError:
    return NodeFaultError(f"the driver does not limit the GPU memory: {words}", reason="LIMIT_NOT_ENFORCED")
