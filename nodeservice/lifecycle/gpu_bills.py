"""Keeps the GPU bills of the attempts, and writes them down, so that a restart takes them up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from nodeservice.core.gpus import GpuUsage
from nodeservice.core.model import AttemptId
from nodeservice.gpu.bill import GpuBill
from nodeservice.lifecycle.workdir import WorkDirs


class GpuBills:
    def __init__(self, dirs: WorkDirs) -> None:
        self._dirs = dirs
        self._bills: dict[AttemptId, GpuBill] = {}

    def of(self, id_: AttemptId) -> GpuBill:
        """The attempt's bill; at first, what was written down of it before a restart."""
        bill = self._bills.get(id_)
        if bill is None:
            text = ""
            with contextlib.suppress(OSError):
                text = self._dirs.gpu_bill(id_).read_text(encoding="utf-8", errors="replace")
            bill = self._bills[id_] = GpuBill.from_text(text)
        return bill

    def usage(self, id_: AttemptId) -> tuple[GpuUsage, ...]:
        return self.of(id_).usage()

    async def save(self, ids: Iterable[AttemptId]) -> None:
        texts = {self._dirs.gpu_bill(id_): self.of(id_).as_text() for id_ in ids}

        def write() -> None:
            for path, text in texts.items():
                fresh = path.with_suffix(".new")
                with contextlib.suppress(OSError):  # the attempt may just be going
                    fresh.write_text(text, encoding="utf-8")
                    fresh.replace(path)

        await asyncio.to_thread(write)

    def forget(self, id_: AttemptId) -> None:
        self._bills.pop(id_, None)
