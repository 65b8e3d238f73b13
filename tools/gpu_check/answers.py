"""Checks: what each GPU tells, its health, its ways to others, its events; many threads; what a call costs."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

from gpu_check.bench import EXPECTED_ERRORS, Bench, Gpu
from gpu_check.record import CannotRunError, Finding

_RECOVERY_ACTION = 230
_ENERGY = 83
_NEEDED = {"count", "handle by index", "handle by UUID", "name", "memory, version 1", "processes, version 2", "PCI"}
_THREADS = 8
_MOST_SECONDS_A_CALL = 10.0


def readings(bench: Bench, finding: Finding) -> None:
    """Each GPU answers what the node asks of it, or says that it does not support it; memory adds up."""
    for gpu in bench.gpus:
        answers = {name: bench.attempt(call) for name, call in calls(bench, gpu).items()}
        # What it answers for a cgroup that nobody limited is not documented.
        finding.fact(f"{gpu.label}, memory limits", {"answer": answers.pop("memory limits")})
        finding.fact(gpu.label, {name: _short(answer) for name, answer in answers.items()})
        for name, answer in answers.items():
            finding.expect(_code(answer) in _allowed(bench, gpu, name), f"{gpu.label}: {name}: {answer}")
        _add_up(finding, gpu, answers)


def _allowed(bench: Bench, gpu: Gpu, name: str) -> set[int]:
    """The codes that are no failure."""
    if name not in _NEEDED:
        return {0, *EXPECTED_ERRORS}
    # A split GPU as a whole is only for the privileged.
    return {0, 4} if bench.has_mig(gpu) and os.geteuid() != 0 else {0}


def _add_up(finding: Finding, gpu: Gpu, answers: dict[str, Any]) -> None:
    old, new = answers["memory, version 1"], answers["memory, version 2"]
    if isinstance(old, str) or isinstance(new, str):
        return
    whole = new.used + new.reserved + new.free
    finding.expect(old.used + old.free == old.total, f"{gpu.label}: memory, version 1, does not add up")
    finding.expect(whole == new.total, f"{gpu.label}: used + reserved + free is {whole} of {new.total} bytes")
    finding.expect(old.total == new.total, f"{gpu.label}: the versions tell of other totals")


def health(bench: Bench, finding: Finding) -> None:
    """The ways by which the node learns of a sick GPU answer. What they say is a fact, not a failure of the check."""
    nvml = bench.nvml
    for gpu in bench.gpus:
        handle = gpu.handle
        (action,) = nvml.nvmlDeviceGetFieldValues(handle, [_RECOVERY_ACTION])
        known = action.nvmlReturn == nvml.NVML_SUCCESS
        facts = {
            "recovery action": int(action.value.uiVal) if known else f"code {action.nvmlReturn}",
            "ECC": bench.attempt(lambda h=handle: nvml.nvmlDeviceGetEccMode(h)),
            "uncorrected, volatile": bench.attempt(lambda h=handle: nvml.nvmlDeviceGetTotalEccErrors(h, 1, 0)),
            "uncorrected, aggregate": bench.attempt(lambda h=handle: nvml.nvmlDeviceGetTotalEccErrors(h, 1, 1)),
            "remapped rows": bench.attempt(lambda h=handle: nvml.nvmlDeviceGetRemappedRows(h)),
            "retired pages pending": bench.attempt(lambda h=handle: nvml.nvmlDeviceGetRetiredPagesPendingStatus(h)),
            "clocks are held back by": bench.attempt(lambda h=handle: hex(reasons(bench, h))),
        }
        finding.fact(gpu.label, {name: _short(fact) for name, fact in facts.items()})
        finding.expect(not known or 0 <= action.value.uiVal < 16, f"{gpu.label}: recovery action {action.value.uiVal}")
        finding.expect(
            _code(facts["uncorrected, volatile"]) in (0, 3, 4),
            f"{gpu.label}: ECC errors: {facts['uncorrected, volatile']}",
        )


def reasons(bench: Bench, handle: Any) -> int:
    """By the new name of the call, or by the old one."""
    try:
        return int(bench.nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    except bench.nvml.NVMLError as error:
        if error.value != bench.nvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        return int(bench.nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))


def topology(bench: Bench, finding: Finding) -> None:
    """NVLinks and each pair of GPUs answer alike from both ends."""
    nvml = bench.nvml
    for gpu in bench.gpus:
        states = [bench.attempt(lambda g=gpu, n=n: nvml.nvmlDeviceGetNvLinkState(g.handle, n)) for n in range(18)]
        row: dict[str, Any] = {"NVLinks up": states.count(1), "NVLinks down": states.count(0)}
        for other in bench.gpus:
            if other is gpu:
                continue
            level, back = (
                bench.attempt(lambda a=a, b=b: nvml.nvmlDeviceGetTopologyCommonAncestor(a.handle, b.handle))
                for a, b in ((gpu, other), (other, gpu))
            )
            # NVML_P2P_CAPS_INDEX_READ is a tuple in the binding; its number is 0.
            reads = bench.attempt(lambda a=gpu, b=other: nvml.nvmlDeviceGetP2PStatus(a.handle, b.handle, 0))
            row[f"to {other.index}"] = f"level {level}, P2P reads {reads}"
            finding.expect(level == back, f"{gpu.label} and {other.label} do not agree on their way")
        finding.fact(gpu.label, row)


def events(bench: Bench, finding: Finding) -> None:
    """An event set takes the GPUs, its wait times out when nothing happens, and blocks no other thread."""
    nvml = bench.nvml
    event_set = nvml.nvmlEventSetCreate()
    try:
        for gpu in bench.gpus:
            supported = nvml.nvmlDeviceGetSupportedEventTypes(gpu.handle)
            finding.fact(gpu.label, {"supported event types": hex(supported)})
            if finding.expect(bool(supported & nvml.nvmlEventTypeXidCriticalError), f"{gpu.label}: no XID events"):
                nvml.nvmlDeviceRegisterEvents(gpu.handle, supported & nvml.nvmlEventTypeXidCriticalError, event_set)
        seen: list[Any] = []
        began = time.monotonic()
        waiter = threading.Thread(target=lambda: seen.append(bench.code(lambda: nvml.nvmlEventSetWait(event_set, 500))))
        waiter.start()
        calls_meanwhile = 0
        while waiter.is_alive() and time.monotonic() - began < 30:
            nvml.nvmlDeviceGetCount()
            calls_meanwhile += 1
            time.sleep(0.01)
        waited_seconds = time.monotonic() - began
        finding.expect(not waiter.is_alive(), "the wait of 500 ms has not ended after 30 s")
        if seen == [0]:
            raise CannotRunError("an event came meanwhile; look at dmesg, and run this again")
        finding.expect(seen == [nvml.NVML_ERROR_TIMEOUT], f"the wait ended with code {seen}, not with a timeout")
        finding.expect(waited_seconds >= 0.45, f"a wait of 500 ms took {waited_seconds:.2f} s")
        finding.expect(calls_meanwhile > 1, "no other call was answered during the wait")
    finally:
        nvml.nvmlEventSetFree(event_set)


def threads(bench: Bench, finding: Finding) -> None:
    """Eight threads at once get the answers that one gets."""
    nvml = bench.nvml
    wrong: list[str] = []
    rounds = max(1, bench.options.repeat // 5)

    def look() -> None:
        try:
            for _ in range(rounds):
                for gpu in bench.gpus:
                    if nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByUUID(gpu.uuid)) != gpu.uuid:
                        wrong.append(f"another UUID for {gpu.label}")
                    nvml.nvmlDeviceGetMemoryInfo(gpu.handle)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")

    workers = [threading.Thread(target=look) for _ in range(_THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    finding.fact("calls", _THREADS * rounds * len(bench.gpus) * 3)
    finding.expect(not wrong, "; ".join(sorted(set(wrong))))


def timing(bench: Bench, finding: Finding) -> None:
    """What each call costs, in microseconds, the binding included."""
    repeat = bench.options.repeat
    gpu = bench.gpus[0]
    for name, call in calls(bench, gpu).items():
        answer = bench.attempt(call)
        microseconds: list[float] = []
        end = time.monotonic() + _MOST_SECONDS_A_CALL
        while len(microseconds) < repeat and time.monotonic() < end:
            began = time.perf_counter_ns()
            bench.attempt(call)
            microseconds.append((time.perf_counter_ns() - began) / 1000)
        microseconds.sort()
        finding.fact(
            name,
            {
                "median": round(statistics.median(microseconds), 1),
                "99 of 100": round(microseconds[int(len(microseconds) * 0.99)], 1),
                "longest": round(microseconds[-1], 1),
                "times": len(microseconds),
                "answer": answer if _code(answer) else "",
            },
        )


def calls(bench: Bench, gpu: Gpu) -> dict[str, Callable[[], Any]]:
    """What the node may ask of a GPU, by name. All of it only reads."""
    nvml, handle = bench.nvml, gpu.handle
    return {
        "count": nvml.nvmlDeviceGetCount,
        "handle by index": lambda: nvml.nvmlDeviceGetHandleByIndex(gpu.index),
        "handle by UUID": lambda: nvml.nvmlDeviceGetHandleByUUID(gpu.uuid),
        "name": lambda: nvml.nvmlDeviceGetName(handle),
        "memory, version 1": lambda: nvml.nvmlDeviceGetMemoryInfo(handle),
        "memory, version 2": lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2),
        "utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(handle),
        "power": lambda: nvml.nvmlDeviceGetPowerUsage(handle),
        "power limit": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle),
        "energy": lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle),
        "temperature": lambda: nvml.nvmlDeviceGetTemperature(handle, 0),
        "temperature, new call": lambda: nvml.nvmlDeviceGetTemperatureV(handle, 0),
        "clocks event reasons": lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle),
        "clocks throttle reasons": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
        "ECC mode": lambda: nvml.nvmlDeviceGetEccMode(handle),
        "ECC errors": lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, 1, 0),
        "remapped rows": lambda: nvml.nvmlDeviceGetRemappedRows(handle),
        "retired pages pending": lambda: nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle),
        "two field values": lambda: nvml.nvmlDeviceGetFieldValues(handle, [_RECOVERY_ACTION, _ENERGY]),
        "processes, version 2": lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v2(handle),
        "processes, version 3": lambda: nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle),
        "graphics processes": lambda: nvml.nvmlDeviceGetGraphicsRunningProcesses_v3(handle),
        "MPS processes": lambda: nvml.nvmlDeviceGetMPSComputeRunningProcesses_v3(handle),
        "process utilisation": lambda: nvml.nvmlDeviceGetProcessUtilization(handle, 0),
        "MIG mode": lambda: nvml.nvmlDeviceGetMigMode(handle),
        "MIG device count": lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(handle),
        "compute mode": lambda: nvml.nvmlDeviceGetComputeMode(handle),
        "accounting mode": lambda: nvml.nvmlDeviceGetAccountingMode(handle),
        "PCI": lambda: nvml.nvmlDeviceGetPciInfo(handle).busId,
        "NUMA node": lambda: nvml.nvmlDeviceGetNumaNodeId(handle),
        "NVLink 0": lambda: nvml.nvmlDeviceGetNvLinkState(handle, 0),
        "memory limits": lambda: _limits(nvml, handle),
    }


def _limits(nvml: Any, handle: Any) -> Any:
    """Reads; since R615."""
    asked = nvml.c_nvmlGetMemoryLimits_v1_t(b"/sys/fs/cgroup")
    nvml.nvmlDeviceGetMemoryLimits_v1(handle, asked)
    return [asked.softLimit, asked.hardLimit, asked.currentUsed]


def _code(answer: Any) -> int:
    """The number in "NotSupported (3)"; 0 for an answer."""
    if isinstance(answer, str) and answer.endswith(")") and answer.rpartition("(")[2][:-1].isdigit():
        return int(answer.rpartition("(")[2][:-1])
    return 0


def _short(answer: Any) -> Any:
    if hasattr(answer, "_fields_"):
        return {name: getattr(answer, name) for name, *_ in answer._fields_ if name != "version"}
    if isinstance(answer, list):
        return len(answer) if answer and not isinstance(answer[0], int) else answer
    if isinstance(answer, (int, str, tuple, float)) or answer is None:
        return answer
    return "answered"
