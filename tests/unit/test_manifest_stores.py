"""What stores keep to themselves, and a directory that is full."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from nodeservice.core.model import AttemptId, Resources, TaskSpec
from nodeservice.errors import NamesRefusedError, TransientError
from nodeservice.results import file, manifest
from nodeservice.results.access import S3Access
from nodeservice.results.file import FileResultStore
from nodeservice.results.hand_over import Bundles
from nodeservice.results.mount import ResultsMount
from tests.synced import Renames

ACCESS = S3Access(endpoint="127.0.0.1:9000", bucket="", access_key="the-key", secret_key="the-secret")

SPEC = TaskSpec(id=AttemptId("t"), image="i", request=Resources(), pids_limit=1, fingerprint="f")
IN_A_FULL_DIRECTORY = """
import asyncio, sys
from pathlib import Path
from nodeservice.core.model import AttemptId, Resources, TaskSpec
from nodeservice.errors import TransientError
from nodeservice.results import manifest
from nodeservice.results.file import FileResultStore

work, full = Path(sys.argv[1]), Path(sys.argv[2])
collected, _ = manifest.collect(work / "results", work / "stdout.log", task_id="t", attempt=1)
manifest.write_local(work, collected)
spec = TaskSpec(id=AttemptId("t"), image="i", request=Resources(), pids_limit=1, fingerprint="f")
try:
    asyncio.run(FileResultStore(full).put(manifest.bundle_from(work, spec, "w")))
except TransientError as error:
    print(error.reason, [path.name for path in (full / "t").iterdir()])
"""


def test_credentials_never_show() -> None:
    assert "the-" not in repr(ACCESS)


def test_a_store_loads_no_heavy_library_before_it_is_used() -> None:
    code = (
        "import sys; from nodeservice.results import file, http, s3;"
        "print([name for name in ('minio', 'requests', 'urllib3', 'grpc') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_full_directory_is_tried_again_and_nothing_half_stays_there(tmp_path: Path) -> None:
    """On a real file system of 1 MiB, mounted where only the child process sees it."""
    (tmp_path / "work" / "results").mkdir(parents=True)
    (tmp_path / "work" / "results" / "large").write_bytes(b"x" * 3_000_000)
    (tmp_path / "full").mkdir()
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-m", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs unshare(1) and the right to mount")
    script = f'mount -t tmpfs -o size=1m none {tmp_path}/full && exec "$@"'
    arguments = [sys.executable, "-c", IN_A_FULL_DIRECTORY, tmp_path / "work", tmp_path / "full"]
    child = subprocess.run(
        [unshare, "-m", "sh", "-c", script, "sh", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert child.stdout == "STORE_FULL []\n", child.stderr


async def test_results_that_are_there_already_are_made_durable_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The put before was cut off, or its disk failed, between the rename and what makes it last."""
    work, root = tmp_path / "work", tmp_path / "stored"
    (work / "results").mkdir(parents=True)
    collected, _ = manifest.collect(work / "results", work / "stdout.log", task_id="t", attempt=1)
    manifest.write_local(work, collected)
    spec = TaskSpec(id=AttemptId("t"), image="i", request=Resources(), pids_limit=1, fingerprint="f")
    bundle = manifest.bundle_from(work, spec, "w")
    store = FileResultStore(root)
    synced: list[Path] = []

    def fails_once_renamed(directory: Path) -> None:
        if (root / "t" / "1").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(file, "sync_directory", fails_once_renamed)
    with pytest.raises(TransientError):
        await store.put(bundle)
    monkeypatch.setattr(file, "sync_directory", synced.append)
    assert await store.put(bundle) == (root / "t" / "1").as_uri()
    await store.close()
    assert {root / "t", root} <= set(synced)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (None, "can't hold the name: File name too long"),  # the kernel's own
        (errno.EINVAL, "can't hold the name: Invalid argument"),
        (errno.EEXIST, "for that of another file"),
    ],
)
async def test_a_name_that_the_file_system_cannot_hold_is_told_and_nothing_half_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None, words: str
) -> None:
    """As with `:` on a share of Windows, or names that differ in case alone."""
    work, root = tmp_path / "work", tmp_path
    name = "/".join(["d" * 200] * 3)
    (work / "results" / name).parent.mkdir(parents=True)
    for path in ("results/a", f"results/{name}", "results/z", "stdout.log"):
        (work / path).write_bytes(b"1")
    collected, _ = manifest.collect(work / "results", work / "stdout.log", task_id="t", attempt=1)
    manifest.write_local(work, collected)
    while number is None and len(str(root)) < 3600:
        root /= "r" * 200
    open_ = Path.open

    def refusing(place: Path, mode: str) -> BinaryIO:
        if number is not None and str(place).endswith(name) and mode == "xb":
            raise OSError(number, os.strerror(number))
        return open_(place, mode)  # type: ignore[return-value]

    monkeypatch.setattr(Path, "open", refusing)
    store = FileResultStore(root / "stored")
    with pytest.raises(NamesRefusedError, match="1 results, such as ddd") as refused:
        await store.put(manifest.bundle_from(work, SPEC, "w"))
    assert list(refused.value.names) == [name]
    assert words in refused.value.names[name]
    assert list((root / "stored" / "t").iterdir()) == []
    rest = Bundles(worker_id="w", results_dir=root).leave_out(SPEC, work, refused.value.names)
    await store.put(rest)
    await store.close()
    assert {path.name for path in (root / "stored/t/1").iterdir()} == {"a", "z", "stdout.log", "manifest.json"}


async def test_a_mount_that_is_away_is_no_place_for_results_nor_without_those_that_are_kept_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = {tmp_path / "share", Path("/")}
    monkeypatch.setattr(os.path, "ismount", lambda place: Path(place) in mounts)
    state, results = tmp_path / "state", tmp_path / "share" / "results"
    state.mkdir()
    ResultsMount(results, state).check()
    store = FileResultStore(results, mount=ResultsMount(results, state))
    kept = Bundles(worker_id="w", results_dir=results, mount=ResultsMount(results, state))
    mounts.remove(tmp_path / "share")
    try:
        with pytest.raises(TransientError, match="nothing is mounted"):
            await store.check()
    finally:
        await store.close()
    with pytest.raises(TransientError, match="nothing is mounted"):
        kept.moved_to(SPEC)
    assert not results.exists()
    for elsewhere in (tmp_path / "elsewhere", state / "results"):
        ResultsMount(elsewhere, state).check()
    mounts.add(tmp_path)  # the state directory lies on it too
    ResultsMount(tmp_path / "other", state).check()
    mounts.remove(tmp_path)
    ResultsMount(tmp_path / "other", state).check()


async def test_all_of_the_results_is_on_the_disk_before_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, root, renames = tmp_path / "work", tmp_path / "stored", Renames(monkeypatch)
    (work / "results" / "a" / "b").mkdir(parents=True)
    (work / "results" / "a" / "b" / "c").write_bytes(b"1")
    (work / "stdout.log").write_bytes(b"log")
    collected, _ = manifest.collect(work / "results", work / "stdout.log", task_id="t", attempt=1)
    manifest.write_local(work, collected)
    assert renames.sources == [work / ".manifest.json.partial"]
    assert work in renames.synced
    spec = TaskSpec(id=AttemptId("t"), image="i", request=Resources(), pids_limit=1, fingerprint="f")
    store = FileResultStore(root)
    await store.put(manifest.bundle_from(work, spec, "w"))
    await store.close()
    assert [source.parent for source in renames.sources[1:]] == [root / "t"]
    assert renames.unsynced == []
