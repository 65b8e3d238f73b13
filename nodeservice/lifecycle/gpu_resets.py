"""Writes down which GPUs wait for a reset: a restart of the service is none, and the driver may not tell of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from nodeservice.gpu.health import AwaitedReset

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class GpuResets:
    def __init__(self, path: Path, *, boot_id: Path = _BOOT_ID) -> None:
        self._path = path
        self._boot_id = boot_id
        self._written: Mapping[str, AwaitedReset] = {}

    def read(self) -> Mapping[str, AwaitedReset]:
        """By UUID. None after a restart of the host, which resets them all, and none of a file that is cut off."""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            told = json.loads(self._path.read_text(encoding="utf-8"))
            if told["boot_id"] == self._boot_id.read_text(encoding="ascii"):
                self._written = {str(uuid): AwaitedReset(**awaited) for uuid, awaited in told["gpus"].items()}
        return self._written

    async def write(self, awaited: Mapping[str, AwaitedReset]) -> None:
        """Nothing, where nothing has changed. Where it can't be, it is tried again with the next look."""
        if awaited == self._written:
            return
        gpus = {
            uuid: {"words": one.words, "energy_millijoules": one.energy_millijoules} for uuid, one in awaited.items()
        }

        def write() -> None:
            fresh = self._path.with_suffix(".new")
            text = json.dumps({"boot_id": self._boot_id.read_text(encoding="ascii"), "gpus": gpus})
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(self._path)

        with contextlib.suppress(OSError):
            await asyncio.to_thread(write)
            self._written = dict(awaited)
