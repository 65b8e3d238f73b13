"""UploadTaskFiles: a stream of chunks becomes the stored results of one attempt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import structlog

from nodeservice.errors import NodeFaultError, RequestError
from nodeservice.master.checks import check_id, invalid
from nodeservice.master.incoming import Incoming
from nodeservice.master.uploads import ResultUploads
from nodeservice.wire import master_worker_pb2 as pb

log = structlog.get_logger(__name__)


async def receive_chunks(
    chunks: AsyncIterator[pb.FileChunk], uploads: ResultUploads, check_caller: Callable[[str], None]
) -> pb.FileUploadAck:
    """Take the stream to its end. success=false when this host can't store it: the sender may try again.

    Raises RequestError for what the sender did wrong, TransientError where he has to wait, or fell silent. Nothing stays of
    an upload that did not come to its end.
    """
    async with uploads.place():
        return await _receive(chunks, uploads, check_caller)


async def _receive(
    chunks: AsyncIterator[pb.FileChunk], uploads: ResultUploads, check_caller: Callable[[str], None]
) -> pb.FileUploadAck:
    incoming: Incoming | None = None
    try:
        head: pb.FileChunk | None = None
        path: str | None = None
        ended = False
        while (chunk := await uploads.heard(anext(chunks, None))) is not None:
            if head is None or incoming is None:
                head = chunk
                check_caller(chunk.worker_id)
                incoming = await _begin(chunk, uploads)
            elif _identity(chunk) != _identity(head):
                raise invalid("task_id", "changes within the stream")
            if ended:
                raise invalid("is_last_file", "more chunks follow after the last file")
            path = await uploads.run(lambda c=chunk, i=incoming, p=path: _take(i, c, p))  # type: ignore[misc]
            ended = chunk.is_last_chunk and chunk.is_last_file
        if incoming is None or not ended:
            raise invalid("is_last_file", "the stream ended before the last chunk of the last file")
        target = await uploads.run(incoming.commit)
    except NodeFaultError as error:
        log.error("results.not_stored", error=str(error))
        return pb.FileUploadAck(success=False, message=str(error))
    except RequestError as error:
        if incoming is not None and error.reason == "RESULT_TOO_LARGE":
            uploads.note_too_large((incoming.task_id, incoming.attempt), error)
        raise
    finally:
        if incoming is not None:
            await uploads.run(incoming.abort)
    count = incoming.file_count
    log.info("results.stored", task_id=incoming.task_id, attempt=incoming.attempt, file_count=count)
    return pb.FileUploadAck(success=True, message=target.as_uri(), files_received=count)


async def _begin(chunk: pb.FileChunk, uploads: ResultUploads) -> Incoming:
    if chunk.worker_id:
        check_id("worker_id", chunk.worker_id)
    attempt = chunk.attempt if chunk.HasField("attempt") else None
    return await uploads.begin(chunk.task_id, attempt, chunk.worker_id, limit_bytes=uploads.push_limit_bytes)


def _identity(chunk: pb.FileChunk) -> tuple[str, int, str]:
    return chunk.task_id, chunk.attempt, chunk.worker_id


def _take(incoming: Incoming, chunk: pb.FileChunk, path: str | None) -> str | None:
    """One chunk; returns the path of the file that is still under way."""
    if path is None:
        incoming.begin_file(chunk.file_path)
    elif path != chunk.file_path:
        raise invalid("file_path", "the chunks of a file are not contiguous")
    if chunk.data:
        incoming.write(chunk.data)
    if chunk.is_last_chunk:
        incoming.end_file()
        return None
    return chunk.file_path
