"""How each GPU is: takes what is seen and what the driver tells, and says which are well, suspect or faulty. Pure.

A fault is told once, for the tasks that hold the GPU then. The GPU stays in quarantine, with its MIG instances, until
nothing has been wrong with it for a while; one that needs a reset, until there is a sign that it had one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from nodeservice.gpu.throttle import HARMFUL, throttle_names
from nodeservice.gpu.xid import Blame, blame, words
from nodeservice.ports import Gpu, GpuXid

_ACTIONS = {
    1: "the driver asks for a reset of the GPU (nvidia-smi --gpu-reset)",
    2: "the driver asks for a restart of the host",
    3: "the driver asks to drain the GPU's peers",
    4: "the driver asks to drain and reset the GPU",
    5: "the driver asks to recover the IMEX domain",
    6: "the driver asks for a reset of the GPU's bus",
    7: "the driver asks for a restart of the system",
}
"""Source: nvmlDeviceGpuRecoveryAction_t in nvml.h; docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt says what each wants."""
_ENDS_TASKS = frozenset({1, 2, 6, 7})
"""With the others, what runs already and is not touched may go on; so with those that newer drivers may bring."""
_RESET_REMEDY = "reset it (nvidia-smi --gpu-reset) or restart the host"


class GpuState(StrEnum):
    WELL = "WELL"
    SUSPECT = "SUSPECT"
    """It takes no new tasks; those that hold it go on."""
    FAULTY = "FAULTY"
    """It takes no new tasks, and those that held it have failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFault:
    """What ends the tasks that hold the GPU, or this one MIG instance of it."""

    uuid: str
    words: str
    gpu_instance_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AwaitedReset:
    """Why a GPU needs one, and what its energy counter said last: it begins anew with a reset."""

    words: str
    energy_millijoules: int | None

    def __post_init__(self) -> None:
        """TypeError for what was written by somebody else."""
        if not isinstance(self.words, str) or not isinstance(self.energy_millijoules, int | None):
            raise TypeError("not what waits for a reset")


@dataclass(slots=True)
class _Chart:
    state: GpuState = GpuState.WELL
    words: str = ""
    """Why it is not well: the first cause, or the first that needs a reset."""
    last_trouble_at: float = 0.0
    needs_reset: bool = False
    was_lost: bool = False
    told: set[int | None] = field(default_factory=set)
    """The MIG instances whose tasks were told that it is faulty; None is all of it."""
    ecc_count: int | None = None
    energy_millijoules: int | None = None
    throttled_since: float | None = None
    suspicions: dict[str, str] = field(default_factory=dict)
    """By what raised them; those that others raise stay until they take them back."""


class HealthBoard:
    """`quarantine_seconds`: for how long nothing may be wrong with a GPU before it takes tasks again."""

    def __init__(self, *, quarantine_seconds: float = 60.0, throttle_patience_seconds: float = 30.0) -> None:
        self._quarantine_seconds = quarantine_seconds
        self._throttle_patience_seconds = throttle_patience_seconds
        self._charts: dict[str, _Chart] = {}

    def observe(self, gpus: Iterable[Gpu], xids: Sequence[GpuXid], *, now_seconds: float) -> list[GpuFault]:
        """One look, at a time of a clock that nobody sets. The faults that are new."""
        faults: list[GpuFault] = []
        for xid in xids:
            faults += self._note_xid(xid, now_seconds)
        for gpu in gpus:
            faults += self._look_at(gpu, now_seconds)
        return faults

    def state(self, uuid: str) -> tuple[GpuState, str]:
        chart = self._charts.get(uuid)
        if chart is None:
            return GpuState.WELL, ""
        if chart.state is GpuState.WELL and chart.suspicions:
            return GpuState.SUSPECT, next(iter(chart.suspicions.values()))
        remedy = f"; {_RESET_REMEDY}" if chart.needs_reset else ""
        return chart.state, f"{chart.words}{remedy}"

    def unwell(self) -> dict[str, str]:
        """Why each GPU takes no new task that doesn't."""
        told = {uuid: self.state(uuid) for uuid in self._charts}
        return {uuid: why for uuid, (state, why) in told.items() if state is not GpuState.WELL}

    def suspect(self, uuid: str, by: str, why: str) -> None:
        """Raise a suspicion from outside, such as a process that no task owns; an empty `why` takes it back."""
        suspicions = self._chart(uuid).suspicions
        if why:
            suspicions[by] = why
        else:
            suspicions.pop(by, None)

    def awaited_resets(self) -> dict[str, AwaitedReset]:
        """To be told to the next board by `await_reset`."""
        return {
            uuid: AwaitedReset(words=chart.words, energy_millijoules=chart.energy_millijoules)
            for uuid, chart in self._charts.items()
            if chart.needs_reset
        }

    def await_reset(self, uuid: str, awaited: AwaitedReset, *, now_seconds: float) -> None:
        chart = self._chart(uuid)
        self._quarantine(chart, awaited.words, now_seconds, needs_reset=True)
        chart.energy_millijoules = awaited.energy_millijoules

    def memory_errors(self) -> dict[str, int]:
        """How many uncorrected ones each GPU had; to be told to the next board by `recall_memory_errors`."""
        return {uuid: chart.ecc_count for uuid, chart in self._charts.items() if chart.ecc_count is not None}

    def recall_memory_errors(self, counts: Mapping[str, int]) -> None:
        """More than these are new: whoever holds the GPU held it then."""
        for uuid, count in counts.items():
            self._chart(uuid).ecc_count = count

    # ---- events ----------------------------------------------------------------------------------------------------

    def _note_xid(self, xid: GpuXid, now: float) -> list[GpuFault]:
        of, instance = blame(xid.code), xid.gpu_instance_id
        if of in (Blame.APPLICATION, Blame.NOTICE):
            return []
        fault = GpuFault(uuid=xid.uuid, words=words(xid.code), gpu_instance_id=instance)
        if of is Blame.TASK:
            return [fault]
        chart = self._chart(xid.uuid)
        self._quarantine(chart, fault.words, now, needs_reset=of is Blame.RESET)
        return self._tell_once(chart, fault)

    # ---- levels ----------------------------------------------------------------------------------------------------

    def _look_at(self, gpu: Gpu, now: float) -> list[GpuFault]:
        chart = self._chart(gpu.uuid)
        self._see_reset(chart, gpu)
        trouble = self._trouble(chart, gpu)
        self._see_suspicions(chart, gpu, now)
        if trouble:
            self._quarantine(chart, trouble, now)
            return self._tell_once(chart, GpuFault(uuid=gpu.uuid, words=trouble))
        is_quiet = now - chart.last_trouble_at >= self._quarantine_seconds
        # What the driver asked for just before a fault says nothing of it; what it asks for so long after does.
        is_reset = not chart.needs_reset or gpu.recovery_action == 0
        if is_quiet and is_reset:
            chart.state, chart.words, chart.needs_reset = GpuState.WELL, "", False
            chart.told.clear()
        return []

    def _tell_once(self, chart: _Chart, fault: GpuFault) -> list[GpuFault]:
        """Nobody gets a GPU that is faulty: who holds it was told at the first time."""
        if None in chart.told or fault.gpu_instance_id in chart.told:
            return []
        chart.told.add(fault.gpu_instance_id)
        return [fault]

    def _trouble(self, chart: _Chart, gpu: Gpu) -> str:
        """What is wrong now that makes the GPU's results worthless."""
        if gpu.lost:
            chart.was_lost = True
            return gpu.lost
        before, count = chart.ecc_count, gpu.ecc_uncorrected_count
        if count is not None:
            chart.ecc_count = count
            # The count begins anew with a reset, and when the driver is loaded.
            more = 0 if before is None else count - before if count >= before else count
            if more:
                return f"uncorrected memory errors ({more} more)"
        return _asks(gpu) if gpu.recovery_action in _ENDS_TASKS else ""

    def _see_reset(self, chart: _Chart, gpu: Gpu) -> None:
        """Signs of one: its counters began anew, or it was away and came back."""
        if gpu.lost:
            return
        before, count = chart.energy_millijoules, gpu.energy_millijoules
        began_anew = before is not None and count is not None and count < before
        if count is not None:
            chart.energy_millijoules = count
        if began_anew or chart.was_lost:
            chart.needs_reset = False
        chart.was_lost = False

    def _see_suspicions(self, chart: _Chart, gpu: Gpu, now: float) -> None:
        remap = ""
        if gpu.remap_failed:
            remap = "a memory row could not be replaced; the GPU is to be exchanged"
        elif gpu.remap_pending:
            remap = f"memory rows or pages wait to be replaced; {_RESET_REMEDY}"
        held_back = gpu.throttle_reasons & HARMFUL
        if not held_back:
            chart.throttled_since = None
        elif chart.throttled_since is None:
            chart.throttled_since = now
        throttled = ""
        if chart.throttled_since is not None and now - chart.throttled_since >= self._throttle_patience_seconds:
            throttled = (
                f"its clocks are held back ({', '.join(throttle_names(held_back))}); look after cooling and power"
            )
        asked = _asks(gpu) if gpu.recovery_action else ""
        for by, why in (("remap", remap), ("throttle", throttled), ("recovery", asked)):
            self.suspect(gpu.uuid, by, why)

    def _quarantine(self, chart: _Chart, why: str, now: float, *, needs_reset: bool = False) -> None:
        chart.last_trouble_at = now
        if chart.state is not GpuState.FAULTY or (needs_reset and not chart.needs_reset):
            chart.state, chart.words = GpuState.FAULTY, why
        chart.needs_reset |= needs_reset

    def _chart(self, uuid: str) -> _Chart:
        return self._charts.setdefault(uuid, _Chart())


def _asks(gpu: Gpu) -> str:
    return _ACTIONS.get(gpu.recovery_action or 0, f"the driver asks for recovery action {gpu.recovery_action}")
