"""Probes for the bound on what a task writes: results, writable layer, log."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from nodeservice.core.model import MIB, Reason
from nodeservice.doctor.finding import Finding, State
from nodeservice.doctor.probe import Probe, Seen, not_tried

_LIMIT_BYTES = 6 * MIB
_TRIED_BYTES = 12 * MIB
_WRITTEN = "all written"
_REMEDY = (
    "put it on xfs mounted with pquota, or on ext4 with the project quota feature mounted with prjquota;"
    " until then a task is ended within two seconds of crossing its limit"
)
_PLACES = {
    "disk-results": ("disk /results", "/results/filler"),
    "disk-layer": ("disk / and /tmp", "/filler"),
    "disk-log": ("disk log", ""),
}
"""Name of the probe, limit, file; no file is the log."""
# Powers of two of a 16 byte string make a block of 64 KiB, so that no program but the shell is needed.
_BLOCK = "x=0123456789abcdef; i=0; while [ $i -lt 12 ]; do x=$x$x; i=$((i+1)); done"
_BLOCK_BYTES = 64 * 1024


def probes() -> tuple[Probe, ...]:
    return tuple(
        Probe(
            name=name,
            script=script(place),
            judge=partial(judge_disk, limit),
            disk_bytes=_LIMIT_BYTES,
            memory_bytes=64 * MIB,
            cpu_milli=200,
        )
        for name, (limit, place) in _PLACES.items()
    )


def script(place: str) -> str:
    """Write in blocks, stop at the first that is refused; then wait to be ended."""
    count = _TRIED_BYTES // _BLOCK_BYTES
    opened = f"exec 3>{place} || exit 4" if place else "exec 3>&1"
    loop = f"i=0; while [ $i -lt {count} ]; do printf '%s\\n' \"$x\" >&3 || exit 3; i=$((i+1)); done"
    return f"{_BLOCK}; {opened}; {loop}; echo {_WRITTEN}; sleep 6"


def judge_disk(limit: str, seen: Seen) -> Sequence[Finding]:
    if missing := not_tried(seen, [limit], _REMEDY):
        return missing
    record = seen.record
    peak = record.usage.disk_peak_bytes if record else None
    tried = f"{_TRIED_BYTES // MIB} MiB were tried under a limit of {_LIMIT_BYTES // MIB} MiB"
    why = str(record.limits.get("why_watched") or "") if record else ""
    if seen.reason is Reason.DISK_LIMIT:
        seen_bytes = f" when {peak} bytes were seen" if peak is not None else ""
        evidence = f"{tried}: the task was ended{seen_bytes}" + (f"; {why}" if why else "")
        return [Finding(limit=limit, state=State.WATCHED, evidence=evidence, remedy=_REMEDY)]
    if seen.reason is Reason.EXIT_NONZERO and seen.exit_code == 3:
        evidence = f"{tried}: the kernel refused to write on"
        return [Finding(limit=limit, state=State.HARD, evidence=evidence)]
    evidence = f"{tried}: the task ended with {seen.reason}: {seen.message}"
    return [Finding(limit=limit, state=State.FAILED, evidence=evidence, remedy=_REMEDY)]
