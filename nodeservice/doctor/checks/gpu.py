"""Probe for GPUs that a task did not ask for, and the judgement on how those that it asks for are handed."""

from __future__ import annotations

from collections.abc import Sequence

from nodeservice.doctor.finding import Finding, State
from nodeservice.doctor.probe import Probe, Seen, in_force, not_tried

UNASKED = "GPUs not asked for"
ASKS_FOR_ALL = {"NVIDIA_VISIBLE_DEVICES": "all", "CUDA_VERSION": "12.0"}
"""The environment of an image that asks for all GPUs, as NVIDIA's own images do."""

_FOUND = "found"
_READ_SECONDS = 1.0
"""How long the task stays for its receipt to be read."""
_LOOK = f"""
for file in /dev/nvidia* /dev/dxg /usr/bin/nvidia-smi; do [ -e "$file" ] && echo "{_FOUND} $file"; done
echo "it is told NVIDIA_VISIBLE_DEVICES=$NVIDIA_VISIBLE_DEVICES"
"""
_TOLD = "it is told NVIDIA_VISIBLE_DEVICES="
_REMEDY = (
    "see which default runtime, hook or default device of the engine hands GPUs to every container; set the engine's"
    " default-runtime to runc, and accept-nvidia-visible-devices-envvar-when-unprivileged = false in"
    " /etc/nvidia-container-runtime/config.toml"
)
_DRIVER_REMEDY = "do what the finding says; `nvidia-smi` has to list every GPU of this host"


def probes(patience: float = 1.0) -> tuple[Probe, ...]:
    return (Probe(name="no-gpu", script=f"{_LOOK}sleep {_READ_SECONDS * patience:g}", judge=judge_unasked),)


def judge_unasked(seen: Seen) -> Sequence[Finding]:
    if missing := not_tried(seen, [UNASKED], _REMEDY):
        return missing
    state, nodes = in_force(seen, "devices")
    rules_state, rules = in_force(seen, "device_rules")
    found = [line.removeprefix(f"{_FOUND} ") for line in seen.log.splitlines() if line.startswith(_FOUND)]
    told = next((line.removeprefix(_TOLD) for line in seen.log.splitlines() if line.startswith(_TOLD)), None)
    if rules_state is State.MISSING:
        state, nodes = rules_state, rules
    if found or told != "void":
        state = State.FAILED
    evidence = f"it found {', '.join(found) or 'none'}; NVIDIA_VISIBLE_DEVICES is {told}; nodes: {nodes}"
    return [Finding(limit=UNASKED, state=state, evidence=evidence, remedy="" if state is State.HARD else _REMEDY)]


def judge_access(
    gpu_count: int,
    *,
    trouble: Sequence[str] = (),
    words: str,
    is_possible: bool,
    passed_over: Sequence[str],
    remedy: str,
) -> list[Finding]:
    """How the GPUs of this host are handed, and what is wrong with their driver; nothing to say of a host without any."""
    found = [Finding(limit="GPU driver", state=State.MISSING, evidence=what, remedy=_DRIVER_REMEDY) for what in trouble]
    if not gpu_count:
        return found
    if not is_possible:
        evidence = f"the engine hands them {words}"
        return [*found, Finding(limit="GPUs", state=State.MISSING, evidence=evidence, remedy=remedy)]
    why = f" ({'; '.join(passed_over)})" if passed_over else ""
    return [*found, Finding(limit="GPUs", state=State.HARD, evidence=f"{gpu_count} handed {words}{why}")]
