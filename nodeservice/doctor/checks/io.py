"""Probe for limits on block I/O."""

from __future__ import annotations

from collections.abc import Sequence

from nodeservice.core.model import MIB
from nodeservice.doctor.finding import Finding, State
from nodeservice.doctor.probe import Probe, Seen, in_force, not_tried

_RATE = MIB
_WRITTEN_BYTES = 2 * MIB
_LEAST_SECONDS = 0.6
"""Of the two seconds that the rate stands for: the first second's worth may pass at once."""
_REMEDY = "use a kernel with the io controller (cgroup v2) or with CONFIG_BLK_DEV_THROTTLING, on a real block device"
# Past the page cache: on cgroup v1 nothing else is held back.
_WRITE = f"dd if=/dev/zero of=/results/f bs=65536 count={_WRITTEN_BYTES // 65536} oflag=direct && echo written"


def probes() -> tuple[Probe, ...]:
    return (Probe(name="io", script=_WRITE, judge=judge_io, also={"write_bytes_per_second": _RATE}),)


def judge_io(seen: Seen) -> Sequence[Finding]:
    if missing := not_tried(seen, ["block I/O"], _REMEDY):
        return missing
    state, held = in_force(seen, "write_bytes_per_second")
    seconds = seen.run_seconds
    evidence = held
    if "written" in seen.log and seconds is not None:
        evidence = f"{_WRITTEN_BYTES} bytes took {seconds:.2f} s at {_RATE} bytes per second, past the cache ({held})"
        if seconds < _LEAST_SECONDS and state is State.HARD:
            state = State.FAILED
    return [Finding(limit="block I/O", state=state, evidence=evidence, remedy="" if state is State.HARD else _REMEDY)]
