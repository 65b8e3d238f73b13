"""How much room is left where tasks write: implements the port FreeSpace."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class DirectoriesFreeSpace:
    """FreeSpace of some directories. A directory that cannot be looked at does not count."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._directories = tuple(directories)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nodeservice-free-space")

    async def least(self) -> tuple[int, Path] | None:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._least)

    async def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _least(self) -> tuple[int, Path] | None:
        found = []
        for directory in self._directories:
            try:
                status = os.statvfs(directory)
            except OSError:
                continue
            found.append((status.f_bavail * status.f_frsize, directory))
        return min(found, default=None)
