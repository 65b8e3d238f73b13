"""The GPUs of this machine through NVML, and the library that answers: a real one or a false one."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_check.record import CannotRunError

MIB = 1024 * 1024
EXPECTED_ERRORS = {1, 2, 3, 4, 6, 13}
"""Codes that say "not here" or "not you", not that something is broken."""


@dataclass(kw_only=True)
class Gpu:
    """One whole GPU. `label` is short enough for a report, and does not name the very device to the world."""

    index: int
    handle: Any
    uuid: str
    name: str
    bus_id: str

    minor: int

    @property
    def label(self) -> str:
        return f"{self.index} {self.uuid[:12]}"

    @property
    def node(self) -> Path:
        return Path(f"/dev/nvidia{self.minor}")


@dataclass(kw_only=True)
class Bench:
    """What the checks work with."""

    nvml: Any
    gpus: list[Gpu]
    pretended: str | None
    options: argparse.Namespace
    settings: dict[str, Any] = field(default_factory=dict)

    def attempt(self, call: Callable[[], Any]) -> Any:
        """What it returns, or the error in words."""
        try:
            return call()
        except self.nvml.NVMLError as error:
            return f"{type(error).__name__.removeprefix('NVMLError_')} ({error.value})"
        except self.nvml.NVMLLibraryMismatchError:
            return "FunctionNotFound (13)"

    def code(self, call: Callable[[], Any]) -> int:
        try:
            call()
        except self.nvml.NVMLError as error:
            return int(error.value)
        return 0

    def used_bytes(self, handle: Any) -> int:
        """What is allocated. Without version 2 of the call, also what the driver reserves."""
        try:
            return int(self.nvml.nvmlDeviceGetMemoryInfo(handle, version=self.nvml.nvmlMemory_v2).used)
        except self.nvml.NVMLError:
            return int(self.nvml.nvmlDeviceGetMemoryInfo(handle).used)

    def processes(self, handle: Any) -> dict[int, int | None]:
        """PID → used bytes of what computes there, with the newest version of the call that there is."""
        try:
            entries = self.nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
        except self.nvml.NVMLError as error:
            if error.value != self.nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                raise
            entries = self.nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle)
        return {entry.pid: entry.usedGpuMemory for entry in entries}

    def mig_devices(self, gpu: Gpu) -> dict[str, Any]:
        """UUID → handle. The indices have holes."""
        nvml = self.nvml
        devices = {}
        for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu.handle)):
            try:
                handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu.handle, index)
            except nvml.NVMLError as error:
                if error.value not in (nvml.NVML_ERROR_NOT_FOUND, nvml.NVML_ERROR_INVALID_ARGUMENT):
                    raise
                continue
            devices[nvml.nvmlDeviceGetUUID(handle)] = handle
        return devices

    def has_mig(self, gpu: Gpu) -> bool:
        mode = self.attempt(lambda: self.nvml.nvmlDeviceGetMigMode(gpu.handle))
        return isinstance(mode, list) and mode[0] == 1

    def idle_device(self) -> tuple[Gpu, str, Any]:
        """A device that nobody uses, for a program of ours: its GPU, its UUID, its handle. A MIG device where MIG is on."""
        asked = self.options.gpu
        for gpu in self.gpus:
            devices = self.mig_devices(gpu) if self.has_mig(gpu) else {gpu.uuid: gpu.handle}
            for uuid, handle in devices.items():
                if asked in (uuid, None) and not self.processes(handle):
                    return gpu, uuid, handle
        raise CannotRunError(
            f"GPU {asked} is not here or in use" if asked else "each GPU is in use; name one with --gpu"
        )

    def real_only(self) -> None:
        if self.pretended:
            raise CannotRunError("the driver is pretended, and so there is nothing to compare it with")


def open_bench(nvml: Any, options: argparse.Namespace) -> Bench:
    """NVML initialised. CannotRunError says why it cannot be."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise CannotRunError(f"NVML does not start: {error} ({error.value})") from error
    bench = Bench(nvml=nvml, gpus=[], pretended=_pretended(nvml), options=options)
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError:
            continue  # counted, and not ours to open
        gpu = Gpu(
            index=index,
            handle=handle,
            uuid=nvml.nvmlDeviceGetUUID(handle),
            name=nvml.nvmlDeviceGetName(handle),
            bus_id=nvml.nvmlDeviceGetPciInfo(handle).busId,
            minor=nvml.nvmlDeviceGetMinorNumber(handle),
        )
        bench.gpus.append(gpu)
    if not bench.gpus:
        raise CannotRunError("NVML works and finds no GPU that may be opened here")
    bench.settings = settings(bench)
    return bench


def _pretended(nvml: Any) -> str | None:
    """The machine's name, where the library is the false driver of this project: it says so by a function of its own."""
    name = ctypes.create_string_buffer(64)
    try:
        nvml.nvmlLib.nvmlFalseDriverMachine(name, 64)
    except AttributeError:
        # Another false library would not be caught by that; a real driver shows itself to the kernel.
        return None if Path("/proc/driver/nvidia/version").exists() else "unknown: no NVIDIA driver in this kernel"
    return name.value.decode()


def settings(bench: Bench) -> dict[str, Any]:
    """What must be the same at the end: nothing here is ours to change."""
    nvml = bench.nvml
    asked = {
        "MIG": nvml.nvmlDeviceGetMigMode,
        "compute mode": nvml.nvmlDeviceGetComputeMode,
        "persistence": nvml.nvmlDeviceGetPersistenceMode,
        "accounting": nvml.nvmlDeviceGetAccountingMode,
        "power limit mW": nvml.nvmlDeviceGetPowerManagementLimit,
        "ECC": nvml.nvmlDeviceGetEccMode,
    }
    return {
        gpu.label: {name: bench.attempt(lambda ask=ask, gpu=gpu: ask(gpu.handle)) for name, ask in asked.items()}
        for gpu in bench.gpus
    }


def describe(bench: Bench) -> dict[str, Any]:
    """The machine, without what would name it."""
    nvml = bench.nvml
    names = [gpu.name for gpu in bench.gpus]
    what = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    memory = re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())
    release = Path("/etc/os-release")
    system = re.search(r'^PRETTY_NAME="?([^"\n]+)', release.read_text() if release.exists() else "", re.MULTILINE)
    return {
        "title": f"Checks of {what}",
        "pretended": bench.pretended,
        "date": datetime.now(UTC).date().isoformat(),
        "GPUs": what,
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "NVML": nvml.nvmlSystemGetNVMLVersion(),
        "CUDA of the driver": bench.attempt(nvml.nvmlSystemGetCudaDriverVersion_v2),
        "system": f"{system[1] if system else '?'}, kernel {platform.release()}, {platform.machine()}",
        "CPUs": os.cpu_count(),
        "memory": f"{int(memory[1]) // MIB if memory else '?'} GiB",
        "Python": platform.python_version(),
        "user": "root" if os.geteuid() == 0 else "not root",
    }
