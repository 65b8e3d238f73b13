"""The `/upload` endpoint: one multipart POST becomes the stored results of one attempt.

The format is fixed where nodes send it (`nodeservice.results.http`): text parts `task_id`, `attempt`, `worker_id`,
`user_id`, `task_name`, `submitted_at`, then `manifest`, then one `file` part for each entry of the manifest, in its order.
Path, size and digest come from the manifest; file names in headers are not believed.
"""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Iterator

import structlog
from aiohttp import BodyPartReader, ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

from nodeservice.errors import NodeFaultError, NodeServiceError, RequestError
from nodeservice.master.checks import check_id, invalid
from nodeservice.master.identity import check_worker_id, names_of_post
from nodeservice.master.incoming import MANIFEST, Incoming, check_path, read_manifest
from nodeservice.master.uploads import ResultUploads

log = structlog.get_logger(__name__)

_TEXT_PARTS = ("task_id", "attempt", "worker_id", "user_id", "task_name", "submitted_at")
_TEXT_MAX_BYTES = 4096
_BLOCK_BYTES = 256 * 1024
_STATUS = {"ALREADY_STORED": 409, "STALE_ATTEMPT": 409, "RESULT_TOO_LARGE": 413, "WORKER_ID_NOT_CERTIFIED": 403}


class UploadEndpoint:
    def __init__(self, uploads: ResultUploads, *, limit_bytes: int, certified: bool = False) -> None:
        """`limit_bytes` counts files and manifest, as the sender counts them. `certified` as in `MasterServicer`."""
        self._certified = certified
        self._uploads = uploads
        self._limit_bytes = limit_bytes
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Listen; returns the port (useful with 0). Raises OSError."""
        application = web.Application()
        application.router.add_post("/upload", self._handle)
        # Headers of a node carry no secret, but an access log line per upload says nothing that ours doesn't.
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, ssl_context=tls).start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.Request) -> web.Response:
        try:
            async with self._uploads.place():
                location = await self._receive(request)
        except RequestError as error:
            status = _STATUS.get(error.reason, 400)
            log.warning("upload.refused", status=status, reason=error.reason, message=str(error))
            return _answer(status, success=False, message=str(error), reason=error.reason)
        except NodeServiceError as error:
            log.error("upload.failed", error=str(error))
            status = 507 if isinstance(error, NodeFaultError) else 503
            return _answer(status, success=False, message=str(error), reason=error.reason)
        return _answer(200, success=True, location=location)

    async def _receive(self, request: web.Request) -> str:
        if not request.content_type.startswith("multipart/form-data"):
            raise invalid("Content-Type", "is not multipart/form-data")
        parts = self._parts(request)
        texts = {name: _decoded(name, await self._small(parts, name, _TEXT_MAX_BYTES)) for name in _TEXT_PARTS}
        if self._certified:
            check_worker_id(texts["worker_id"], names_of_post(request))
        manifest = await self._small(parts, "manifest", self._limit_bytes)
        return await self._files(parts, texts, manifest)

    async def _files(self, parts: AsyncIterator[BodyPartReader], texts: dict[str, str], manifest: bytes) -> str:
        task_id, worker_id = check_id("task_id", texts["task_id"]), check_id("worker_id", texts["worker_id"])
        if not texts["attempt"].isascii() or not texts["attempt"].isdigit() or len(texts["attempt"]) > 9:
            raise invalid("attempt", "is not a number")
        attempt = int(texts["attempt"])
        entries = read_manifest(manifest, task_id=task_id, attempt=attempt)
        total = len(manifest) + sum(entry.size_bytes for entry in entries)
        if total > self._limit_bytes:
            raise self._too_large()
        incoming = await self._uploads.begin(task_id, attempt, worker_id, limit_bytes=self._limit_bytes)
        try:
            for entry in entries:
                part = await _next(parts, "file")
                await self._uploads.run(lambda path=entry.path: incoming.begin_file(check_path(path)))  # type: ignore[misc]
                await self._stream(part, incoming, entry.size_bytes)
                if await self._uploads.run(incoming.end_file) != entry:
                    raise invalid("file", f"part for {entry.path!r} does not match the manifest")
            if await anext(parts, None) is not None:
                raise invalid("file", "there are more parts than the manifest names")
            await self._uploads.run(lambda: _put(incoming, MANIFEST, manifest))
            target = await self._uploads.run(incoming.commit)
        finally:
            await self._uploads.run(incoming.abort)
        log.info("results.stored", task_id=task_id, attempt=attempt, file_count=len(entries), total_bytes=total)
        return target.as_uri()

    async def _stream(self, part: BodyPartReader, incoming: Incoming, size_bytes: int) -> None:
        left = size_bytes
        while block := await self._block(part):
            left -= len(block)
            if left < 0:
                raise invalid("file", "part is longer than the manifest says")
            await self._uploads.run(lambda data=block: incoming.write(data))  # type: ignore[misc]

    async def _small(self, parts: AsyncIterator[BodyPartReader], name: str, limit: int) -> bytes:
        part = await _next(parts, name)
        data = bytearray()
        while block := await self._block(part):
            data += block
            if len(data) > limit:
                raise self._too_large() if name == "manifest" else invalid(name, f"is longer than {limit} bytes")
        return bytes(data)

    async def _parts(self, request: web.Request) -> AsyncIterator[BodyPartReader]:
        with _parsing():
            reader = await self._uploads.heard(request.multipart())
        while True:
            with _parsing():
                part = await self._uploads.heard(reader.next())
            if part is None:
                return
            if not isinstance(part, BodyPartReader):
                raise invalid("body", "has a multipart within the multipart")
            yield part

    async def _block(self, part: BodyPartReader) -> bytes:
        with _parsing():
            return bytes(await self._uploads.heard(part.read_chunk(_BLOCK_BYTES)))

    def _too_large(self) -> RequestError:
        return RequestError(
            f"results are larger than the {self._limit_bytes} bytes that one POST may carry",
            reason="RESULT_TOO_LARGE",
            hint="configure an object store for large results",
        )


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    """What aiohttp raises for a body that is malformed or that breaks off; some of it is plain assertions."""
    try:
        yield
    except (HttpProcessingError, ClientError, web.RequestPayloadError, ValueError, AssertionError, EOFError) as error:
        raise invalid("body", f"is not a complete multipart form ({type(error).__name__})") from error


def _decoded(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise invalid(name, "is not UTF-8") from error


async def _next(parts: AsyncIterator[BodyPartReader], name: str) -> BodyPartReader:
    part = await anext(parts, None)
    if part is None or part.name != name:
        raise invalid("body", f"has no part {name!r} in its place")
    return part


def _put(incoming: Incoming, path: str, data: bytes) -> None:
    incoming.begin_file(path)
    incoming.write(data)
    incoming.end_file()


def _answer(status: int, **fields: object) -> web.Response:
    return web.Response(status=status, body=json.dumps(fields).encode(), content_type="application/json")
