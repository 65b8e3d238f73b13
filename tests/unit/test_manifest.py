"""The manifest's canonical bytes, its checks, and its copy in the work directory."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.core.model import AttemptId, Manifest, ManifestEntry, Resources, TaskSpec
from nodeservice.errors import NodeFaultError
from nodeservice.results import layout, manifest

ENTRY = ManifestEntry(path="a.txt", size_bytes=3, sha256="ab" * 32)
SPEC = TaskSpec(id=AttemptId("task-1", 2), image="i", request=Resources(), pids_limit=1, fingerprint="f")


def a_manifest(*entries: ManifestEntry) -> Manifest:
    return Manifest(task_id="task-1", attempt=2, files=entries or (ENTRY,), skipped=("x: symbolic link",))


def test_the_canonical_bytes_are_fixed_for_good() -> None:
    assert manifest.encode(a_manifest()) == (
        b'{"attempt":2,"files":[{"path":"a.txt","sha256":"' + b"ab" * 32 + b'","size_bytes":3}],'
        b'"skipped":["x: symbolic link"],"task_id":"task-1","version":1}'
    )


def test_the_order_of_the_files_does_not_change_the_bytes() -> None:
    other = replace(ENTRY, path="b.txt")
    assert manifest.encode(a_manifest(ENTRY, other)) == manifest.encode(a_manifest(other, ENTRY))


@given(
    st.lists(
        st.builds(
            ManifestEntry,
            path=st.text(min_size=1, max_size=20).filter(
                lambda path: layout.path_fault(path) is None and path != "manifest.json"
            ),
            size_bytes=st.integers(0, 2**63),
            sha256=st.binary(max_size=8).map(lambda data: sha256(data).hexdigest()),
        ),
        unique_by=lambda entry: entry.path,
        max_size=5,
    )
)
def test_what_was_encoded_decodes_to_the_same(entries: list[ManifestEntry]) -> None:
    original = Manifest(
        task_id="t", attempt=1, files=tuple(sorted(entries, key=lambda entry: entry.path)), skipped=("é: socket",)
    )
    data = manifest.encode(original)
    assert manifest.decode(data) == original
    assert manifest.encode(manifest.decode(data)) == data
    assert manifest.sha256_of(data) == sha256(data).hexdigest()


@pytest.mark.parametrize(
    "path", ["../a", "/a", "a/../b", "a//b", "", ".", "a\nb", "a\x7f", "x" * 701, "manifest.json", "a\x85b"]
)
def test_a_manifest_with_a_hostile_path_is_refused(path: str) -> None:
    document = json.loads(manifest.encode(a_manifest()))
    document["files"][0]["path"] = path
    with pytest.raises(NodeFaultError) as caught:
        manifest.decode(json.dumps(document).encode())
    assert caught.value.reason == "MANIFEST_INVALID"


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"task_id": 5},
        {"attempt": True},
        {"files": {}},
        {"files": [{"path": "a", "size_bytes": -1, "sha256": "ab" * 32}]},
        {"files": [{"path": "a", "size_bytes": 1, "sha256": "short"}]},
        {"files": [{"path": "a", "size_bytes": 1, "sha256": "ab" * 32}] * 2},
        {"files": [5]},
        {"skipped": [None]},
    ],
)
def test_a_manifest_that_is_not_one_is_refused(change: dict[str, object]) -> None:
    document = json.loads(manifest.encode(a_manifest())) | change
    with pytest.raises(NodeFaultError):
        manifest.decode(json.dumps(document).encode())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"null", b"[" * 100_000])
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(NodeFaultError):
        manifest.decode(data)


def test_a_saved_manifest_is_read_back_with_its_exact_bytes(tmp_path: Path) -> None:
    assert manifest.read_local(tmp_path) is None
    data = manifest.write_local(tmp_path, a_manifest())
    assert manifest.write_local(tmp_path, a_manifest()) == data
    assert manifest.read_local(tmp_path) == (a_manifest(), data)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_manifest_that_cannot_be_saved_is_a_node_fault(tmp_path: Path) -> None:
    with pytest.raises(NodeFaultError) as caught:
        manifest.write_local(tmp_path / "missing", a_manifest())
    assert caught.value.reason == "COLLECT_FAILED"


def test_a_bundle_after_a_restart_finds_every_source(tmp_path: Path) -> None:
    results = tmp_path / "results"
    (results / "_task").mkdir(parents=True)
    for path in ("a.txt", "stdout.log", "manifest.json", "_task/stdout.log"):
        (results / path).write_text(f"task's {path}")
    (tmp_path / "stdout.log").write_text("the log")
    collected, files = manifest.collect(results, tmp_path / "stdout.log", task_id="task-1", attempt=2)
    data = manifest.write_local(tmp_path, collected)

    bundle = manifest.bundle_from(tmp_path, SPEC, "w")

    assert (bundle.files, bundle.manifest, bundle.manifest_bytes) == (files, collected, data)
    assert {file.entry.path: file.source.read_text() for file in bundle.files} == {
        "stdout.log": "the log",
        "a.txt": "task's a.txt",
        "_task/stdout.log": "task's stdout.log",
        "_task/manifest.json": "task's manifest.json",
        "_task/_task/stdout.log": "task's _task/stdout.log",
    }


def test_a_bundle_is_never_made_from_another_attempts_manifest(tmp_path: Path) -> None:
    manifest.write_local(tmp_path, a_manifest())
    with pytest.raises(NodeFaultError, match=r"task-1\.2"):
        manifest.bundle_from(tmp_path, replace(SPEC, id=AttemptId("task-1", 3)), "w")
    with pytest.raises(NodeFaultError, match=r"no manifest\.json"):
        manifest.bundle_from(tmp_path / "elsewhere", SPEC, "w")
