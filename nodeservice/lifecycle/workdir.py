"""Where an attempt's files lie on this host."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nodeservice.core.model import AttemptId
from nodeservice.lifecycle.removal import remove_tree

SALVAGE = "salvage"


@dataclass(frozen=True, slots=True)
class WorkDirs:
    """Paths under the state directory. Ids were checked at admission, so they are safe in a path.

    The log lies apart from the work directory: it can still be followed after the clean-up.
    """

    state_dir: Path

    def root(self, id_: AttemptId) -> Path:
        return self.state_dir / "tasks" / str(id_)

    def results(self, id_: AttemptId) -> Path:
        """Mounted in the container at /results and /output."""
        return self.root(id_) / "results"

    def gpu_bill(self, id_: AttemptId) -> Path:
        return self.root(id_) / "gpu.json"

    def log(self, id_: AttemptId) -> Path:
        return self.state_dir / "logs" / f"{id_}.log"

    def prepare(self, id_: AttemptId) -> None:
        """Make them. World-writable inside a private parent, since a container may run as any user."""
        self.log(id_).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root(id_).mkdir(mode=0o700, parents=True, exist_ok=True)
        results = self.results(id_)
        results.mkdir(exist_ok=True)
        results.chmod(0o777)

    def remove(self, id_: AttemptId) -> None:
        """Remove all but the log. Repeating is harmless."""
        remove_tree(self.root(id_))

    def salvage(self, id_: AttemptId) -> Path | None:
        """Move what could not be collected or stored aside, to `salvage/`, for a person to look at. Repeating is harmless.

        What lies there under its name already, of an attempt that was taken up a second time, stays: the next gets a number.
        Gives where it is then, durably; None where there is nothing.
        """
        root, salvage = self.root(id_), self.state_dir / SALVAGE
        last = None
        for name in itertools.chain([str(id_)], (f"{id_}.{number}" for number in itertools.count(2))):
            if not os.path.lexists(target := salvage / name):
                break
            last = target
        if not root.exists():
            return last
        salvage.mkdir(mode=0o700, parents=True, exist_ok=True)
        root.rename(target)
        for directory in (salvage, self.state_dir):
            _sync(directory)
        return target

    def salvaged_before(self, instant: datetime) -> list[Path]:
        """What was moved aside before that instant: moving a directory sets the time of its last change (ctime)."""
        salvage = self.state_dir / SALVAGE
        if not salvage.is_dir() or salvage.is_symlink():
            return []
        found = sorted(entry for entry in salvage.iterdir() if entry.is_dir() and not entry.is_symlink())
        return [entry for entry in found if datetime.fromtimestamp(entry.lstat().st_ctime, UTC) < instant]

    def remove_salvaged(self, path: Path) -> None:
        remove_tree(path)

    def remove_log(self, id_: AttemptId) -> None:
        self.log(id_).unlink(missing_ok=True)

    def logs(self) -> list[str]:
        """Whose logs there are, named as work directories are."""
        logs = self.state_dir / "logs"
        return sorted(entry.stem for entry in logs.glob("*.log")) if logs.is_dir() else []

    def all(self) -> list[str]:
        """The names (`<task_id>.<attempt>`) of all work directories there are."""
        tasks = self.state_dir / "tasks"
        return sorted(entry.name for entry in tasks.iterdir()) if tasks.is_dir() else []


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
