"""Walking a directory that a hostile task wrote."""

from __future__ import annotations

import errno
import os
import socket
from hashlib import sha256
from pathlib import Path
from unittest.mock import Mock

import pytest

from nodeservice.core.model import Manifest
from nodeservice.errors import NodeFaultError, TransientError
from nodeservice.ports import ResultFile
from nodeservice.results.collect import collect
from nodeservice.results.source import VerifiedReader
from tests.unit.test_tree_walk import open_files


@pytest.fixture
def results(tmp_path: Path) -> Path:
    directory = tmp_path / "results"
    directory.mkdir()
    return directory


def run(results: Path, *, limit_bytes: int | None = None) -> tuple[Manifest, tuple[ResultFile, ...]]:
    return collect(results, results.parent / "stdout.log", task_id="t", attempt=1, limit_bytes=limit_bytes)


def test_more_entries_than_the_bound_are_left_out_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeservice.results.layout.MAX_ENTRY_COUNT", 10)
    results = tmp_path / "results"
    for place in (results / "a", results / "b"):
        place.mkdir(parents=True)
        for n in range(30):
            (place / f"{n}").touch()
    manifest, files = collect(results, tmp_path / "no-log", task_id="t", attempt=1)
    assert len(files) == 8  # and the two directories
    assert manifest.skipped == ("a: more than 10 entries in all: the rest is left out",)


def test_names_of_more_than_the_bound_are_left_out_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of ASCII each character counts for what it may take in memory."""
    monkeypatch.setattr("nodeservice.results.layout.MAX_NAMES_LENGTH", 1000)
    results = tmp_path / "results"
    (results / ("d" * 100)).mkdir(parents=True)
    for n in range(30):
        (results / ("d" * 100) / f"{n}\U0001f600").touch()
    (results / "z").mkdir()
    (results / "z" / "file").touch()
    manifest, files = collect(results, tmp_path / "no-log", task_id="t", attempt=1)
    assert len(files) == 7
    assert manifest.skipped == (f"{'d' * 100}: names of more than 1000 characters in all: the rest is left out",)


def test_every_regular_file_is_listed_with_size_and_sha256(results: Path) -> None:
    (results / "deep" / "er").mkdir(parents=True)
    (results / "deep" / "er" / "x.bin").write_bytes(b"x" * 3_000_000)
    (results / "empty").touch()
    (results.parent / "stdout.log").write_bytes(b"hello\n")
    manifest, files = run(results)
    assert [(e.path, e.size_bytes, e.sha256) for e in manifest.files] == [
        ("deep/er/x.bin", 3_000_000, sha256(b"x" * 3_000_000).hexdigest()),
        ("empty", 0, sha256(b"").hexdigest()),
        ("stdout.log", 6, sha256(b"hello\n").hexdigest()),
    ]
    assert [file.entry for file in files] == list(manifest.files)
    assert manifest.skipped == ()


def test_an_attempt_that_never_started_has_an_empty_manifest(tmp_path: Path) -> None:
    manifest, files = run(tmp_path / "missing")
    assert (manifest.files, manifest.skipped, files) == ((), (), ())


def test_symbolic_links_are_never_followed(results: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("host secret")
    (results / "file-link").symlink_to(tmp_path / "secret" / "key")
    (results / "directory-link").symlink_to(tmp_path / "secret")
    (results / "dangling").symlink_to("nowhere")
    manifest, _ = run(results)
    assert manifest.files == ()
    assert manifest.skipped == (
        "dangling: symbolic link",
        "directory-link: symbolic link",
        "file-link: symbolic link",
    )


def test_a_results_directory_that_is_itself_a_link_is_refused(results: Path, tmp_path: Path) -> None:
    results.rmdir()
    results.symlink_to("/etc")
    with pytest.raises(NodeFaultError) as caught:
        run(results)
    assert caught.value.reason == "COLLECT_FAILED"


def test_pipes_sockets_and_devices_do_not_hang_the_walk(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(results / "pipe")
    monkeypatch.chdir(results)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        manifest, _ = run(results)
    assert manifest.skipped == ("pipe: named pipe", "socket: socket")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"bad\xff.txt", "bad\\xff.txt: the name is not valid UTF-8"),
        (b"new\nline", "new\\nline: the name contains control characters"),
        (b"\x1b[31mred", "\\x1b[31mred: the name contains control characters"),
        (b" .", " .: stores take a part of the name for a dot component"),
        (b"..\\a", "..\\a: stores take a part of the name for a dot component"),
    ],
)
def test_names_that_cannot_be_stored_are_skipped_and_said(results: Path, name: bytes, shown: str) -> None:
    Path(os.fsdecode(os.fsencode(results) + b"/" + name)).write_text("x")
    (results / "good ☃.txt").write_text("y")
    manifest, _ = run(results)
    assert [entry.path for entry in manifest.files] == ["good ☃.txt"]
    assert manifest.skipped == (shown,)
    manifest.skipped[0].encode()


def test_a_tree_deeper_than_any_path_is_cut_without_running_out_of_descriptors(results: Path) -> None:
    fd = os.open(results, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=fd)
        child = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = child
    os.close(fd)
    try:
        manifest, _ = run(results)
        assert len(manifest.skipped) == 1
        assert "longer than 700 bytes" in manifest.skipped[0]
    finally:
        # pytest's own clean-up recurses and would fail on this depth.
        while (results / "d").exists():
            (results / "d").rename(results.parent / "old")
            if (results.parent / "old" / "d").exists():
                (results.parent / "old" / "d").rename(results / "d")
            (results.parent / "old").rmdir()


def test_the_tasks_own_files_of_reserved_names_are_kept_under_another(results: Path) -> None:
    (results / "manifest.json").mkdir()
    (results / "manifest.json" / "x").write_text("1")
    (results / "stdout.log").write_text("2")
    (results / "_task").mkdir()
    (results / "_task" / "stdout.log").write_text("3")
    (results / "sub").mkdir()
    (results / "sub" / "manifest.json").write_text("4")
    (results.parent / "stdout.log").write_text("log")
    manifest, files = run(results)
    assert {file.entry.path: file.source.read_text() for file in files} == {
        "_task/manifest.json/x": "1",
        "_task/stdout.log": "2",
        "_task/_task/stdout.log": "3",
        "sub/manifest.json": "4",
        "stdout.log": "log",
    }
    assert "stdout.log: stored as _task/stdout.log, the name is reserved" in manifest.skipped


def test_a_sparse_file_beyond_the_limit_is_skipped_at_once(results: Path) -> None:
    with (results / "huge").open("wb") as stream:
        stream.truncate(2**42)
    (results / "small").write_text("kept")
    (results.parent / "stdout.log").write_text("a log longer than the limit is still kept" * 100)
    manifest, _ = run(results, limit_bytes=1000)
    assert [entry.path for entry in manifest.files] == ["small", "stdout.log"]
    assert manifest.skipped == ("huge: 4398046511104 bytes would pass the limit of 1000 bytes for all results",)


def test_no_descriptor_is_left_open(results: Path) -> None:
    for number in range(20):
        (results / f"d{number}").mkdir()
        (results / f"d{number}" / "f").write_text("x")
    before = open_files(results)
    run(results)
    assert open_files(results) == before


@pytest.mark.parametrize("change", ["shorter", "different", "gone", "link"])
def test_a_file_that_changed_after_collection_is_never_handed_out_whole(results: Path, change: str) -> None:
    path = results / "a"
    path.write_bytes(b"12345678")
    _, (file,) = run(results)
    match change:
        case "shorter":
            path.write_bytes(b"1234")
        case "different":
            path.write_bytes(b"12345679")
        case "gone":
            path.unlink()
        case "link":
            path.rename(results / "b")
            path.symlink_to("b")
    got: list[bytes] = []
    with pytest.raises(NodeFaultError) as caught, VerifiedReader(file) as reader:
        got.extend(iter(lambda: reader.read(3), b""))
    assert caught.value.reason == "RESULT_CHANGED"
    assert sum(map(len, got)) < 8


def test_a_lack_of_descriptors_is_no_change_of_a_file(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former passes; what has changed is never stored any more."""
    (results / "a").write_bytes(b"1")
    _, (file,) = run(results)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", Mock(side_effect=OSError(errno.EMFILE, os.strerror(errno.EMFILE))))
        with pytest.raises(TransientError), VerifiedReader(file) as reader:
            reader.read()
