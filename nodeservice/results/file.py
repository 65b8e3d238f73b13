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
from nodeservice.errors import NamesRefusedError, NodeFaultError, TransientError
from nodeservice.ports import ResultBundle
from nodeservice.results.collect import PIECE_BYTES
from nodeservice.results.layout import LOG_NAME, MANIFEST_NAME, printable
from nodeservice.results.mount import ResultsMount
from nodeservice.results.source import VerifiedReader
from nodeservice.threads import Threads

log = structlog.get_logger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL)


_OF_THE_NAME = frozenset(
    {errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
)
"""What file systems say of a name that they can't hold, in a directory that is there. ENOENT: CIFS (smb2maperror.c)."""
_TAKEN = frozenset({errno.EEXIST, errno.ENOTDIR, errno.EISDIR})
"""The name of another file is the same to them, as where upper and lower case are one."""


class FileResultStore:
    """`put` answers `file://<root>/<task_id>/<attempt>`.

    Repeating with the same manifest is the same answer; with another one NodeFaultError (RESULT_CONFLICT). TransientError:
    STORE_FULL, STORE_UNREACHABLE. NodeFaultError: STORE_REFUSED (permissions, read-only), RESULT_CHANGED. NamesRefusedError
    where the file system can't hold some of the names.
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
        refused: dict[str, str] = {}
        for file in bundle.files:
            destination = partial / file.entry.path
            try:
                destination.parent.mkdir(parents=True, exist_ok=True)
                made = destination.open("xb")
            except OSError as error:
                if error.errno not in _OF_THE_NAME or file.entry.path == LOG_NAME or not partial.is_dir():
                    raise
                refused[file.entry.path] = _why_refused(error)
                continue
            directories.update(parent for parent in destination.parents if parent.is_relative_to(partial))
            with made as stream, VerifiedReader(file, stop=stop) as reader:
                while not refused and (piece := reader.read(PIECE_BYTES)):
                    stream.write(piece)
                stream.flush()
                os.fsync(stream.fileno())
        if refused:
            (partial / MANIFEST_NAME).touch()  # else it is not their names
            path, why = next(iter(refused.items()))
            raise NamesRefusedError(f"{len(refused)} results, such as {printable(path)}: {why}", names=refused)
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


def _why_refused(error: OSError) -> str:
    if error.errno in _TAKEN:
        return "the results directory takes the name for that of another file"
    return f"the results directory can't hold the name: {os.strerror(error.errno or 0)}"
