"""How each GPU is: takes what is seen and what the driver tells, and says which are well, suspect or faulty. Pure.

A fault is told once, for the tasks that hold the GPU then. The GPU stays in quarantine, with its MIG instances, until
nothing has been wrong with it for a while; one that needs a reset, until there is a sign that it had one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    6: "the driver asks for a reset of the bus",
    7: "the driver asks for a restart of the host",
}
_DRAIN = 3
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


@dataclass(slots=True)
class _Chart:
    state: GpuState = GpuState.WELL
    words: str = ""
    trouble: str = ""
    """What was wrong at the last look."""
    last_trouble_at: float = 0.0
    needs_reset: bool = False
    was_lost: bool = False
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

    # ---- events ----------------------------------------------------------------------------------------------------

    def _note_xid(self, xid: GpuXid, now: float) -> list[GpuFault]:
        of = blame(xid.code)
        if of in (Blame.APPLICATION, Blame.NOTICE):
            return []
        if of is not Blame.TASK:
            chart = self._chart(xid.uuid)
            chart.needs_reset |= of is Blame.RESET
            self._quarantine(chart, words(xid.code), now)
        return [GpuFault(uuid=xid.uuid, words=words(xid.code), gpu_instance_id=xid.gpu_instance_id)]

    # ---- levels ----------------------------------------------------------------------------------------------------

    def _look_at(self, gpu: Gpu, now: float) -> list[GpuFault]:
        chart = self._chart(gpu.uuid)
        self._see_reset(chart, gpu)
        before, chart.trouble = chart.trouble, self._trouble(chart, gpu)
        self._see_suspicions(chart, gpu, now)
        if chart.trouble:
            self._quarantine(chart, chart.trouble, now)
            return [GpuFault(uuid=gpu.uuid, words=chart.trouble)] if chart.trouble != before else []
        healed = now - chart.last_trouble_at >= self._quarantine_seconds and not chart.needs_reset
        if chart.state is GpuState.FAULTY and healed:
            chart.state, chart.words = GpuState.WELL, ""
        return []

    def _trouble(self, chart: _Chart, gpu: Gpu) -> str:
        """What is wrong now that makes the GPU's results worthless."""
        if gpu.lost:
            chart.was_lost = True
            return gpu.lost
        before, chart.ecc_count = chart.ecc_count, gpu.ecc_uncorrected_count
        if before is not None and chart.ecc_count is not None and chart.ecc_count > before:
            return f"{chart.ecc_count - before} uncorrected memory errors"
        action = gpu.recovery_action or 0
        return (
            _ACTIONS.get(action, f"the driver asks for recovery action {action}") if action not in (0, _DRAIN) else ""
        )

    def _see_reset(self, chart: _Chart, gpu: Gpu) -> None:
        """Signs of one: the driver asks for none any more, its counters began anew, or the GPU came back."""
        if gpu.lost:
            return
        before, chart.energy_millijoules = chart.energy_millijoules, gpu.energy_millijoules
        began_anew = before is not None and gpu.energy_millijoules is not None and gpu.energy_millijoules < before
        if gpu.recovery_action == 0 or began_anew or chart.was_lost:
            chart.needs_reset = False
        chart.was_lost = False

    def _see_suspicions(self, chart: _Chart, gpu: Gpu, now: float) -> None:
        remap = ""
        if gpu.remap_failed:
            remap = "a memory row could not be replaced; the GPU is to be exchanged"
        elif gpu.remap_pending:
            remap = f"memory rows wait to be replaced; {_RESET_REMEDY}"
        held_back = gpu.throttle_reasons & HARMFUL
        chart.throttled_since = (chart.throttled_since or now) if held_back else None
        throttled = ""
        if chart.throttled_since is not None and now - chart.throttled_since >= self._throttle_patience_seconds:
            throttled = (
                f"its clocks are held back ({', '.join(throttle_names(held_back))}); look after cooling and power"
            )
        drained = _ACTIONS[_DRAIN] if gpu.recovery_action == _DRAIN else ""
        for by, why in (("remap", remap), ("throttle", throttled), ("drain", drained)):
            self.suspect(gpu.uuid, by, why)

    def _quarantine(self, chart: _Chart, why: str, now: float) -> None:
        chart.last_trouble_at = now
        if chart.state is not GpuState.FAULTY or not chart.words:
            chart.state, chart.words = GpuState.FAULTY, why

    def _chart(self, uuid: str) -> _Chart:
        return self._charts.setdefault(uuid, _Chart())
