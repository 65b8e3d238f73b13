"""A result store in memory that fails and blocks on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nodeservice.core.model import AttemptId
from nodeservice.errors import NodeFaultError, NodeServiceError
from nodeservice.ports import ResultBundle
from nodeservice.results.collect import PIECE_BYTES
from nodeservice.results.layout import MANIFEST_NAME
from nodeservice.results.source import VerifiedReader


class MemoryResultStore:
    """Answers `memory://<task_id>/<attempt>`; keeps the contract that the shipped stores keep.

    `stored` maps each prefix to its files and their bytes, `manifest.json` included. `put_count` counts calls, failed
    ones too.
    """

    def __init__(self) -> None:
        self.stored: dict[str, dict[str, bytes]] = {}
        self.put_count = 0
        self.dropped: list[AttemptId] = []
        """The attempts whose leftovers were to be dropped."""
        self.trouble: NodeServiceError | None = None
        """What `check` raises."""
        self.is_closed = False
        self._failures: list[NodeServiceError] = []
        self._open = asyncio.Event()
        self._open.set()

    def fail_next(self, count: int, error: NodeServiceError) -> None:
        """Let the next `count` calls of `put` raise this error, after those that were asked for before."""
        self._failures.extend([error] * count)

    def block(self) -> None:
        """Let every `put` wait from now on, until `unblock`."""
        self._open.clear()

    def unblock(self) -> None:
        self._open.set()

    async def put(self, bundle: ResultBundle) -> str:
        self.put_count += 1
        await self._open.wait()
        if self._failures:
            raise self._failures.pop(0)
        present = self.stored.get(bundle.prefix)
        if present is not None and present[MANIFEST_NAME] != bundle.manifest_bytes:
            raise NodeFaultError(f"other results of attempt {bundle.spec.id} are stored", reason="RESULT_CONFLICT")
        files: dict[str, bytes] = {}
        for file in bundle.files:
            with VerifiedReader(file) as reader:
                files[file.entry.path] = b"".join(iter(lambda: reader.read(PIECE_BYTES), b""))
        files[MANIFEST_NAME] = bundle.manifest_bytes
        self.stored[bundle.prefix] = files
        return f"memory://{bundle.prefix}"

    async def check(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    async def drop_leftovers(self, id_: AttemptId, paths: Sequence[str]) -> int:
        self.dropped.append(id_)
        return 0

    async def close(self) -> None:
        self.is_closed = True
