"""Where results become durable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from nodeservice.core.model import AttemptId, Manifest, ManifestEntry, TaskSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultFile:
    """A collected file and where it lies on this host."""

    entry: ManifestEntry
    source: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultBundle:
    """The frozen output of one attempt, ready to be stored. `manifest_bytes` is the canonical `manifest.json`."""

    spec: TaskSpec
    worker_id: str
    files: tuple[ResultFile, ...]
    manifest: Manifest
    manifest_bytes: bytes

    @property
    def prefix(self) -> str:
        """`<task_id>/<attempt>`: a zombie attempt can never overwrite a newer one."""
        return f"{self.spec.id.task_id}/{self.spec.id.attempt}"


class ResultStore(Protocol):
    """Where results become durable."""

    async def put(self, bundle: ResultBundle) -> str:
        """Store every file, verify, store the manifest last, and return the location (a URL).

        When it returns, all can be read. Repeating is safe; what is already there and verified is not sent again.
        Raises TransientError (try again), NodeFaultError (the store refuses us: credentials, policy), RequestError
        (RESULT_TOO_LARGE for this kind of store; NamesRefusedError where it takes all but some of the files, by name).
        """
        ...

    async def check(self) -> None:
        """Ask, as far as the store can be asked without storing anything, whether it would take results from us.

        Raises as `put` does; with the reason STORE_CREDENTIALS where it refuses whoever we say we are, so that nothing at
        all can be stored until somebody changes that.
        """
        ...

    async def drop_leftovers(self, id_: AttemptId, paths: Sequence[str]) -> int:
        """Drop what broken-off puts of an attempt left, which nobody goes on with; how many there were.

        `paths` are those of its files, as far as they are known. Not while a put is under way. Raises as `put` does.
        """
        ...

    async def close(self) -> None: ...


class ResultsFolder(Protocol):
    """The results directory of this host, as it grows old. All methods block, and raise OSError.

    Only what the layout of this service shows to be an attempt's is ever touched, and no symbolic link is followed.
    """

    def stored_before(self, instant: datetime, *, only_moved: bool = False) -> Sequence[AttemptId]:
        """Attempts whose results were complete here before that instant, or (only) whose pointer elsewhere was left."""
        ...

    def remove(self, id_: AttemptId) -> None:
        """Take all of it away at once, to whoever reads. Repeating is harmless."""
        ...

    def leftovers(self) -> Sequence[tuple[AttemptId, Path]]:
        """Half-made directories, of puts and removals that were cut off or are under way."""
        ...

    def remove_leftover(self, path: Path) -> None: ...


class Bundles(Protocol):
    """How output on this host becomes a bundle. All methods but `stop` block; call them from a thread."""

    def stop(self) -> None:
        """Break off what `collect` is doing: it raises TransientError (STOPPING)."""
        ...

    def collect(self, spec: TaskSpec, work_dir: Path, log_path: Path) -> ResultBundle:
        """Freeze a work directory; one that is frozen already is taken as it is. Raises NodeFaultError (COLLECT_FAILED)."""
        ...

    def reopen(self, spec: TaskSpec, work_dir: Path) -> ResultBundle:
        """The bundle of a frozen work directory."""
        ...

    def leave_out(self, spec: TaskSpec, work_dir: Path, refused: Mapping[str, str]) -> ResultBundle:
        """Freeze it anew without these files, which its manifest then tells as skipped: stored paths, each with why."""
        ...

    def kept(self, spec: TaskSpec) -> ResultBundle:
        """The bundle of results that were kept on this host since the store did not take them."""
        ...

    def moved_to(self, spec: TaskSpec) -> str | None:
        """Where kept results have gone, once `discard_kept` has begun; None while they are still here."""
        ...

    def discard_kept(self, spec: TaskSpec, location: str) -> None:
        """Drop the kept copy, leaving a pointer to where it is now. Repeating is harmless."""
        ...

    def digest(self, bundle: ResultBundle) -> str:
        """sha256 of the bundle's manifest, in hex."""
        ...
