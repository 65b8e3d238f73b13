"""Store results in a bucket of S3 or MinIO."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog

from nodeservice.core.model import AttemptId
from nodeservice.errors import NodeFaultError, TransientError
from nodeservice.ports import ResultBundle, ResultFile
from nodeservice.results.access import LIGHT_COUNT, MIB, BucketMissing, S3Access
from nodeservice.results.layout import LOG_NAME, MANIFEST_NAME
from nodeservice.results.manifest import sha256_of
from nodeservice.results.s3_archive import MAX_FILE_BYTES
from nodeservice.results.s3_object import AlreadyThere, Standing, StoredObject
from nodeservice.threads import Threads

if TYPE_CHECKING:
    from nodeservice.results.s3_client import BucketClient

log = structlog.get_logger(__name__)

_T = TypeVar("_T")
_FEW = 4
"""Files that go one after the other in one thread, with all that is asked of the store before and after them."""
_TURN_FILES = 256
"""At most, for one thread before others have their turn."""
_TOGETHER = 5
"""Fewer small files cost less one by one: each is proven by its answer, and nobody has to look for it."""


class S3ResultStore:
    """`put` answers `s3://<bucket>/<prefix>/<task_id>/<attempt>`.

    Every object carries its sha256 as user metadata. Repeating lists what is there and sends only what is missing or
    different (a few small files are sent at once, and looked for only if the store says that it has one of them); with
    another manifest there already it is NodeFaultError (RESULT_CONFLICT). A missing bucket is created.
    TransientError: STORE_UNREACHABLE, STORE_FULL. NodeFaultError: STORE_CREDENTIALS, STORE_REFUSED, RESULT_CHANGED.
    RequestError: RESULT_TOO_LARGE. Cancelling stops what is on its way between two blocks and drops its parts.

    A large file travels in parts, a few at a time; its sha256 is proven while it is read, and only then it is completed.
    Files of up to 1 MiB travel 16 at a time.
    Small files go to MinIO many in one request; other stores get each by itself. What the answers do not prove to be there
    is looked for in one listing, by size and ETag, before the manifest goes out.
    """

    def __init__(self, access: S3Access) -> None:
        self._access = access
        self._pool = Threads(access.parallel_count, name="results-s3")
        self._light_pool = Threads(LIGHT_COUNT, name="results-s3-light")
        self._client: BucketClient | None = None
        self._client_lock = threading.Lock()

    async def put(self, bundle: ResultBundle) -> str:
        base = self._base(bundle.prefix)
        for _ in range(2):
            try:
                await self._put(bundle, base)
            except BucketMissing:
                await self._run(lambda client: client.make_bucket())
            else:
                return f"s3://{self._access.bucket}/{base}"
        raise TransientError(f"bucket {self._access.bucket} was created and is gone again", reason="STORE_UNREACHABLE")

    async def check(self) -> None:
        try:
            await self._run(lambda client: client.check())
        except BucketMissing:
            await self._run(lambda client: client.make_bucket())

    async def drop_leftovers(self, id_: AttemptId, paths: Sequence[str]) -> int:
        """Parts of interrupted uploads. MinIO lists them for a whole key only, hence one call for each path."""
        base = self._base(f"{id_.task_id}/{id_.attempt}")

        def drop(client: BucketClient) -> int:
            return sum(client.abort_leftovers(f"{base}/{path}") for path in paths)

        try:
            return await self._run(drop)
        except BucketMissing:
            return 0

    async def close(self) -> None:
        pools = (self._pool, self._light_pool)
        for pool in pools:
            pool.close()
        await asyncio.gather(*(pool.ended() for pool in pools))
        if self._client is not None:
            self._client.close()

    def _base(self, prefix: str) -> str:
        return "/".join(part for part in (self._access.prefix.strip("/"), prefix) if part)

    async def _put(self, bundle: ResultBundle, base: str) -> None:
        stop = threading.Event()
        try:
            if _is_small(bundle):  # each turn in a thread costs as much as its request
                sent = await self._run(partial(_put_in_turn, bundle=bundle, base=base, stop=stop), is_light=True)
            else:
                there = await self._run(partial(_compare, bundle=bundle, base=base))
                sent = await self._upload_all(there.missing, base, there.present, stop)
                await self._run(partial(_finish, bundle=bundle, base=base, there=there, sent=sent, stop=stop))
        finally:
            stop.set()
        log.debug("results.stored", prefix=base, files=len(bundle.files), sent=len(sent))

    async def _upload_all(
        self, files: list[ResultFile], base: str, present: dict[str, StoredObject], stop: threading.Event
    ) -> list[_Sent]:
        """Send what is not there; some at a time, since one task per file would be many. Returns what was sent."""
        light = [file for file in files if _is_light(file)]
        others = [file for file in files if not _is_light(file)]
        sent: list[_Sent] = []

        async def work(waiting: Iterator[ResultFile], turn_files: int, is_light: bool) -> None:
            while turn := _turn(waiting, turn_files):
                send = partial(_send, base=base, files=turn, present=present, stop=stop)
                sent.extend(await self._run(send, is_light=is_light))

        try:
            async with asyncio.TaskGroup() as group:
                for some, at_a_time in ((light, LIGHT_COUNT), (others, self._access.parallel_count)):
                    waiting, turn_files = iter(some), min(_TURN_FILES, -(-len(some) // at_a_time))
                    for _ in range(min(at_a_time, len(some))):
                        group.create_task(work(waiting, turn_files, some is light))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return sent

    async def _run(self, action: Callable[[BucketClient], _T], *, is_light: bool = False) -> _T:
        """In a thread. What is light holds a megabyte or two in memory, all else up to a part."""
        pool = self._light_pool if is_light else self._pool
        return await pool.run(lambda: action(self._connected()))

    def _connected(self) -> BucketClient:
        with self._client_lock:
            if self._client is None:
                from nodeservice.results.s3_client import BucketClient

                self._client = BucketClient(self._access)
            return self._client


@dataclass(frozen=True, slots=True)
class _There:
    """What the store has of a bundle, and what it lacks."""

    present: dict[str, StoredObject]
    missing: list[ResultFile]
    is_marked: bool


@dataclass(frozen=True, slots=True)
class _Sent:
    """What has to be found, unless it is proven to be there."""

    base: str
    file: ResultFile
    stored: StoredObject
    standing: Standing

    @property
    def key(self) -> str:
        return f"{self.base}/{self.file.entry.path}"


def _is_light(file: ResultFile) -> bool:
    """Smaller ones go together, in archives that are not light, where the store takes them."""
    return MAX_FILE_BYTES < file.entry.size_bytes <= MIB


def _is_small(bundle: ResultBundle) -> bool:
    return len(bundle.files) <= _FEW and sum(file.entry.size_bytes for file in bundle.files) <= MIB


def _compare(client: BucketClient, *, bundle: ResultBundle, base: str) -> _There:
    marker = f"{base}/{MANIFEST_NAME}"
    present = client.objects_below(f"{base}/")
    is_marked = marker in present
    if is_marked and not client.holds(marker, len(bundle.manifest_bytes), sha256_of(bundle.manifest_bytes)):
        raise NodeFaultError(
            f"{client.url(base)} already holds other results of attempt {bundle.spec.id}",
            reason="RESULT_CONFLICT",
            hint="two nodes ran this attempt, or two masters share the bucket: give each a result_prefix of its own",
        )
    # What lies below a marker was verified before the marker was written; sizes tell whether it still lies there.
    missing = [
        file for file in bundle.files if not (is_marked and _has_size(present, f"{base}/{file.entry.path}", file))
    ]
    return _There(present, missing, is_marked)


def _finish(
    client: BucketClient,
    *,
    bundle: ResultBundle,
    base: str,
    there: _There,
    sent: list[_Sent],
    stop: threading.Event,
) -> None:
    if sent:
        _look_for(client, base, sent, stop)
    if there.is_marked:
        return
    marker, only_new = f"{base}/{MANIFEST_NAME}", client.keeps_what_is_there
    try:
        client.upload_json(marker, bundle.manifest_bytes, stop, only_new=only_new)
    except AlreadyThere:  # since we looked; RESULT_CONFLICT unless it is the same
        if not _compare(client, bundle=bundle, base=base).is_marked:
            raise client.lost(marker) from None


def _put_in_turn(client: BucketClient, *, bundle: ResultBundle, base: str, stop: threading.Event) -> list[_Sent]:
    marker = f"{base}/{MANIFEST_NAME}"
    if client.keeps_what_is_there and any(file.entry.path == LOG_NAME for file in bundle.files):
        # It is of an earlier try, or of somebody else, or can't be read any more: then the store has to be asked first.
        with suppress(AlreadyThere, NodeFaultError):
            return _put_new(client, bundle, base, stop)
    there = _There({}, list(bundle.files), is_marked=False)
    if client.has(marker):
        there = _compare(client, bundle=bundle, base=base)
    sent = _send(client, base=base, files=there.missing, present=there.present, stop=stop)
    _finish(client, bundle=bundle, base=base, there=there, sent=sent, stop=stop)
    client.try_to_overwrite(marker, bundle.manifest_bytes, stop)
    return sent


def _put_new(client: BucketClient, bundle: ResultBundle, base: str, stop: threading.Event) -> list[_Sent]:
    """Replaces nothing, nor mixes with what another node stores at the same moment: the log, which all have, goes first."""
    sent = []
    for file in sorted(bundle.files, key=lambda file: file.entry.path != LOG_NAME):
        key = f"{base}/{file.entry.path}"
        sent.append(_Sent(base, file, *client.upload(key, file, stop, only_new=True)))
    _look_for(client, base, sent, stop)
    client.upload_json(f"{base}/{MANIFEST_NAME}", bundle.manifest_bytes, stop, only_new=True)
    return sent


def _has_size(present: dict[str, StoredObject], key: str, file: ResultFile) -> bool:
    return key in present and present[key].size_bytes == file.entry.size_bytes


def _turn(waiting: Iterator[ResultFile], max_files: int) -> list[ResultFile]:
    """What one thread sends before others have their turn: a turn costs as much as a small file."""
    turn: list[ResultFile] = []
    size_bytes = 0
    while len(turn) < max_files and size_bytes < MIB and (file := next(waiting, None)) is not None:
        turn.append(file)
        size_bytes += file.entry.size_bytes
    return turn


def _send(
    client: BucketClient,
    *,
    base: str,
    files: Sequence[ResultFile],
    present: dict[str, StoredObject],
    stop: threading.Event,
) -> list[_Sent]:
    """Those that were not there."""
    missing = []
    for file in files:
        key = f"{base}/{file.entry.path}"
        if not (_has_size(present, key, file) and client.holds(key, file.entry.size_bytes, file.entry.sha256)):
            missing.append(file)
    small = [file for file in missing if file.entry.size_bytes <= MAX_FILE_BYTES]
    together = client.upload_together(base, small, stop) if len(small) >= _TOGETHER else None
    sent = []
    if together is not None:
        missing = [file for file in missing if file.entry.size_bytes > MAX_FILE_BYTES]
        sent = [_Sent(base, file, stored, Standing.CLAIMED) for file, stored in zip(small, together, strict=True)]
    for file in missing:
        sent.append(_Sent(base, file, *client.upload(f"{base}/{file.entry.path}", file, stop)))
    return sent


def _look_for(client: BucketClient, base: str, sent: list[_Sent], stop: threading.Event) -> None:
    """One request for a thousand objects. A store whose listing tells another ETag is asked for the object itself."""
    unproven = [one for one in sent if one.standing is not Standing.PROVEN]
    present = client.objects_below(f"{base}/") if unproven else {}
    for one in unproven:
        if present.get(one.key) == one.stored:
            continue
        if one.standing is Standing.CLAIMED:
            client.upload(one.key, one.file, stop)
        if not client.holds(one.key, one.file.entry.size_bytes, one.file.entry.sha256):
            raise client.lost(one.key)
