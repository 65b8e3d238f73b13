"""Remembers which mount results belong on, such as a network share: without it, the same path means this host's disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from nodeservice.errors import NodeFaultError, TransientError
from nodeservice.results.manifest import write_durably

MEMORY_NAME = "results.mount"


class ResultsMount:
    """Of one results directory, in a file of the state directory. Its methods block.

    A mount is known by its place, since a share gets another device number each time. One that the state directory lies on
    too is of no interest: without it nothing is known here either.
    """

    def __init__(self, directory: Path, state_dir: Path) -> None:
        self._directory = directory.absolute()
        self._state_dir = state_dir.absolute()
        self._memory = state_dir / MEMORY_NAME
        self._known = self._read()

    def check(self) -> None:
        """Raise TransientError (STORE_UNREACHABLE) while what was mounted there once is not."""
        if self._known is None:
            self._known = self._find()
            if self._known is not None:
                with contextlib.suppress(NodeFaultError):  # it is known for as long as this process lives
                    write_durably(self._memory, f"{self._directory}\n{self._known}\n".encode())
        elif not os.path.ismount(self._known):
            raise TransientError(
                f"nothing is mounted at {self._known}, where {self._directory} was",
                reason="STORE_UNREACHABLE",
                hint=f"mount it; where nothing belongs there any more, remove {self._memory} and restart the node",
            )

    def _read(self) -> Path | None:
        try:
            directory, mount = self._memory.read_text().splitlines()
        except (OSError, ValueError):
            return None
        return Path(mount) if Path(directory) == self._directory else None

    def _find(self) -> Path | None:
        place = Path(os.path.realpath(self._directory))
        while not os.path.ismount(place):
            place = place.parent
        return None if self._state_dir.resolve().is_relative_to(place) else place
