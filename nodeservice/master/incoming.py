"""Receives the results of one attempt: streamed into a hidden directory, verified, and moved into place in one step.

Nothing is visible under `<results_dir>/<task_id>/<attempt>/` until all is there and synced. The functions block and run in
the executor's threads; one upload uses one thread at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nodeservice.durable import sync_directory
from nodeservice.errors import NodeFaultError, RequestError
from nodeservice.master.checks import check_attempt, check_id, invalid, shown

MANIFEST = "manifest.json"
MANIFEST_MAX_BYTES = 64 * 1024**2
MOST_FILES = 1_000_000
_STAGING = ".incoming"
_KEPT_FREE_BYTES = 1024**3
_KEPT_FREE_SHARE = 20
"""Of a small file system, one over this of it; nothing is taken that would leave less."""
_PATH_MAX_BYTES = 1024
_NAME_MAX_BYTES = 255
"""Linux limits a name in a directory to this (NAME_MAX, linux/limits.h)."""


@dataclass(frozen=True, slots=True)
class Entry:
    path: str
    size_bytes: int
    sha256: str


def check_path(path: str) -> str:
    """A relative path that stays below its directory and has nothing in it that misleads a person or a shell."""
    parts = path.split("/")
    if (
        any(part in ("", ".", "..") for part in parts)
        or any(len(part.encode()) > _NAME_MAX_BYTES for part in parts)
        or len(path.encode()) > _PATH_MAX_BYTES
        or any(ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0 for c in path)
    ):
        raise invalid("file_path", f"{shown(path)} is not a safe relative path")
    return path


def read_manifest(data: bytes, *, task_id: str, attempt: int) -> tuple[Entry, ...]:
    """The files that a manifest promises. Raises RequestError, also when it is another attempt's."""
    try:
        document = json.loads(data)
        owner = (document["task_id"], document["attempt"])
        entries = tuple(_entry(file) for file in document["files"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise invalid("manifest", f"cannot be read: {type(error).__name__}") from error
    if owner != (task_id, attempt):
        raise invalid("manifest", f"is of another attempt than {task_id}.{attempt}")
    if len({entry.path for entry in entries}) != len(entries):
        raise invalid("manifest", "names a path twice")
    return entries


def _entry(file: Mapping[str, object]) -> Entry:
    """Raises TypeError or ValueError for what is no entry, RequestError for an unsafe path."""
    path, size_bytes, sha256 = file["path"], file["size_bytes"], file["sha256"]
    if not isinstance(path, str) or type(size_bytes) is not int or not isinstance(sha256, str):
        raise TypeError("not what a file has")
    if size_bytes < 0:  # it would make room for the others
        raise ValueError("a negative size")
    return Entry(check_path(path), size_bytes, sha256)


class Incoming:
    """One upload on its way. `commit` or `abort` ends it; `abort` after `commit` does nothing.

    Before its first file there is nothing of it, so that a sender who is gone by then leaves nothing.

    Methods raise RequestError for what the sender did wrong (ALREADY_STORED for other results of the same attempt) and
    NodeFaultError (RESULTS_UNWRITABLE) where this host can't store.
    """

    def __init__(self, results_dir: Path, task_id: str, attempt: int, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._total_bytes = 0
        self.task_id = check_id("task_id", task_id)
        self.attempt = check_attempt("attempt", attempt)
        self._results_dir = results_dir
        self.target = results_dir / task_id / str(attempt)
        self._staging = results_dir / _STAGING / uuid.uuid4().hex
        self._found: dict[str, Entry] = {}
        self._stream: BinaryIO | None = None
        self._path = ""
        self._size_bytes = 0
        self._hash = hashlib.sha256()

    @property
    def file_count(self) -> int:
        return len(self._found)

    def begin_file(self, path: str) -> None:
        check_path(path)
        if path in self._found:
            raise invalid("file_path", f"{shown(path)} came twice")
        if len(self._found) >= MOST_FILES:
            raise self._too_large(f"{MOST_FILES} files")
        self._check_room(0)
        target = self._staging / path
        with _storing():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                self._stream = target.open("xb")
            except (FileExistsError, NotADirectoryError) as error:
                raise invalid("file_path", f"{shown(path)} is both a file and a directory") from error
        self._path, self._size_bytes, self._hash = path, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        if self._stream is None:
            raise invalid("file_path", "data without a file")
        self._total_bytes += len(data)
        if self._total_bytes > self._limit_bytes:
            raise self._too_large(f"the {self._limit_bytes} bytes")
        self._check_room(len(data))
        with _storing():
            self._stream.write(data)
        self._hash.update(data)
        self._size_bytes += len(data)

    def end_file(self) -> Entry:
        """Sync the file, and say what it was."""
        if self._stream is None:
            raise invalid("file_path", "the end of a file that was not begun")
        with _storing():
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        self._stream = None
        entry = Entry(self._path, self._size_bytes, self._hash.hexdigest())
        self._found[entry.path] = entry
        return entry

    def commit(self) -> Path:
        """Verify against `manifest.json` where one came, and move into place.

        The same results again are success without a change. Without a manifest, repeating replaces nothing either: what
        is stored must be equal, file by file.
        """
        if self._stream is not None:
            raise invalid("file_path", f"{shown(self._path)} has no end")
        if MANIFEST in self._found:
            self._verify()
        with _storing():
            self._sync_directories()
            self.target.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Renaming a directory onto one that has entries fails: what is stored stays.
                self._staging.rename(self.target)
            except OSError:
                if not self.target.is_dir():
                    raise
                self._compare_with_stored()
                self.abort()
            # Also what is there already: the master that put it there may have been killed before this.
            sync_directory(self.target.parent)
            sync_directory(self._results_dir)
        return self.target

    def abort(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        shutil.rmtree(self._staging, ignore_errors=True)

    def _too_large(self, bound: str) -> RequestError:
        return RequestError(
            f"results of {self.task_id}.{self.attempt} are more than {bound} that this master takes of one attempt",
            reason="RESULT_TOO_LARGE",
            hint="configure an object store for large results",
        )

    def _check_room(self, size_bytes: int) -> None:
        """The database may lie on the same disk, so some of it stays free. Raises NodeFaultError."""
        with _storing():
            disk = os.statvfs(self._results_dir)
        free, kept = (
            disk.f_bavail * disk.f_frsize,
            min(_KEPT_FREE_BYTES, disk.f_blocks * disk.f_frsize // _KEPT_FREE_SHARE),
        )
        if free - size_bytes < kept:
            raise NodeFaultError(
                f"results cannot be stored here: {free} bytes are free, of which {kept} are kept free",
                reason="RESULTS_UNWRITABLE",
                hint="remove old results from the master's results directory, or enlarge its disk",
            )

    def _verify(self) -> None:
        data = _read_small(self._staging / MANIFEST)
        promised = {e.path: e for e in read_manifest(data, task_id=self.task_id, attempt=self.attempt)}
        _check_equal(promised, {path: entry for path, entry in self._found.items() if path != MANIFEST})

    def _compare_with_stored(self) -> None:
        for path, entry in self._found.items():
            stored = self.target / path
            if not stored.is_file() or stored.stat().st_size != entry.size_bytes or _sha256(stored) != entry.sha256:
                raise RequestError(
                    f"results of {self.task_id}.{self.attempt} are stored already, and differ in {shown(path)}",
                    reason="ALREADY_STORED",
                )

    def _sync_directories(self) -> None:
        for directory, _, _ in os.walk(self._staging):
            sync_directory(Path(directory))


def sweep(results_dir: Path) -> None:
    """Remove what uploads left that were under way when the master ended."""
    shutil.rmtree(results_dir / _STAGING, ignore_errors=True)


def _check_equal(promised: Mapping[str, Entry], found: Mapping[str, Entry]) -> None:
    for path, entry in promised.items():
        if path not in found:
            raise invalid("manifest", f"names {shown(path)}, which did not come")
        if found[path] != entry:
            raise invalid("manifest", f"does not match what came as {shown(path)}")
    extra = next((path for path in found if path not in promised), None)
    if extra is not None:
        raise invalid("manifest", f"does not name {shown(extra)}, which came")


def _read_small(path: Path) -> bytes:
    if path.stat().st_size > MANIFEST_MAX_BYTES:
        raise invalid("manifest", f"is larger than {MANIFEST_MAX_BYTES} bytes")
    return path.read_bytes()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NodeFaultError(
            f"results cannot be stored here: {error.strerror or error}",
            reason="RESULTS_UNWRITABLE",
            hint="check space and permissions of the master's results directory",
        ) from error
