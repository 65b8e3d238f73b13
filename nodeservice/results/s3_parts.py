"""Sends a large file to S3 in parts, a few at a time, and completes it only when all of it was read and proven."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import BinaryIO

import structlog
from minio import Minio
from minio.datatypes import Part
from minio.error import MinioException
from urllib3.exceptions import HTTPError

log = structlog.get_logger(__name__)


class PartSender:
    """One for a client, in any number of its threads.

    All files together hold at most `parallel_count` parts in memory, and send as many at a time: while the server digests
    one part, the next is on its way. minio's own parallel upload leaves its threads behind when reading fails, and bounds
    memory for each file only.
    """

    def __init__(self, minio: Minio, bucket: str, *, parallel_count: int) -> None:
        self._minio = minio
        self._bucket = bucket
        self._room = threading.BoundedSemaphore(parallel_count)
        self._pool = ThreadPoolExecutor(max_workers=parallel_count, thread_name_prefix="results-s3-part")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def send(self, key: str, data: BinaryIO, size_bytes: int, headers: Mapping[str, str], *, part_bytes: int) -> str:
        """The ETag of the complete object. Whatever fails, no part stays behind, unless the store is away by then."""
        upload_id = self._minio._create_multipart_upload(self._bucket, key, dict(headers))  # noqa: SLF001
        try:
            etags = self._send_all(key, data, size_bytes, upload_id, part_bytes)
            parts = [Part(number, etag) for number, etag in enumerate(etags, 1)]
            done = self._minio._complete_multipart_upload(self._bucket, key, upload_id, parts)  # noqa: SLF001
            return str(done.etag)
        except BaseException:
            with contextlib.suppress(MinioException, HTTPError, OSError):
                self._minio._abort_multipart_upload(self._bucket, key, upload_id)  # noqa: SLF001
            raise

    def _send_all(self, key: str, data: BinaryIO, size_bytes: int, upload_id: str, part_bytes: int) -> list[str]:
        etags: list[str] = []
        under_way: deque[Future[str]] = deque()
        try:
            for number, begin in enumerate(range(0, size_bytes, part_bytes), 1):
                while under_way and under_way[0].done():
                    etags.append(under_way.popleft().result())
                under_way.append(self._send_one(key, data, min(part_bytes, size_bytes - begin), upload_id, number))
            while under_way:
                etags.append(under_way.popleft().result())
        finally:
            wait(under_way)  # a part that arrives after the abort would stay for ever
        return etags

    def _send_one(self, key: str, data: BinaryIO, size_bytes: int, upload_id: str, number: int) -> Future[str]:
        self._room.acquire()
        try:
            piece = data.read(size_bytes)
            context = contextvars.copy_context()
            sending = self._pool.submit(
                context.run, self._minio._upload_part, self._bucket, key, piece, None, upload_id, number  # noqa: SLF001
            )  # fmt: skip
        except BaseException:
            self._room.release()
            raise
        sending.add_done_callback(lambda _done: self._room.release())
        return sending
