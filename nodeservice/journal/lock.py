"""Makes sure that one state directory serves one node process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from nodeservice.errors import ConfigError, NodeServiceError, TransientError

_PASSING = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
)
"""Another directory would not be the remedy: the disk is full or away, or the host is short of something."""


def not_writable(field: str, directory: Path, error: OSError) -> NodeServiceError:
    """TransientError (STATE_DIR_UNWRITABLE) for what may pass, else ConfigError."""
    words = f"{field} {directory} cannot be written: {error.strerror}"
    if error.errno in _PASSING:
        return TransientError(
            words, reason="STATE_DIR_UNWRITABLE", field=field, hint="free space, or look after the disk"
        )
    return ConfigError(words, field=field, hint="choose a directory that this user may write to")


class StateDirLock:
    """An advisory lock (flock) on `<state_dir>/node.lock`, which holds the pid of its holder.

    The kernel drops the lock with the process, so a killed node leaves nothing to clean up; the file itself stays, since
    removing it would let two processes lock two files of one name.
    """

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "node.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, without waiting; making the directory if need be. A lock that is held already is success.

        Raises TransientError (STATE_DIR_IN_USE), naming the pid of the holder, when another process (or object) has it:
        it may be just about to end. As `not_writable` where the file can't be made.
        """
        if self._descriptor is not None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise not_writable("state_dir", self._path.parent, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise self._refusal(error, holder) from error
        os.ftruncate(descriptor, 0)
        with suppress(OSError):  # a full disk
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give it back. One that is not held is success."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def _refusal(self, error: OSError, holder: str) -> NodeServiceError:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return ConfigError(f"state_dir {self._path.parent} cannot be locked: {error.strerror}", field="state_dir")
        return TransientError(
            f"state_dir {self._path.parent} is in use by the process with pid {holder}",
            reason="STATE_DIR_IN_USE",
            field="state_dir",
            hint="stop that node first, or give this one a state directory of its own",
        )


def _holder(descriptor: int) -> str:
    text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
    return text if text.isdigit() else "unknown"
