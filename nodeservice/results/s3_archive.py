"""Many small files as one tar, which MinIO unpacks into objects: a request costs more than a file of some KiB."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import time
from collections.abc import Sequence

from nodeservice.ports import ResultFile
from nodeservice.results.source import VerifiedReader

MAX_FILE_BYTES = 64 * 1024
"""MinIO stores members of up to 128 KiB side by side, larger ones one after the other (its cmd/untar.go)."""

_PAX_METADATA = "minio.metadata."
UNPACK_HEADER = "X-Amz-Meta-Snowball-Auto-Extract"
_PREFIX_HEADER = "X-Amz-Meta-Minio-Snowball-Prefix"


def headers(base: str) -> dict[str, str | list[str] | tuple[str]]:
    """Of the request, which makes `<base>/<path>` of each member. A policy is asked about each of these keys."""
    return {"Content-Type": "application/x-tar", UNPACK_HEADER: "true", _PREFIX_HEADER: base}


def pack(
    files: Sequence[ResultFile], metadata: Sequence[dict[str, str]], stop: threading.Event
) -> tuple[bytes, list[str]]:
    """The archive, and the MD5 of each file in hex, which is the ETag of what becomes of it.

    `metadata` are the headers that each object gets. Raises NodeFaultError (RESULT_CHANGED), PutStopped.
    """
    archive, digests = io.BytesIO(), []
    now = time.time()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file, entries in zip(files, metadata, strict=True):
            with VerifiedReader(file, stop=stop) as reader:
                data = reader.read()
            member = tarfile.TarInfo(file.entry.path)
            member.size, member.mtime = len(data), int(now)
            member.pax_headers = {_PAX_METADATA + name: value for name, value in entries.items()}
            tar.addfile(member, io.BytesIO(data))
            digests.append(hashlib.md5(data, usedforsecurity=False).hexdigest())
    return archive.getvalue(), digests
