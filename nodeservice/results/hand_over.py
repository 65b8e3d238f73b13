"""How the lifecycle gets its bundles: frozen from a work directory, reopened after a restart, or kept on this host."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nodeservice.core.model import TaskSpec
from nodeservice.errors import NodeFaultError
from nodeservice.ports import ResultBundle
from nodeservice.results import manifest
from nodeservice.results.layout import LOG_NAME, MOVED_NAME, RESULTS_DIR, printable
from nodeservice.results.mount import ResultsMount


class Bundles:
    """Bundles of one node. All methods block; call them from a thread.

    Those about what is kept raise TransientError (STORE_UNREACHABLE) while its mount is away.
    """

    def __init__(self, *, worker_id: str, results_dir: Path, mount: ResultsMount | None = None) -> None:
        self._worker_id = worker_id
        self._results_dir = results_dir
        self._mount = mount
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Break off what `collect` is doing, with TransientError (STOPPING): the next start does it again."""
        self._stopping.set()

    def collect(self, spec: TaskSpec, work_dir: Path, log_path: Path) -> ResultBundle:
        """Freeze a work directory; one that is frozen already is taken as it is. Raises NodeFaultError (COLLECT_FAILED)."""
        if manifest.read_local(work_dir) is None:
            _link_log(log_path, work_dir / LOG_NAME)
            frozen, _files = manifest.collect(
                work_dir / RESULTS_DIR,
                work_dir / LOG_NAME,
                task_id=spec.id.task_id,
                attempt=spec.id.attempt,
                limit_bytes=_most_bytes(spec, work_dir),
                stopping=self._stopping,
            )
            manifest.write_local(work_dir, frozen)
        return self.reopen(spec, work_dir)

    def reopen(self, spec: TaskSpec, work_dir: Path) -> ResultBundle:
        """The bundle of a frozen work directory."""
        return manifest.bundle_from(work_dir, spec, self._worker_id)

    def leave_out(self, spec: TaskSpec, work_dir: Path, refused: Mapping[str, str]) -> ResultBundle:
        """Freeze it anew without these files."""
        before = self.reopen(spec, work_dir).manifest
        skipped = (*before.skipped, *(f"{printable(path)}: {why}" for path, why in refused.items()))
        files = tuple(entry for entry in before.files if entry.path not in refused)
        manifest.write_local(work_dir, replace(before, files=files, skipped=tuple(sorted(skipped))))
        return self.reopen(spec, work_dir)

    def kept(self, spec: TaskSpec) -> ResultBundle:
        """The bundle of results that were kept in the results directory of this host."""
        return manifest.bundle_from_stored(self._kept_dir(spec), spec, self._worker_id)

    def moved_to(self, spec: TaskSpec) -> str | None:
        """Where the kept results have gone; None while they are still here."""
        try:
            return (self._kept_dir(spec) / MOVED_NAME).read_text().strip() or None
        except FileNotFoundError:
            return None

    def discard_kept(self, spec: TaskSpec, location: str) -> None:
        """Drop the kept copy, leaving a pointer to where it is now. Repeating is harmless.

        The pointer comes first: whoever is cut off in the middle finds it, and goes on from there.
        """
        directory = self._kept_dir(spec)
        if not directory.is_dir():
            return
        manifest.write_durably(directory / MOVED_NAME, f"{location}\n".encode())
        for entry in directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name not in (MOVED_NAME, manifest.MANIFEST_NAME):
                entry.unlink()
        (directory / manifest.MANIFEST_NAME).unlink(missing_ok=True)

    def digest(self, bundle: ResultBundle) -> str:
        return manifest.sha256_of(bundle.manifest_bytes)

    def _kept_dir(self, spec: TaskSpec) -> Path:
        if self._mount is not None:
            self._mount.check()
        return self._results_dir / spec.id.task_id / str(spec.id.attempt)


def _link_log(log_path: Path, place: Path) -> None:
    try:
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            os.link(log_path, place)
    except OSError as error:
        raise NodeFaultError(
            f"the log {log_path} cannot be linked to {place}: {error.strerror}",
            reason="COLLECT_FAILED",
            hint="logs and work directories belong on one file system",
        ) from error


def _most_bytes(spec: TaskSpec, work_dir: Path) -> int:
    """What is more than its bound on the disk allows can only be a sparse file, of which a store would write every zero.

    Twice the bound, since a watched one is crossed before it is noticed.
    """
    whole_disk = shutil.disk_usage(work_dir).total
    return min(2 * spec.request.disk_bytes, whole_disk) or whole_disk
