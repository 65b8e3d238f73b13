"""What a bucket holds of us, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


@dataclass(frozen=True, slots=True)
class StoredObject:
    """As a listing tells it. The ETag names the contents: it is what the store answered to their upload."""

    size_bytes: int
    etag: str


class Standing(Enum):
    """How sure it is that the store has what was sent, before anybody has looked."""

    PROVEN = auto()
    """The answer's ETag is the MD5 of what was sent, which it is for a plain object. Worth its time for small ones."""
    TAKEN = auto()
    """The store compared it with a digest before it took it."""
    CLAIMED = auto()
    """It came out of an archive, and the store says that it took the whole."""


class AlreadyThere(Exception):  # noqa: N818 (what the store was asked to tell)
    """The store has an object of this key, and left it as it was."""
