"""Probes for what a process may do: files, core files, shared memory, capabilities, system calls, devices."""

from __future__ import annotations

from collections.abc import Sequence

from nodeservice.core.model import MIB
from nodeservice.doctor.finding import Finding, State
from nodeservice.doctor.probe import Probe, Seen, in_force, not_tried
from nodeservice.limits.asked import capability_names, shm_bytes

_OPEN_FILES = 64
_RAISED_FILES = "raised open files"
_RAISED_CORE = "raised core size"
_MADE_DEVICE = "made a device"
_SHM_MEMORY_BYTES = 96 * MIB
_SHM_FULL = "shared memory is full at"

_READ_SECONDS = 1.0
"""For this service to read the limits of the running task."""
_TRY = f"""
(ulimit -n {_OPEN_FILES * 2}) 2>/dev/null && echo {_RAISED_FILES}
(ulimit -c 1000) 2>/dev/null && echo {_RAISED_CORE}
mknod /tmp/device c 1 3 2>/dev/null && echo {_MADE_DEVICE}
"""
_FILL = (
    f'cat /dev/zero >/dev/shm/filler 2>/dev/null; set -- $(wc -c </dev/shm/filler); echo "{_SHM_FULL} $1"; sleep 0.5'
)

_BY_RECEIPT = {
    "capabilities": ("capabilities", "see that the engine adds none by default; Docker's own set is the most allowed"),
    "system calls": ("seccomp", "use a kernel with CONFIG_SECCOMP_FILTER, and an engine that is not set to unconfined"),
    "no new privileges": ("no_new_privileges", "use an engine that honours the security option no-new-privileges"),
    "OOM score": ("oom_score_adj", "see that the engine does not give containers a lower score than the host's own"),
    "device rules": (
        "device_rules",
        "let the engine guard devices by cgroup; on cgroup v2 reading it back needs CAP_BPF",
    ),
    "devices": ("devices", "see which runtime hook or default of the engine hands devices to every container"),
}


def probes(patience: float = 1.0) -> tuple[Probe, ...]:
    script = f"{_TRY}sleep {_READ_SECONDS * patience:g}"
    return (
        Probe(name="confinement", script=script, judge=judge_confinement, also={"open_files_limit": _OPEN_FILES}),
        Probe(name="shm", script=_FILL, judge=judge_shm, memory_bytes=_SHM_MEMORY_BYTES, cpu_milli=200),
    )


def judge_confinement(seen: Seen) -> Sequence[Finding]:
    limits = ["open files", "core files", *_BY_RECEIPT]
    if missing := not_tried(seen, limits, "see the message"):
        return missing
    tries = {"devices": _MADE_DEVICE}
    found = [
        _tried(seen, "open files", "open_files_limit", _RAISED_FILES, "see that the engine sets its ulimits as asked"),
        _tried(seen, "core files", "core_file_bytes", _RAISED_CORE, "see that the engine sets its ulimits as asked"),
    ]
    for limit, (name, remedy) in _BY_RECEIPT.items():
        found.append(_tried(seen, limit, name, tries.get(limit, ""), remedy))
    return found


def judge_shm(seen: Seen) -> Sequence[Finding]:
    remedy = "use an engine that honours ShmSize"
    if missing := not_tried(seen, ["shared memory"], remedy):
        return missing
    state, held = in_force(seen, "shm_bytes")
    told = [line.removeprefix(_SHM_FULL).strip() for line in seen.log.splitlines() if line.startswith(_SHM_FULL)]
    wanted = shm_bytes(_SHM_MEMORY_BYTES)
    if not told:
        evidence = f"the filler of /dev/shm ended with {seen.reason}: {seen.message} ({held})"
        state = State.FAILED if state is State.HARD else state
    else:
        evidence = f"it took {told[0]} bytes and no more ({held})"
        if told[0] != str(wanted) and state is State.HARD:
            state = State.FAILED
    return [
        Finding(limit="shared memory", state=state, evidence=evidence, remedy="" if state is State.HARD else remedy)
    ]


def _tried(seen: Seen, limit: str, name: str, broken: str, remedy: str) -> Finding:
    """By the receipt, unless the probe itself got past the limit."""
    state, held = in_force(seen, name)
    evidence = held
    if broken and broken in seen.log:
        state, evidence = State.FAILED, f"the probe {broken} ({held})"
    elif broken:
        evidence = f"{held}; more was refused"
    elif name == "capabilities" and state is State.HARD:
        evidence = f"{held}: {capability_names(int(str(seen.receipt('effective')[name]), 16))}"
    return Finding(limit=limit, state=state, evidence=evidence, remedy="" if state is State.HARD else remedy)
