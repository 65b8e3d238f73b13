"""Where an attempt's files lie on this host."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nodeservice.core.model import AttemptId
from nodeservice.durable import sync_directory
from nodeservice.lifecycle.removal import remove_tree

SALVAGE = "salvage"


@dataclass(frozen=True, slots=True)
class WorkDirs:
    """Paths under the state directory. Ids were checked at admission, so they are safe in a path.

    The log lies apart from the work directory: it can still be followed after the clean-up.
    """

    state_dir: Path

    def root(self, id_: AttemptId) -> Path:
        return self.state_dir.joinpath("tasks", str(id_))

    def results(self, id_: AttemptId) -> Path:
        """Mounted in the container at /results and /output."""
        return self.state_dir.joinpath("tasks", str(id_), "results")

    def gpu_bill(self, id_: AttemptId) -> Path:
        return self.state_dir.joinpath("tasks", str(id_), "gpu.json")

    @property
    def gpu_resets(self) -> Path:
        return self.state_dir / "gpus.json"

    def log(self, id_: AttemptId) -> Path:
        return self.state_dir.joinpath("logs", f"{id_}.log")

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
        if root.exists():
            salvage.mkdir(mode=0o700, parents=True, exist_ok=True)
            root.rename(target)
            last = target
        if last is not None:  # also what was moved before: whoever did that may have been killed before this
            for directory in (salvage, self.state_dir):
                sync_directory(directory)
        return last

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

    def logs(self) -> list[AttemptId]:
        """Whose logs there are."""
        return _named(entry.stem for entry in (self.state_dir / "logs").glob("*.log"))

    def all(self) -> list[AttemptId]:
        """Whose work directories there are."""
        return _named(entry.name for entry in (self.state_dir / "tasks").glob("*"))


def _named(names: Iterable[str]) -> list[AttemptId]:
    """What is not called as ours are is left out."""
    parts = (name.rpartition(".") for name in sorted(names))
    return [AttemptId(task_id, int(number)) for task_id, _, number in parts if task_id and number.isdecimal()]
