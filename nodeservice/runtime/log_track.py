"""Follows where a reading of a log stands, by the times of its records, across what the engine throws away; pure.

The engine keeps two files of a log and begins anew when they are full. A reading can then begin later than the one before
it, pass over what was thrown away, or (Docker 20.10) give the same records twice. Only the records' times show that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from zlib import crc32

from nodeservice.ports import LogMark

_MARK_EVERY_BYTES = 1024 * 1024
_HELD_BYTES = 8 * 1024 * 1024
_SECOND = len("2026-01-01T00:00:00")
_INEXACT = 0.01
_LEAST_BOUND_BYTES = 512 * 1024
"""No engine is told a smaller bound (see `docker_spec.log_config`)."""
_FASTEST_BYTES_PER_SECOND = 1e9
"""No engine writes a log faster."""


@dataclass(slots=True, kw_only=True)
class Records:
    """Some records in their order. `engine_bytes`: what they take in the engine's file, to 1%."""

    texts: list[bytes]
    stamps: list[bytes]
    streams: list[int]
    engine_bytes: int

    def __getitem__(self, part: slice) -> Records:
        texts = self.texts[part]
        share = self.engine_bytes * len(texts) // max(1, len(self.texts))
        return Records(texts=texts, stamps=self.stamps[part], streams=self.streams[part], engine_bytes=share)


@dataclass(frozen=True, slots=True)
class _Place:
    """The last record that was handed on: the `count`th of its stream with that time. `begin`: the first record's time.

    `backlog_bytes` are what the engine held, in its file, when the log was first read, at `opened`; `is_old`: the record is
    one of these, and there may be more.
    """

    begin: bytes
    stream: int
    stamp: bytes
    count: int
    checksum: int
    opened: datetime
    backlog_bytes: int
    is_old: bool

    def __str__(self) -> str:
        record = f"{self.begin.decode()} {self.stream} {self.stamp.decode()} {self.count} {self.checksum}"
        return f"{record} {self.opened.isoformat()} {self.backlog_bytes} {'old' if self.is_old else 'new'}"


class LogTrack:
    """What is new in each of several readings of one log. `after` is the position of an earlier mark."""

    def __init__(self, after: str | None = None) -> None:
        self._place = _parsed(after)
        self._newest: dict[int, bytes] = {}
        self._begin: bytes | None = None
        """When this reading begins; None before its first record."""
        self._follows = self._seeking = self._went_back = False
        self._met_count = 0
        self._last_texts: dict[int, bytes] = {}
        """What was handed on last of each stream."""
        self._is_coarse = False
        """Lines have been seen to share a time."""
        self._held: list[Records] = []
        self._held_bytes = 0
        self._unmarked_bytes = _MARK_EVERY_BYTES  # the first mark is early, for a process that is killed soon
        self._base = None if self._place is None else self._place.begin
        """When the log began that the place was seen in."""
        self._opened = datetime.now(UTC) if self._place is None else self._place.opened
        self._backlog_bytes = 0 if self._place is None else self._place.backlog_bytes
        self._in_backlog = self._place is None or self._place.is_old
        self._has_read = False
        self._has_passed = False
        """Something was thrown away meanwhile, though nothing is missing after the place."""
        self._most_behind_seconds = 0.0

    @property
    def is_in_doubt(self) -> bool:
        """Whether `may_lack` has to be asked: not for what is surely smaller than the bound of any log."""
        return self._has_passed or self._backlog_bytes >= _LEAST_BOUND_BYTES

    def read(self, batches: Iterable[Records], *, follows: bool) -> Iterator[bytes | LogMark]:
        """Hand on what this reading, from the log's first record, has beside those before."""
        self._follows = follows
        self._begin, self._seeking, self._went_back = None, self._place is not None, False
        self._met_count = 0
        self._drop_held()
        for batch in batches:
            if not batch.texts:
                continue
            if self._begin is None:
                self._begin = batch.stamps[0]
                if self._place is None:
                    # The engine may have come to read only now, and have thrown away what it had before.
                    self._opened = datetime.now(UTC)
            yield from self._sought(batch) if self._seeking else self._followed(batch)
        if self._seeking and self._begin is not None:
            yield from self._given_up()
        self._has_read = True
        if self._unmarked_bytes and self._place is not None:
            yield self.mark()

    def may_lack(self, bound_bytes: int) -> bool:
        """Whether something was thrown away unread though nothing in the readings shows it; `bound_bytes` of one file.

        What was there at first was all if it did not fill a file. Since then a whole file at a time is passed over by a
        reading that is so far behind.
        """
        if self._backlog_bytes >= bound_bytes * (1 - _INEXACT):
            return True
        return self._has_passed and self._most_behind_seconds >= bound_bytes / _FASTEST_BYTES_PER_SECOND

    def _followed(self, batch: Records) -> Iterator[bytes | LogMark]:
        stamps = batch.stamps
        newest = max(self._newest.values(), default=b"")
        if stamps[0] <= newest or any(map(bytes.__ge__, stamps, stamps[1:])):
            for index, (stamp, stream) in enumerate(zip(stamps, batch.streams, strict=True)):
                before = self._newest.get(stream, b"")
                if stamp < before or (stamp == before and self._is_again(batch, index)):
                    if index:
                        yield from self._handed_on(batch[:index])
                    yield from self._from_earlier(batch[index:])
                    return
                self._newest[stream] = stamp
        yield from self._handed_on(batch)

    def _is_again(self, batch: Records, index: int) -> bool:
        """Whether this record is the one before it, given twice: a line of the same time, down to the nanosecond, and text.

        Parts of one line share its time. So do lines where the clock is too coarse, which shows when their texts differ.
        """
        stream, text = batch.streams[index], batch.texts[index]
        before = next((batch.texts[at] for at in range(index - 1, -1, -1) if batch.streams[at] == stream), None)
        if before is None:
            before = self._last_texts.get(stream)
        if before is None or not before.endswith(b"\n"):
            return False
        self._is_coarse = self._is_coarse or before != text
        return not self._is_coarse

    def _from_earlier(self, batch: Records) -> Iterator[bytes | LogMark]:
        """Either the engine gives records again, or the host's clock was set back: then the newest is yet to come."""
        if max(map(_instant, self._newest.values())) > datetime.now(UTC):
            self._newest.clear()
            yield from self._followed(batch)
            return
        self._seeking = self._went_back = True
        self._met_count = 0
        yield from self._sought(batch)

    def _sought(self, batch: Records) -> Iterator[bytes | LogMark]:
        """Leave out what was handed on before, up to the place."""
        place = self._place
        assert place is not None
        is_whole = not self._went_back and self._begin == place.begin
        if is_whole and place.stamp not in batch.stamps:
            return
        for index, (stamp, stream) in enumerate(zip(batch.stamps, batch.streams, strict=True)):
            if stream == place.stream and stamp == place.stamp:
                self._met_count += 1
                if self._met_count == place.count and crc32(batch.texts[index]) == place.checksum:
                    yield from self._found(batch, index + 1)
                    return
            elif not is_whole and _is_past(stamp, stream, place):
                if index:
                    self._hold(batch[:index])
                yield from self._given_up()
                yield from self._followed(batch[index:])
                return
        if not is_whole:
            self._hold(batch)

    def _found(self, batch: Records, end: int) -> Iterator[bytes | LogMark]:
        if not self._went_back and self._base != self._begin:
            self._has_passed, self._base = True, self._begin
            if not self._has_read:  # how far behind the reading was that came to this place is not known
                self._most_behind_seconds = math.inf
        self._seeking = self._went_back = False
        self._drop_held()
        if end < len(batch.texts):
            yield from self._followed(batch[end:])

    def _given_up(self) -> Iterator[bytes | LogMark]:
        """The place is not there any more: what comes is new, and what was between is lost. Not so after a clock's step."""
        is_lost = not self._went_back or self._held_bytes > _HELD_BYTES
        held = list(self._held)
        self._drop_held()
        self._seeking = self._went_back = False
        self._newest.clear()
        if is_lost:
            yield self.mark(is_gap=True)
            self._base = self._begin
        for batch in held:
            yield from self._handed_on(batch)

    def _hold(self, batch: Records) -> None:
        """Keep what may be new after all: records of another stream can stand a moment before older ones."""
        place = self._place
        assert place is not None
        if not self._went_back:
            later = [index for index, stamp in enumerate(batch.stamps) if stamp > place.stamp]
            if not later:
                return
            batch = Records(
                texts=[batch.texts[index] for index in later],
                stamps=[batch.stamps[index] for index in later],
                streams=[batch.streams[index] for index in later],
                engine_bytes=batch.engine_bytes * len(later) // len(batch.texts),
            )
        self._held_bytes += sum(map(len, batch.texts))
        if self._held_bytes <= _HELD_BYTES:
            self._held.append(batch)

    def _drop_held(self) -> None:
        self._held.clear()
        self._held_bytes = 0

    def _handed_on(self, batch: Records) -> Iterator[bytes | LogMark]:
        stamps, streams = batch.stamps, batch.streams
        stamp, stream = stamps[-1], streams[-1]
        count = 0
        for index in range(len(stamps) - 1, -1, -1):
            if streams[index] == stream:
                if stamps[index] != stamp:
                    break
                count += 1
        else:
            place = self._place
            if place is not None and place.stream == stream and place.stamp == stamp:
                count += place.count
        if self._base is None:
            self._base = self._begin or stamps[0]
        self._newest.update(zip(streams, stamps, strict=True))
        self._last_texts.update(zip(streams, batch.texts, strict=True))
        if self._in_backlog:
            self._backlog_bytes += batch.engine_bytes
            self._in_backlog = _instant(stamp) < self._opened
        checksum = crc32(batch.texts[-1])
        self._place = _Place(
            self._base, stream, stamp, count, checksum, self._opened, self._backlog_bytes, self._in_backlog
        )
        if self._follows:
            behind = datetime.now(UTC) - max(self._opened, _instant(stamps[0]))
            self._most_behind_seconds = max(self._most_behind_seconds, behind.total_seconds())
        data = b"".join(batch.texts)
        self._unmarked_bytes += len(data)
        yield data
        if self._unmarked_bytes >= _MARK_EVERY_BYTES:
            yield self.mark()

    def mark(self, *, is_gap: bool = False, may_lack: bool = False) -> LogMark:
        self._unmarked_bytes = 0
        return LogMark(position=str(self._place), is_gap=is_gap, may_lack=may_lack)


def _is_past(stamp: bytes, stream: int, place: _Place) -> bool:
    if stream == place.stream:
        return stamp > place.stamp
    return stamp[:_SECOND] > place.stamp[:_SECOND]


def _instant(stamp: bytes) -> datetime:
    """To the microsecond. Engines write the host's own time zone or UTC; now, where it is no time at all."""
    try:
        return datetime.fromisoformat(stamp.decode()).astimezone(UTC)
    except ValueError:
        return datetime.now(UTC)


def _parsed(position: str | None) -> _Place | None:
    try:
        begin, stream, stamp, count, checksum, opened, backlog, age = (position or "").split(" ")
        record = begin.encode(), int(stream), stamp.encode(), int(count), int(checksum)
        return _Place(*record, datetime.fromisoformat(opened), int(backlog), age == "old")
    except ValueError:
        return None
