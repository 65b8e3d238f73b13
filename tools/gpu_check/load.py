"""Checks with a CUDA program of our own: the memory of a process, and energy and utilisation under load."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from gpu_check.bench import MIB, Bench
from gpu_check.cuda import CudaProgram
from gpu_check.record import CannotRunError, Finding

_CONTEXT_BYTES = 1536 * MIB
"""More than a CUDA context with its libraries takes."""
_RETURN_SECONDS = 15.0


def processes(bench: Bench, finding: Finding) -> None:
    """A program's memory is told under its PID, as much as it took and little more, and returns when it is killed."""
    gpu, uuid, handle = bench.idle_device()
    size_bytes = _size(bench, handle)
    before_bytes = bench.used_bytes(handle)
    finding.fact("device", gpu.label if uuid == gpu.uuid else uuid[:12])
    with CudaProgram(uuid) as program:
        own_bytes = int(program.order("allocate", size_bytes)["value"])
        finding.fact("with", program.library)
        listed = bench.processes(handle)
        used_bytes = bench.used_bytes(handle)
        finding.fact("asked for MiB", size_bytes // MIB)
        finding.fact("taken MiB, by the program's own account", own_bytes // MIB)
        finding.fact("more in use on the device, MiB", (used_bytes - before_bytes) // MIB)
        if finding.expect(program.pid in listed, f"NVML lists PIDs {sorted(listed)} and not {program.pid}"):
            told = listed[program.pid]
            finding.fact("told by NVML MiB", told if told is None else told // MIB)
            if finding.expect(told is not None, "NVML does not tell the process's memory"):
                finding.expect(
                    own_bytes <= told <= own_bytes + _CONTEXT_BYTES,
                    f"NVML tells {told // MIB} MiB for a program that took {own_bytes // MIB} MiB",
                )
        finding.expect(used_bytes - before_bytes >= own_bytes, "the device's used memory grew by less than was taken")
        killed_at = time.monotonic()
        program.kill()
    gone = _within(_RETURN_SECONDS, lambda: program.pid not in bench.processes(handle))
    finding.expect(gone, f"the killed program is still listed after {_RETURN_SECONDS:g} s")
    returned = _within(_RETURN_SECONDS, lambda: bench.used_bytes(handle) < before_bytes + own_bytes // 2)
    finding.expect(returned, f"its memory is still in use {_RETURN_SECONDS:g} s after the kill")
    finding.fact("memory was back after seconds", round(time.monotonic() - killed_at, 3))


def energy(bench: Bench, finding: Finding) -> None:
    """Under load a GPU takes more power, its energy counter grows by what the power says, and it is busy."""
    nvml = bench.nvml
    gpu, uuid, handle = bench.idle_device()
    if not isinstance(bench.attempt(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)), int):
        raise CannotRunError(f"{gpu.name} tells no energy")
    with CudaProgram(uuid) as program:
        program.order("allocate", _size(bench, handle))
        # The first work loads kernels. Power readings are means over a second, so both states are left to settle.
        seconds = bench.options.measure_seconds
        program.order("work", seconds / 8)
        time.sleep(seconds / 2)
        idle = _measure(bench, gpu.handle, lambda: True)
        program.begin("work", seconds * 2)
        time.sleep(seconds / 2)
        busy = _measure(bench, gpu.handle, program.is_working)
        last_seen = int((time.time() - 3) * 1e6)
        samples = bench.attempt(lambda: nvml.nvmlDeviceGetProcessUtilization(gpu.handle, last_seen))
        program.end()
        listed = isinstance(samples, list) and any(sample.pid == program.pid for sample in samples)
        finding.fact(
            "utilisation by process", "told" if listed else samples if isinstance(samples, str) else "not of ours"
        )
    finding.fact("with", program.library)
    for name, figures in (("idle", idle), ("busy", busy)):
        finding.facts |= {f"{name}: {key}": value for key, value in figures.items()}
    finding.expect(busy["watts by energy"] > idle["watts by energy"], "the load took no more energy than idling did")
    by_power = busy["watts by power, mean"]
    finding.expect(
        abs(busy["watts by energy"] - by_power) <= 0.3 * by_power,
        f"the energy counter says {busy['watts by energy']} W where the power readings say {by_power} W",
    )
    utilisation = busy["utilisation %, median"]
    if isinstance(utilisation, (int, float)):
        finding.expect(utilisation >= 50, f"a GPU at work is told to be {utilisation} % busy")
    elif not bench.has_mig(gpu):
        finding.expect(False, f"no utilisation: {utilisation}")


def xid(bench: Bench, finding: Finding) -> None:
    """An illegal write by a program of ours is told as an XID of its GPU, and harms nothing but that program."""
    if not bench.options.provoke_xid:
        raise CannotRunError("only with --provoke-xid: it writes an error to the kernel's log")
    nvml = bench.nvml
    gpu, uuid, _ = bench.idle_device()
    event_set = nvml.nvmlEventSetCreate()
    try:
        nvml.nvmlDeviceRegisterEvents(gpu.handle, nvml.nvmlEventTypeXidCriticalError, event_set)
        with CudaProgram(uuid, "driver") as program:
            program.order("allocate", MIB)
            finding.fact("CUDA says", program.order("fault")["value"])
        try:
            event = nvml.nvmlEventSetWait(event_set, 10_000)
        except nvml.NVMLError as error:
            finding.expect(False, f"no event within 10 s: {error}")
            return
        finding.fact("XID", int(event.eventData))
        finding.fact("GPU instance", int(event.gpuInstanceId))
        finding.expect(nvml.nvmlDeviceGetUUID(event.device) == gpu.uuid, "the event names another GPU")
        finding.expect(int(event.eventData) in (13, 31), f"XID {event.eventData} for an illegal write, not 13 or 31")
    finally:
        nvml.nvmlEventSetFree(event_set)


def _size(bench: Bench, handle: Any) -> int:
    """1 GiB, or a quarter of what is free."""
    free_bytes = int(bench.nvml.nvmlDeviceGetMemoryInfo(handle).free)
    return int(min(1024 * MIB, free_bytes // 4 // MIB * MIB))


def _measure(bench: Bench, handle: Any, goes_on: Callable[[], bool]) -> dict[str, Any]:
    nvml = bench.nvml
    watts, utilisation = [], []
    began, joules = time.monotonic(), nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
    while goes_on() and time.monotonic() - began < bench.options.measure_seconds:
        watts.append(nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        utilisation.append(bench.attempt(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        time.sleep(0.05)
    seconds = time.monotonic() - began
    joules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 - joules
    numbers = [value for value in utilisation if isinstance(value, int)]
    return {
        "seconds": round(seconds, 2),
        "watts by energy": round(joules / seconds, 1),
        "watts by power, mean": round(statistics.fmean(watts), 1),
        "utilisation %, median": statistics.median(numbers) if numbers else utilisation[0],
        "°C": bench.attempt(lambda: nvml.nvmlDeviceGetTemperature(handle, 0)),
    }


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
