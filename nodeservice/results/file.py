"""Store results in a directory, which may be a shared network file system.

An attempt is built in a hidden sibling directory, synced, and renamed into `<root>/<task_id>/<attempt>/` at once, so a
reader sees either nothing or everything. Files are copied, never linked: the work directory stays the node's own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog

from nodeservice.core.model import AttemptId
from nodeservice.durable import sync_directory
from nodeservice.errors import NodeFaultError, TransientError
from nodeservice.ports import ResultBundle
from nodeservice.results.collect import PIECE_BYTES
from nodeservice.results.layout import MANIFEST_NAME
from nodeservice.results.mount import ResultsMount
from nodeservice.results.source import VerifiedReader
from nodeservice.threads import Threads

log = structlog.get_logger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL)


class FileResultStore:
    """`put` answers `file://<root>/<task_id>/<attempt>`.

    Repeating with the same manifest is the same answer; with another one NodeFaultError (RESULT_CONFLICT). TransientError:
    STORE_FULL, STORE_UNREACHABLE. NodeFaultError: STORE_REFUSED (permissions, read-only), RESULT_CHANGED.
    """

    def __init__(self, root: Path, *, mount: ResultsMount | None = None) -> None:
        self._root = root.absolute()
        self._mount = mount
        self._pool = Threads(4, name="results-file")
        self._building: set[Path] = set()
        self._lock = threading.Lock()

    async def put(self, bundle: ResultBundle) -> str:
        stop = threading.Event()
        try:
            return await self._pool.run(lambda: self._put(bundle, stop))
        finally:
            stop.set()

    async def check(self) -> None:
        await self._pool.run(self._check)

    async def drop_leftovers(self, id_: AttemptId, paths: Sequence[str]) -> int:
        """What a broken-off put left lies in the directory itself, where `results.folder` finds it."""
        return 0

    async def close(self) -> None:
        self._pool.close()
        await self._pool.ended()

    def _check(self) -> None:
        if self._mount is not None:
            self._mount.check()
        with self._translated(self._root):
            self._make_directory(self._root)
            if not os.access(self._root, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def _put(self, bundle: ResultBundle, stop: threading.Event) -> str:
        if self._mount is not None:
            self._mount.check()
        target = self._root.joinpath(*bundle.prefix.split("/"))
        with self._translated(target):
            if not self._is_stored(target, bundle):
                self._make_directory(self._root)
                target.parent.mkdir(exist_ok=True)
                with self._workplace(target) as partial:
                    self._build(partial, bundle, stop)
                    self._commit(partial, target, bundle)
            # Also what is there already: whoever put it there may have been killed before this.
            for directory in (target.parent, self._root):
                sync_directory(directory)
        return target.as_uri()

    def _is_stored(self, target: Path, bundle: ResultBundle) -> bool:
        try:
            present = (target / MANIFEST_NAME).read_bytes()
        except FileNotFoundError:
            if not target.exists():
                return False
            present = b""
        if present == bundle.manifest_bytes:
            return True
        raise NodeFaultError(
            f"{target} already holds other results of attempt {bundle.spec.id}",
            reason="RESULT_CONFLICT",
            hint="two nodes ran this attempt, or two masters share the directory: give each one of its own",
        )

    @contextlib.contextmanager
    def _workplace(self, target: Path) -> Iterator[Path]:
        """A directory beside the target; what an earlier process left there of this attempt is removed."""
        partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
        with self._lock:
            self._building.add(partial)
            for leftover in set(target.parent.glob(f".{target.name}.*.partial")) - self._building:
                log.info("results.leftover_removed", path=str(leftover))
                shutil.rmtree(leftover, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            with self._lock:
                self._building.discard(partial)

    def _build(self, partial: Path, bundle: ResultBundle, stop: threading.Event) -> None:
        directories = {partial}
        for file in bundle.files:
            destination = partial / file.entry.path
            destination.parent.mkdir(parents=True, exist_ok=True)
            directories.update(parent for parent in destination.parents if parent.is_relative_to(partial))
            with VerifiedReader(file, stop=stop) as reader, destination.open("xb") as stream:
                while piece := reader.read(PIECE_BYTES):
                    stream.write(piece)
                stream.flush()
                os.fsync(stream.fileno())
        with (partial / MANIFEST_NAME).open("xb") as stream:
            stream.write(bundle.manifest_bytes)
            stream.flush()
            os.fsync(stream.fileno())
        for directory in sorted(directories, reverse=True):
            sync_directory(directory)

    def _commit(self, partial: Path, target: Path, bundle: ResultBundle) -> None:
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not self._is_stored(target, bundle):
                raise

    def _make_directory(self, directory: Path) -> None:
        """Make it and its parents, each made durable in its own parent, and no business of other users."""
        if directory.is_dir():
            return
        self._make_directory(directory.parent)
        directory.mkdir(mode=0o750, exist_ok=True)
        sync_directory(directory.parent)

    @contextlib.contextmanager
    def _translated(self, target: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"results cannot be stored in {target}: {os.strerror(error.errno or 0)}"
            if error.errno in _FULL:
                raise TransientError(message, reason="STORE_FULL", hint="make room there") from error
            if error.errno in _REFUSED:
                raise NodeFaultError(
                    message, reason="STORE_REFUSED", hint="make the results directory writable for the node"
                ) from error
            raise TransientError(message, reason="STORE_UNREACHABLE") from error
