"""Probes for CPU, memory, swap and processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from nodeservice.core.model import MIB, Reason
from nodeservice.doctor.finding import Finding, State
from nodeservice.doctor.probe import Probe, Seen, in_force, not_tried
from nodeservice.limits.plan import PIDS_OVERHEAD

_QUOTA_MILLI = 200
_BUSY_SECONDS = 2.0
_PERIOD_SECONDS = 0.1
_TOLERANCE = 1.05
_MEMORY_BYTES = 16 * MIB
_PIDS = 16
_ASKED_PIDS = 64
_REMEDY_CGROUP = (
    "boot a kernel with the {} controller, and let this service write to it (root, cgroups mounted read-write)"
)
_REMEDY_SWAP = "boot with swapaccount=1, or use cgroup v2, or turn swap off"

_LOOPS = "i=0; while [ $i -lt 8 ]; do (while :; do :; done) & i=$((i+1)); done; wait"
_GROW = "x=0123456789abcdef; while :; do x=$x$x; done"
_FORKS = f"i=0; while [ $i -lt {_ASKED_PIDS} ]; do sleep 5 & i=$((i+1)); done; echo all started"


def probes(*, cpu_count: int, has_swap: bool) -> tuple[Probe, ...]:
    found = (
        Probe(name="cpu", script=_LOOPS, judge=judge_cpu, cpu_milli=_QUOTA_MILLI, timeout_seconds=_BUSY_SECONDS),
        Probe(
            name="memory",
            script=_GROW,
            judge=partial(judge_memory, has_swap),
            memory_bytes=_MEMORY_BYTES,
            cpu_milli=300,
        ),
        Probe(name="processes", script=_FORKS, judge=judge_pids, timeout_seconds=2.0, also={"pids_limit": _PIDS}),
    )
    if cpu_count < 2:  # a core for one task alone would leave none for the host
        return found
    exclusive = Probe(
        name="exclusive", script="sleep 1", judge=judge_exclusive, cpu_milli=1000, also={"exclusive_cpus": True}
    )
    return (*found, exclusive)


def judge_cpu(seen: Seen) -> Sequence[Finding]:
    remedy = _REMEDY_CGROUP.format("cpu")
    if missing := not_tried(seen, ["CPU"], remedy):
        return missing
    state, held = in_force(seen, "cpu_milli")
    record = seen.record
    used = record.usage.cpu_seconds if record else None
    seconds = seen.run_seconds
    if used is None or seconds is None:
        evidence = f"{held}; the CPU time of 8 busy loops could not be read"
        return [Finding(limit="CPU", state=state, evidence=evidence, remedy=_without_cgroup(state))]
    quota = _QUOTA_MILLI / 1000
    # A period's worth may be spent at once at the start. The runtime's start, long on a busy host, counts too.
    most = quota * (seen.start_seconds + seconds + _PERIOD_SECONDS) * _TOLERANCE
    evidence = f"8 busy loops used {used:.2f} s of CPU in {seconds:.2f} s under a quota of {quota:g} cores ({held})"
    if used > most and state is State.HARD:
        state = State.FAILED
    return [Finding(limit="CPU", state=state, evidence=evidence, remedy="" if state is State.HARD else remedy)]


def judge_memory(has_swap: bool, seen: Seen) -> Sequence[Finding]:
    remedy = _REMEDY_CGROUP.format("memory")
    if missing := not_tried(seen, ["memory", "swap"], remedy):
        return missing
    state, held = in_force(seen, "memory_bytes")
    peak = seen.record.usage.memory_peak_bytes if seen.record else None
    told = f"a task that grew past {_MEMORY_BYTES // MIB} MiB ended with {seen.reason}"
    evidence = f"{told}, peak {peak} bytes ({held})" if peak is not None else f"{told} ({held})"
    if seen.reason is not Reason.MEMORY_LIMIT or (peak or 0) > _MEMORY_BYTES:
        state = State.FAILED if state is State.HARD else state
    memory = Finding(limit="memory", state=state, evidence=evidence, remedy="" if state is State.HARD else remedy)
    swap_state, swap_held = in_force(seen, "memory_swap_bytes")
    if swap_state is State.HARD and state is not State.HARD:
        swap_state = State.FAILED
    if swap_state is not State.HARD and not has_swap:
        swap_state, swap_held = State.HARD, f"this host has no swap; {swap_held}"
    swap = Finding(
        limit="swap",
        state=swap_state,
        evidence=f"memory and swap together: {swap_held}",
        remedy="" if swap_state is State.HARD else _REMEDY_SWAP,
    )
    return [memory, swap]


def judge_pids(seen: Seen) -> Sequence[Finding]:
    remedy = _REMEDY_CGROUP.format("pids")
    if missing := not_tried(seen, ["processes"], remedy):
        return missing
    state, held = in_force(seen, "pids_limit")
    peak = seen.record.usage.pids_peak_count if seen.record else None
    got_all = "all started" in seen.log
    most = f", at most {peak} at once" if peak is not None else ""
    refused = "all were started" if got_all else "the kernel refused the rest"
    evidence = f"{_ASKED_PIDS} processes were tried under a limit of {_PIDS}: {refused}{most} ({held})"
    if (got_all or (peak or 0) > _PIDS + PIDS_OVERHEAD) and state is State.HARD:
        state = State.FAILED
    return [Finding(limit="processes", state=state, evidence=evidence, remedy="" if state is State.HARD else remedy)]


def judge_exclusive(seen: Seen) -> Sequence[Finding]:
    remedy = _REMEDY_CGROUP.format("cpuset")
    if missing := not_tried(seen, ["exclusive CPUs"], remedy):
        return missing
    state, held = in_force(seen, "cpu_ids")
    return [Finding(limit="exclusive CPUs", state=state, evidence=held, remedy="" if state is State.HARD else remedy)]


def _without_cgroup(state: State) -> str:
    return "" if state is not State.HARD else "give tasks a cgroup of their own, so that their CPU time can be read"
