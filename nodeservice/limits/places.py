"""Where the cgroups of a node and of its tasks lie, where this service makes them itself."""

from __future__ import annotations

import hashlib
import re
from typing import Protocol

from nodeservice.core.model import AttemptId
from nodeservice.limits.hierarchy import TASKS_DIRECTORY

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,159}\Z")


class Places(Protocol):
    """Where cgroups lie below the root, and what the engine is told."""

    def of_node(self) -> str: ...

    def of_task(self, id_: AttemptId) -> str: ...

    def parent_for_engine(self, id_: AttemptId) -> str: ...


class DirectoryPlaces:
    """Plain directories. The suffix keeps a node's id clear of the names of kernel files."""

    def __init__(self, node_id: str) -> None:
        self._node = f"{TASKS_DIRECTORY}/{_safe(node_id)}.node"

    def of_node(self) -> str:
        return self._node

    def of_task(self, id_: AttemptId) -> str:
        return f"{self._node}/{_safe(str(id_))}"

    def parent_for_engine(self, id_: AttemptId) -> str:
        return f"/{self.of_task(id_)}"


def _safe(name: str) -> str:
    """The name itself where it is safe as a directory, else a digest, which no safe name can look like."""
    if _SAFE_NAME.match(name) and ".." not in name:
        return name
    return "+" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:40]
