"""Waits for the driver's error events (XID) in a thread of its own, since the wait blocks.

Events that came before the registration are never told, so it is made as soon as the GPUs are open, and made anew whenever
NVML was begun anew, or a GPU was lost or came back: a lost one ends every wait, and a reset may end its registration.
"""

from __future__ import annotations

import ctypes
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog

from nodeservice.gpu.binding import binding, optional, text
from nodeservice.gpu.faults import TIMEOUT
from nodeservice.ports import GpuXid

log = structlog.get_logger(__name__)

_WAIT_MILLISECONDS = 1000
_PAUSE_SECONDS = 1.0
_MOST_WAITING = 1000
_WHOLE_GPU = 0xFFFFFFFF


class XidListener:
    """`uuids` are asked before each wait: a change makes a new registration."""

    def __init__(self, uuids: Callable[[], Sequence[str]]) -> None:
        self._uuids = uuids
        self._events: deque[GpuXid] = deque(maxlen=_MOST_WAITING)
        self._counts: Counter[tuple[str, int]] = Counter()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="nodeservice-nvml-events", daemon=True)
            self._thread.start()

    def take(self) -> list[GpuXid]:
        """What came since the last call, oldest first."""
        taken: list[GpuXid] = []
        with suppress(IndexError):
            while True:
                taken.append(self._events.popleft())
        return taken

    def counts(self) -> dict[tuple[str, int], int]:
        """How many came since this process began, by UUID and code."""
        return self._counts.copy()

    def end(self) -> None:
        """Let the thread end after its present wait. Does not wait."""
        self._ended.set()

    def _run(self) -> None:
        nvml = binding()
        while not self._ended.is_set():
            uuids = tuple(self._uuids())
            if not uuids:
                self._ended.wait(_PAUSE_SECONDS)
                continue
            try:
                nvml.nvmlInit()  # counted: this thread's share of NVML, given back below
            except nvml.NVMLError:
                self._ended.wait(_PAUSE_SECONDS)
                continue
            try:
                self._listen(nvml, uuids)
            except Exception:
                log.exception("gpu.events_failed")
                self._ended.wait(_PAUSE_SECONDS)
            finally:
                with suppress(nvml.NVMLError):
                    nvml.nvmlShutdown()

    def _listen(self, nvml: Any, uuids: Sequence[str]) -> None:
        try:
            events = nvml.nvmlEventSetCreate()
        except nvml.NVMLError as error:
            log.warning("gpu.events_unavailable", code=int(error.value))
            self._ended.wait(_PAUSE_SECONDS)
            return
        try:
            names: dict[int | None, str] = {}
            for uuid in uuids:
                _register(nvml, events, uuid, names)
            while not self._ended.is_set():
                has_changed = tuple(self._uuids()) != tuple(uuids)
                if not self._wait(nvml, events, names) and has_changed:  # what had come before is told
                    break
        finally:
            with suppress(nvml.NVMLError):
                nvml.nvmlEventSetFree(events)

    def _wait(self, nvml: Any, events: Any, names: Mapping[int | None, str]) -> bool:
        """Whether an event came."""
        try:
            event = nvml.nvmlEventSetWait_v2(events, _WAIT_MILLISECONDS)
            # One that has just fallen off the bus tells its UUID no more.
            uuid = names.get(_address(event.device)) or text(nvml.nvmlDeviceGetUUID(event.device))
        except nvml.NVMLError as error:
            if int(error.value) != TIMEOUT:
                # A lost GPU ends every wait at once; the look at the GPUs tells which one it is.
                self._ended.wait(_PAUSE_SECONDS)
            return False
        instance = int(event.gpuInstanceId)
        xid = GpuXid(uuid=uuid, code=int(event.eventData), gpu_instance_id=None if instance == _WHOLE_GPU else instance)
        self._events.append(xid)
        self._counts[uuid, xid.code] += 1
        return True


def _register(nvml: Any, events: Any, uuid: str, names: dict[int | None, str]) -> None:
    """For critical errors alone: others are read with each look. A GPU that can't tell of them goes without.

    `names` gets the UUID by the handle that events will bear.
    """
    with suppress(nvml.NVMLError):
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        names[_address(handle)] = uuid
        supported = optional(nvml, nvml.nvmlDeviceGetSupportedEventTypes, handle) or 0
        wanted = int(supported) & int(nvml.nvmlEventTypeXidCriticalError)
        if wanted:
            nvml.nvmlDeviceRegisterEvents(handle, wanted, events)


def _address(handle: Any) -> int | None:
    """What makes two handles of one device equal: the binding makes a fresh pointer for each."""
    return ctypes.cast(handle, ctypes.c_void_p).value
