"""Push results to the master over gRPC (`UploadTaskFiles`)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence

import grpc
import grpc.aio

from nodeservice.core.model import AttemptId, TaskSpec
from nodeservice.errors import NodeFaultError, NodeServiceError, TransientError
from nodeservice.ports import ResultBundle
from nodeservice.results.layout import MANIFEST_NAME
from nodeservice.results.source import VerifiedReader
from nodeservice.rpc.calls import answered
from nodeservice.threads import Threads
from nodeservice.wire import master_worker_pb2 as pb
from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

CHUNK_BYTES = 1024 * 1024
"""What masters expect in one chunk; gRPC's default limit for a message is 4 MiB."""

_SLOWEST_BYTES_PER_SECOND = 1_000_000
_GRACE_SECONDS = 60.0

_LOST_STATUS = "Internal error from Core"
"""What grpc.aio makes of a call that ended while a message was being sent: the real status is lost (`_call.py`, _write)."""

_PROBE_SECONDS = 2.0

_REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


class MasterPushResultStore:
    """`put` streams every file and, last, `manifest.json`; answers `master://<task_id>/<attempt>`.

    `master` is asked for the current stub before each `put`; None means that no master is known yet (TransientError).
    Repeating sends everything again: the protocol cannot ask what is there. TransientError: STORE_UNREACHABLE, also when
    the master answers `success=false` or counts other files than were sent. NodeFaultError: STORE_REFUSED, RESULT_CHANGED.
    """

    def __init__(self, master: Callable[[], pb_grpc.MasterWorkerStub | None]) -> None:
        self._master = master
        self._pool = Threads(2, name="results-push")

    async def put(self, bundle: ResultBundle) -> str:
        stub = self._master()
        if stub is None:
            raise TransientError("no master is known to send results to", reason="STORE_UNREACHABLE")
        total = bundle.manifest.total_bytes + len(bundle.manifest_bytes)
        call = stub.UploadTaskFiles(timeout=_GRACE_SECONDS + total / _SLOWEST_BYTES_PER_SECOND)
        try:
            ack = await answered(self._send(call, bundle), name="UploadTaskFiles")
        except grpc.aio.AioRpcError as error:
            raise _translated(await self._real_status(stub, bundle, error), bundle) from error
        finally:
            # A finished call takes no notice; one that broke off must not look complete to the master.
            call.cancel()
        sent_count = len(bundle.files) + 1
        if not ack.success or ack.files_received not in (0, sent_count):
            raise TransientError(
                f"master took {ack.files_received} of {sent_count} files of {bundle.spec.id}: {ack.message[:500]}",
                reason="STORE_UNREACHABLE",
            )
        return f"master://{bundle.prefix}"

    async def check(self) -> None:
        """The protocol knows no question; that a master is away shows elsewhere."""

    async def drop_leftovers(self, id_: AttemptId, paths: Sequence[str]) -> int:
        """A stream that broke off is the master's to forget."""
        return 0

    async def close(self) -> None:
        self._pool.close()
        await self._pool.ended()

    async def _send(
        self, call: grpc.aio.StreamUnaryCall[pb.FileChunk, pb.FileUploadAck], bundle: ResultBundle
    ) -> pb.FileUploadAck:
        # Written chunk by chunk: an exception in a request iterator would show as a cancellation of ourselves.
        try:
            async for chunk in self._chunks(bundle):
                await call.write(chunk)
            await call.done_writing()
        except asyncio.InvalidStateError:
            pass  # The master answered before the end; what it answered is what counts.
        return await call

    async def _real_status(
        self, stub: pb_grpc.MasterWorkerStub, bundle: ResultBundle, error: grpc.aio.AioRpcError
    ) -> grpc.aio.AioRpcError:
        """Ask again, slowly, when the library lost the master's status: nothing is on its way while it answers.

        A refusal (not implemented, not allowed) would look like a passing fault for ever. The probe sends at most one
        chunk and is then broken off, which a master treats like any interrupted upload.
        """
        if error.details() != _LOST_STATUS:
            return error
        call = stub.UploadTaskFiles(timeout=3 * _PROBE_SECONDS)
        ended = asyncio.Event()
        call.add_done_callback(lambda _: ended.set())
        chunks = self._chunks(bundle)
        try:
            if not await _happens(ended):
                await call.write(await anext(chunks))
            if await _happens(ended):
                await call
        except asyncio.InvalidStateError:
            return error
        except grpc.aio.AioRpcError as found:
            return found if found.details() != _LOST_STATUS else error
        finally:
            call.cancel()
            await chunks.aclose()
        return error

    async def _chunks(self, bundle: ResultBundle) -> AsyncGenerator[pb.FileChunk, None]:
        head = pb.FileChunk(
            task_id=bundle.spec.id.task_id,
            user_id=bundle.spec.user_id,
            task_name=safe_task_name(bundle.spec),
            timestamp=bundle.spec.submitted_at_unix,
            attempt=bundle.spec.id.attempt,
            worker_id=bundle.worker_id,
        )
        for file in bundle.files:
            with VerifiedReader(file) as reader:
                while True:
                    data = await self._pool.run(lambda: reader.read(CHUNK_BYTES))
                    yield _chunk(head, file.entry.path, data, is_last=reader.len == 0)
                    if reader.len == 0:
                        break
        rest = memoryview(bundle.manifest_bytes)
        while True:
            piece, rest = rest[:CHUNK_BYTES], rest[CHUNK_BYTES:]
            chunk = _chunk(head, MANIFEST_NAME, bytes(piece), is_last=not rest)
            chunk.is_last_file = not rest
            yield chunk
            if not rest:
                return


def safe_task_name(spec: TaskSpec) -> str:
    """The task's name as one path component that no file system minds; the task's id when nothing is left of it.

    Masters put it into a path as it is.
    """
    for name in (spec.task_name, spec.id.task_id):
        if safe := re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:128]:
            return safe
    return "task"


def _chunk(head: pb.FileChunk, path: str, data: bytes, *, is_last: bool) -> pb.FileChunk:
    chunk = pb.FileChunk()
    chunk.CopyFrom(head)
    chunk.file_path = path
    chunk.data = data
    chunk.is_last_chunk = is_last
    return chunk


async def _happens(event: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _translated(error: grpc.aio.AioRpcError, bundle: ResultBundle) -> NodeServiceError:
    details = (error.details() or "")[:500]
    if details == _LOST_STATUS:
        details = "the master ended the upload before it was complete"
    message = f"results of {bundle.spec.id} cannot be sent: {error.code().name} {details}".rstrip()
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return NodeFaultError(message, reason="STORE_REFUSED", hint="this master takes no results; configure a store")
    if error.code() in _REFUSALS:
        return NodeFaultError(message, reason="STORE_REFUSED", hint="see the master's log")
    return TransientError(message, reason="STORE_UNREACHABLE")
