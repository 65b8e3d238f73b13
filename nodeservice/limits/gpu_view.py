"""Asks the driver, from inside a container, which GPUs it shows there.

What a task's own files say is no proof: an image can bring another nvidia-smi. So a GPU too many counts against the
container, and anything else is told as not read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from nodeservice.errors import NodeServiceError
from nodeservice.limits.gpu_check import GPU_UUIDS, seen_uuids
from nodeservice.limits.process import holds_file
from nodeservice.ports import Reading

COMMAND = ("/usr/bin/nvidia-smi", "-L")
"""NVIDIA's container toolkit puts it there."""


async def read_gpu_uuids(
    pid: int, run_inside: Callable[[Sequence[str]], Awaitable[str]], *, root: Path = Path("/")
) -> Reading:
    """`run_inside` is the runtime's, for the container whose first process is `pid`. Never raises."""
    try:
        if not holds_file(pid, COMMAND[0], root):
            return _unread(f"{COMMAND[0]} is not in the container")
        shown = seen_uuids(await run_inside(COMMAND))
    except (NodeServiceError, OSError) as error:
        return _unread(str(error))
    if not shown:
        return _unread("it listed no GPU")
    return Reading(limit=GPU_UUIDS, value=" ".join(shown), source=" ".join(COMMAND))


def _unread(note: str) -> Reading:
    return Reading(limit=GPU_UUIDS, value=None, source=" ".join(COMMAND), readable=False, note=note)
