"""Writes down which GPUs wait for a reset, and their memory errors: a restart of the service is none, and may miss some."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from nodeservice.gpu.health import AwaitedReset, HealthBoard

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class GpuResets:
    def __init__(self, path: Path, *, boot_id: Path = _BOOT_ID) -> None:
        self._path = path
        self._boot_id = boot_id
        self._written: Mapping[str, AwaitedReset] = {}
        self._errors: Mapping[str, int] = {}

    def tell(self, board: HealthBoard, *, now_seconds: float) -> None:
        """What was written by the process before."""
        for uuid, awaited in self.read().items():
            board.await_reset(uuid, awaited, now_seconds=now_seconds)
        board.recall_memory_errors(self._errors)

    def read(self) -> Mapping[str, AwaitedReset]:
        """By UUID. None after a restart of the host, which resets them all, and none of a file that is cut off."""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            told = json.loads(self._path.read_text(encoding="utf-8"))
            if told["boot_id"] == self._boot_id.read_text(encoding="ascii"):
                self._errors = {str(uuid): int(count) for uuid, count in told.get("memory_errors", {}).items()}
                self._written = {str(uuid): AwaitedReset(**awaited) for uuid, awaited in told["gpus"].items()}
        return self._written

    async def write(self, awaited: Mapping[str, AwaitedReset], errors: Mapping[str, int]) -> None:
        """Nothing, where nothing has changed. Where it can't be, it is tried again with the next look."""
        if awaited == self._written and errors == self._errors:
            return
        gpus = {
            uuid: {"words": one.words, "energy_millijoules": one.energy_millijoules} for uuid, one in awaited.items()
        }

        def write() -> None:
            fresh = self._path.with_suffix(".new")
            boot_id = self._boot_id.read_text(encoding="ascii")
            text = json.dumps({"boot_id": boot_id, "gpus": gpus, "memory_errors": dict(errors)})
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(self._path)

        with contextlib.suppress(OSError):
            await asyncio.to_thread(write)
            self._written, self._errors = awaited, errors
