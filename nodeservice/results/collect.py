"""Freeze what a task wrote: walk its results directory, hash every regular file, say what was left out.

The directory was written by a hostile process. So nothing here follows a symbolic link: every component is opened
relative to its parent's descriptor with O_NOFOLLOW, and what is opened must prove to be a regular file of the same file
system. The container must be verified gone before, else files can change under the walk.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from nodeservice.core.model import Manifest, ManifestEntry
from nodeservice.errors import NodeFaultError, TransientError
from nodeservice.ports import ResultFile
from nodeservice.results import layout

PIECE_BYTES = 1024 * 1024

_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""O_NONBLOCK so that a name which became a FIFO cannot hang us; it changes nothing for regular files (open(2))."""

_KINDS = {
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "named pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFBLK: "block device",
    stat.S_IFCHR: "character device",
}


def collect(
    results_dir: Path,
    log_path: Path,
    *,
    task_id: str,
    attempt: int,
    limit_bytes: int | None = None,
    stopping: threading.Event | None = None,
) -> tuple[Manifest, tuple[ResultFile, ...]]:
    """Walk, hash and list; blocking. A missing directory or log is left out: the attempt never came so far.

    `limit_bytes` bounds what the task's own files may have in sum; a file that would pass it is skipped with the reason.
    Sparse files count with their apparent size, since that is what a store would hold: without a limit a file of 8 EiB
    that occupies nothing would be read for years. The log is never skipped. Past `layout.MAX_ENTRY_COUNT` entries the rest
    is left out, with one line that says so; so it is past `layout.MAX_NAMES_LENGTH` of their names.

    Files come sorted by stored path. Raises NodeFaultError (COLLECT_FAILED) when the disk cannot be read, and TransientError
    (STOPPING) soon after `stopping` is set.
    """
    hasher = _Hasher(stopping or threading.Event())
    walk = _Walk(results_dir, limit_bytes, hasher)
    try:
        walk.run()
        log = _hash_log(log_path, hasher)
    except OSError as error:
        raise NodeFaultError(
            f"results of {task_id}.{attempt} in {results_dir} cannot be read: {error.strerror}",
            reason="COLLECT_FAILED",
            hint="check the disk of the state directory",
        ) from error
    files = sorted([*walk.files, *log], key=lambda file: file.entry.path)
    manifest = Manifest(
        task_id=task_id,
        attempt=attempt,
        files=tuple(file.entry for file in files),
        skipped=tuple(sorted(walk.skipped)),
    )
    return manifest, tuple(files)


class _Walk:
    """One pass over a results directory. Holds two descriptors at a time, however deep the tree."""

    def __init__(self, root: Path, limit_bytes: int | None, hasher: _Hasher) -> None:
        self._root = root
        self._hasher = hasher
        self._left_bytes = limit_bytes
        self._limit_bytes = limit_bytes
        self._left_count = layout.MAX_ENTRY_COUNT
        self._left_length = layout.MAX_NAMES_LENGTH
        self._is_full = False
        self.files: list[ResultFile] = []
        self.skipped: list[str] = []

    def run(self) -> None:
        try:
            device = os.stat(self._root, follow_symlinks=False).st_dev
        except FileNotFoundError:
            return
        pending = [""]
        while pending:
            path = pending.pop()
            pending.extend(reversed(list(self._visit(path, device))))

    def _visit(self, directory: str, device: int) -> Iterator[str]:
        """Take the files of one directory; yield its subdirectories."""
        try:
            fd = self._open_directory(directory)
        except OSError as error:
            if not directory or error.errno not in (errno.EACCES, errno.ELOOP, errno.ENOENT, errno.ENOTDIR):
                raise
            self._skip(directory, f"the directory cannot be opened: {os.strerror(error.errno)}")
            return
        try:
            if os.fstat(fd).st_dev != device:
                self._skip(directory, "another file system is mounted there")
                return
            for name in self._names(fd, directory):
                path = f"{directory}/{name}" if directory else name
                mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
                stored = layout.stored_path(path)
                if fault := layout.path_fault(stored) or layout.refused_name(stored):
                    self._skip(path, fault)
                elif stat.S_ISDIR(mode):
                    yield path
                elif stat.S_ISREG(mode):
                    self._take(fd, name, path)
                else:
                    self._skip(path, _KINDS.get(stat.S_IFMT(mode), "not a regular file"))
        finally:
            os.close(fd)

    def _names(self, fd: int, directory: str) -> list[str]:
        """In order, as many as there is room for."""
        with os.scandir(fd) as entries:
            names = [entry.name for entry in islice(entries, self._left_count + 1)]
        if len(names) > self._left_count:
            self._leave_out(directory, f"more than {layout.MAX_ENTRY_COUNT} entries")
            del names[self._left_count :]
        above = len(ascii(directory))
        for count, name in enumerate(names):
            self._left_length -= above + len(ascii(name))
            if self._left_length < 0:
                self._leave_out(directory, f"names of more than {layout.MAX_NAMES_LENGTH} characters")
                del names[count:]
                break
        self._left_count -= len(names)
        return sorted(names, key=os.fsencode)

    def _leave_out(self, directory: str, why: str) -> None:
        if not self._is_full:
            self._skip(directory or ".", f"{why} in all: the rest is left out")
        self._is_full = True

    def _open_directory(self, path: str) -> int:
        """Open from the root, one component at a time: `O_NOFOLLOW` guards the last component of a path only."""
        fd = os.open(self._root, _OPEN_DIR)
        for part in path.split("/") if path else ():
            try:
                child = os.open(part, _OPEN_DIR, dir_fd=fd)
            finally:
                os.close(fd)
            fd = child
        return fd

    def _take(self, directory_fd: int, name: str, path: str) -> None:
        try:
            fd = os.open(name, _OPEN_FILE, dir_fd=directory_fd)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOENT, errno.ENXIO):
                raise
            self._skip(path, f"cannot be opened: {os.strerror(error.errno)}")
            return
        try:
            size = os.fstat(fd).st_size
            if self._left_bytes is not None and size > self._left_bytes:
                self._skip(path, f"{size} bytes would pass the limit of {self._limit_bytes} bytes for all results")
                return
            stored = layout.stored_path(path)
            entry = self._hasher.hash(fd, stored)
        finally:
            os.close(fd)
        if self._left_bytes is not None:
            self._left_bytes -= entry.size_bytes
        if stored != path:
            self._skip(path, f"stored as {stored}, the name is reserved")
        self.files.append(ResultFile(entry=entry, source=self._root / path))

    def _skip(self, path: str, reason: str) -> None:
        self.skipped.append(f"{layout.printable(path)}: {reason}")


def _hash_log(log_path: Path, hasher: _Hasher) -> list[ResultFile]:
    try:
        fd = os.open(log_path, _OPEN_FILE)
    except FileNotFoundError:
        return []
    try:
        return [ResultFile(entry=hasher.hash(fd, layout.LOG_NAME), source=log_path)]
    finally:
        os.close(fd)


class _Hasher:
    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping

    def hash(self, fd: int, stored: str) -> ManifestEntry:
        """Hash to the end of the file in pieces; the size is what was read, not what was announced."""
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file any more")
        digest = hashlib.sha256()
        size = 0
        while piece := os.read(fd, PIECE_BYTES):
            if self._stopping.is_set():
                raise TransientError("the node stops while results are collected", reason="STOPPING")
            digest.update(piece)
            size += len(piece)
        return ManifestEntry(path=stored, size_bytes=size, sha256=digest.hexdigest())
