"""How the lifecycle gets its bundles: frozen from a work directory, reopened after a restart, or kept on this host."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from nodeservice.core.model import TaskSpec
from nodeservice.ports import ResultBundle
from nodeservice.results import manifest
from nodeservice.results.layout import LOG_NAME, RESULTS_DIR

MOVED_NAME = "MOVED"
"""What stays of a kept directory once the store has taken it: a file with the new location."""


class Bundles:
    """Bundles of one node. All methods block; call them from a thread."""

    def __init__(self, *, worker_id: str, results_dir: Path) -> None:
        self._worker_id = worker_id
        self._results_dir = results_dir

    def collect(self, spec: TaskSpec, work_dir: Path, log_path: Path) -> ResultBundle:
        """Freeze a work directory; one that is frozen already is taken as it is. Raises NodeFaultError (COLLECT_FAILED)."""
        if manifest.read_local(work_dir) is None:
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(log_path, work_dir / LOG_NAME)
            frozen, _files = manifest.collect(
                work_dir / RESULTS_DIR,
                work_dir / LOG_NAME,
                task_id=spec.id.task_id,
                attempt=spec.id.attempt,
                # More than the disk holds can only be a sparse file, which would be read for years.
                limit_bytes=shutil.disk_usage(work_dir).total,
            )
            manifest.write_local(work_dir, frozen)
        return self.reopen(spec, work_dir)

    def reopen(self, spec: TaskSpec, work_dir: Path) -> ResultBundle:
        """The bundle of a frozen work directory."""
        return manifest.bundle_from(work_dir, spec, self._worker_id)

    def kept(self, spec: TaskSpec) -> ResultBundle:
        """The bundle of results that were kept in the results directory of this host."""
        return manifest.bundle_from_stored(self._kept_dir(spec), spec, self._worker_id)

    def discard_kept(self, spec: TaskSpec, location: str) -> None:
        """Drop the kept copy, leaving a pointer to where it is now. Repeating is harmless."""
        directory = self._kept_dir(spec)
        if not directory.is_dir():
            return
        for entry in directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name not in (MOVED_NAME, manifest.MANIFEST_NAME):
                entry.unlink()
        (directory / MOVED_NAME).write_text(location + "\n")
        (directory / manifest.MANIFEST_NAME).unlink(missing_ok=True)

    def digest(self, bundle: ResultBundle) -> str:
        return manifest.sha256_of(bundle.manifest_bytes)

    def _kept_dir(self, spec: TaskSpec) -> Path:
        return self._results_dir / spec.id.task_id / str(spec.id.attempt)
