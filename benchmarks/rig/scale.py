"""How much is measured: quick for a change under work, full for a statement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """`home` is a directory on the disk that is measured; `large_file_bytes` is the one large file of the uploads."""

    quick: bool
    home: Path
    large_file_bytes: int

    def pick(self, quick: T, full: T) -> T:
        return quick if self.quick else full

    def directory(self, name: str) -> Path:
        path = self.home / name
        path.mkdir()
        return path
