"""The manifest: its canonical bytes, its copy in the work directory, and the bundle that is made from it.

Canonical JSON, version 1: UTF-8, keys sorted, no white space, files sorted by path.

    {"attempt":1,"files":[{"path":"a.txt","sha256":"…","size_bytes":3}],"skipped":[],"task_id":"t","version":1}

The sha256 of these bytes is the `manifest_sha256` of a report. Stores write them last as `manifest.json`: a reader that
finds it finds everything. `skipped` also notes files that are stored under another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from nodeservice.core.model import Manifest, ManifestEntry, TaskSpec
from nodeservice.durable import sync_directory
from nodeservice.errors import NodeFaultError
from nodeservice.ports import ResultBundle, ResultFile
from nodeservice.results import layout
from nodeservice.results.collect import collect
from nodeservice.results.layout import LOG_NAME, MANIFEST_NAME, RESULTS_DIR
from nodeservice.results.source import shortage

__all__ = [
    "LOG_NAME",
    "MANIFEST_NAME",
    "RESULTS_DIR",
    "bundle_from",
    "bundle_from_stored",
    "collect",
    "decode",
    "encode",
    "read_local",
    "sha256_of",
    "write_durably",
    "write_local",
]

VERSION = 1

_SHA256 = re.compile(r"[0-9a-f]{64}")

_T = TypeVar("_T")


def encode(manifest: Manifest) -> bytes:
    """The canonical bytes: equal manifests give equal bytes."""
    document = {
        "version": VERSION,
        "task_id": manifest.task_id,
        "attempt": manifest.attempt,
        "files": [
            {"path": entry.path, "size_bytes": entry.size_bytes, "sha256": entry.sha256}
            for entry in sorted(manifest.files, key=lambda entry: entry.path)
        ],
        "skipped": sorted(manifest.skipped),
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def decode(data: bytes) -> Manifest:
    """Read and check. Raises NodeFaultError (MANIFEST_INVALID), also for a path that leaves its directory."""
    try:
        document = json.loads(data)
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']!r} is not {VERSION}")
        manifest = Manifest(
            task_id=_typed(document["task_id"], str),
            attempt=_typed(document["attempt"], int),
            files=tuple(_entry(_typed(file, dict)) for file in _typed(document["files"], list)),
            skipped=tuple(_typed(line, str) for line in _typed(document["skipped"], list)),
        )
        if len({entry.path for entry in manifest.files}) != len(manifest.files):
            raise ValueError("a path appears twice")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise NodeFaultError(f"manifest cannot be read: {error!r}", reason="MANIFEST_INVALID") from error
    return manifest


def sha256_of(manifest_bytes: bytes) -> str:
    """The `manifest_sha256` of these canonical bytes, in hex."""
    return hashlib.sha256(manifest_bytes).hexdigest()


def write_local(work_dir: Path, manifest: Manifest) -> bytes:
    """Save `manifest.json` in the work directory, durable when this returns, and return its bytes.

    An upload after a restart goes on from it without hashing again. Repeating replaces the file atomically.
    """
    data = encode(manifest)
    write_durably(work_dir / MANIFEST_NAME, data)
    return data


def write_durably(path: Path, data: bytes) -> None:
    """The whole file or none of it, on disk when this returns. Raises NodeFaultError (COLLECT_FAILED)."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise NodeFaultError(
            f"{path} cannot be written: {error.strerror}",
            reason="COLLECT_FAILED",
            hint="check the disk of the state directory",
        ) from error


def read_local(work_dir: Path) -> tuple[Manifest, bytes] | None:
    """The saved manifest and its exact bytes, or None when the attempt was not collected yet."""
    path = work_dir / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        invalid = NodeFaultError(f"{path} cannot be read: {error.strerror}", reason="MANIFEST_INVALID")
        raise shortage(path, error) or invalid from error
    return decode(data), data


def bundle_from(work_dir: Path, spec: TaskSpec, worker_id: str) -> ResultBundle:
    """The bundle of a collected attempt in its work directory. Raises NodeFaultError (MANIFEST_INVALID)."""
    return _bundle(work_dir, spec, worker_id, source=lambda path: layout.source_path(work_dir, path))


def bundle_from_stored(directory: Path, spec: TaskSpec, worker_id: str) -> ResultBundle:
    """The bundle of results that `FileResultStore` holds in this directory, to be stored elsewhere later."""
    return _bundle(directory, spec, worker_id, source=lambda path: directory / path)


def _bundle(directory: Path, spec: TaskSpec, worker_id: str, *, source: Callable[[str], Path]) -> ResultBundle:
    found = read_local(directory)
    if found is None:
        raise NodeFaultError(f"{directory} has no {MANIFEST_NAME}", reason="MANIFEST_INVALID")
    manifest, data = found
    if (manifest.task_id, manifest.attempt) != (spec.id.task_id, spec.id.attempt):
        raise NodeFaultError(
            f"{directory / MANIFEST_NAME} is of {manifest.task_id}.{manifest.attempt}, not of {spec.id}",
            reason="MANIFEST_INVALID",
        )
    return ResultBundle(
        spec=spec,
        worker_id=worker_id,
        files=tuple(ResultFile(entry=entry, source=source(entry.path)) for entry in manifest.files),
        manifest=manifest,
        manifest_bytes=data,
    )


def _entry(document: dict[str, object]) -> ManifestEntry:
    path = _typed(document["path"], str)
    size = _typed(document["size_bytes"], int)
    sha256 = _typed(document["sha256"], str)
    if fault := layout.path_fault(path):
        raise ValueError(f"{layout.printable(path)}: {fault}")
    if path == MANIFEST_NAME or size < 0 or not _SHA256.fullmatch(sha256):
        raise ValueError(f"{layout.printable(path)}: bad name, size or sha256")
    return ManifestEntry(path=path, size_bytes=size, sha256=sha256)


def _typed(value: object, kind: type[_T]) -> _T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r:.80} is not a {kind.__name__}")
    return value
