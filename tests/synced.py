"""Whether all of something is on the disk before it is renamed to where it shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


class Renames:
    """What was renamed since, and what of it had not been synced by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sources: list[Path] = []
        self.unsynced: list[Path] = []
        self.synced: set[Path] = set()
        fsync = os.fsync

        def note(fd: int) -> None:
            fsync(fd)
            self.synced.add(Path(os.readlink(f"/proc/self/fd/{fd}")))

        monkeypatch.setattr(os, "fsync", note)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._looking(getattr(os, name)))

    def _looking(self, rename: Any) -> Any:
        def look(source: str | Path, target: str | Path, **more: Any) -> None:
            found = [Path(source), *Path(source).rglob("*")]
            self.sources.append(Path(source))
            self.unsynced += [path for path in found if path not in self.synced]
            rename(source, target, **more)

        return look
