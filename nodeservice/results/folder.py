"""The results directory as it grows old: finds and removes what is in it; implements the port ResultsFolder.

The directory may be shared, and others may keep things there. So an attempt's directory counts as ours only where its place,
`<task_id>/<attempt>`, agrees with the manifest in it, or where it holds nothing but the pointer to where its results went.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from nodeservice.core.model import AttemptId
from nodeservice.errors import NodeFaultError
from nodeservice.results import manifest
from nodeservice.results.layout import MANIFEST_NAME, MOVED_NAME

_ATTEMPT = re.compile(r"[1-9][0-9]{0,8}")
_LEFTOVER = re.compile(r"\.([1-9][0-9]{0,8})\.[0-9a-f]{8}\.(?:partial|removed)")
_MOST_MANIFEST_BYTES = 256 * 1024**2


class ResultsFolder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def stored_before(self, instant: datetime, *, only_moved: bool = False) -> Sequence[AttemptId]:
        return [
            id_
            for id_, directory in self._attempts()
            if (at := _complete_at(id_, directory, only_moved=only_moved)) is not None and at < instant
        ]

    def remove(self, id_: AttemptId) -> None:
        directory = self._root / id_.task_id / str(id_.attempt)
        if not _is_directory(directory):
            return
        hidden = directory.with_name(f".{id_.attempt}.{secrets.token_hex(4)}.removed")
        directory.rename(hidden)
        shutil.rmtree(hidden)
        with suppress(OSError):  # other attempts of the task
            directory.parent.rmdir()

    def leftovers(self) -> Sequence[tuple[AttemptId, Path]]:
        return [
            (AttemptId(task.name, int(found[1])), entry)
            for task in _directories(self._root)
            for entry in _directories(task)
            if (found := _LEFTOVER.fullmatch(entry.name)) is not None
        ]

    def remove_leftover(self, path: Path) -> None:
        shutil.rmtree(path)
        with suppress(OSError):
            path.parent.rmdir()

    def _attempts(self) -> Iterator[tuple[AttemptId, Path]]:
        for task in _directories(self._root):
            for entry in _directories(task):
                if _ATTEMPT.fullmatch(entry.name):
                    yield AttemptId(task.name, int(entry.name)), entry


def _complete_at(id_: AttemptId, directory: Path, *, only_moved: bool) -> datetime | None:
    """When the results were complete there, or had gone elsewhere; None for what is not ours, or neither."""
    moved_at, written_at = _modified_at(directory / MOVED_NAME), _modified_at(directory / MANIFEST_NAME)
    if moved_at is not None:
        return moved_at if os.listdir(directory) == [MOVED_NAME] else None
    if written_at is None or only_moved:
        return None
    try:
        found = manifest.read_local(directory)
    except NodeFaultError:
        return None
    if found is None or (found[0].task_id, found[0].attempt) != (id_.task_id, id_.attempt):
        return None
    return written_at


def _modified_at(path: Path) -> datetime | None:
    """Of a regular file of sensible size; None for anything else."""
    try:
        status = path.lstat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_MANIFEST_BYTES:
        return None
    return datetime.fromtimestamp(status.st_mtime, UTC)


def _directories(place: Path) -> list[Path]:
    """Real ones, not links to any."""
    try:
        with os.scandir(place) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False
