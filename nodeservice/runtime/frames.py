"""Takes the engine's log frames apart and remembers where the reading got to; pure."""

from __future__ import annotations

import http.client
import re
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import datetime

_HEADER_BYTES = 8
_MAX_STAMP_BYTES = 40
_REMEMBERED_COUNT = 1024
_STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{9})(Z|[+-]\d\d:\d\d)")


class LogPosition:
    """The times of the latest records that were read, from which a later reading can go on without gap or repetition.

    Records of the two streams may be out of order by microseconds, hence more than one.
    """

    def __init__(self) -> None:
        self._stamps: deque[bytes] = deque(maxlen=_REMEMBERED_COUNT)

    def passed(self, stamp: bytes) -> None:
        self._stamps.append(stamp)

    def resume(self) -> tuple[str, int]:
        """The engine's `since` (inclusive; "0" is the beginning), and how many records to leave out from there."""
        if not self._stamps:
            return "0", 0
        last = nanoseconds(self._stamps[-1])
        seconds, rest = divmod(last, 1_000_000_000)
        return f"{seconds}.{rest:09d}", sum(nanoseconds(stamp) >= last for stamp in self._stamps)


def nanoseconds(stamp: bytes) -> int:
    """Since 1970, of an RFC 3339 instant with nine digits. Raises ValueError."""
    match = _STAMP.fullmatch(stamp)
    if match is None:
        raise ValueError(f"not an instant of the engine's: {stamp!r}")
    zone = "+00:00" if match[3] == b"Z" else match[3].decode()
    return int(datetime.fromisoformat(match[1].decode() + zone).timestamp()) * 1_000_000_000 + int(match[2])


def read_frames(
    chunks: Iterable[bytes], *, position: LogPosition | None = None, skip_count: int = 0
) -> Iterator[bytes]:
    """The records' bytes, joined per chunk, without the first `skip_count` records.

    A frame is a byte for the stream, three of zero, four for the length, then one record. With `position`, records start
    with their time and a space, which are taken off and noted. Raises IncompleteRead when the last frame is cut.
    """
    rest = b""
    for chunk in chunks:
        data = rest + chunk if rest else chunk
        start, size = 0, len(data)
        records: list[bytes] = []
        while size - start >= _HEADER_BYTES:
            begin = start + _HEADER_BYTES
            end = begin + int.from_bytes(data[start + 4 : begin], "big")
            if end > size:
                break
            start = end
            if position is not None:
                space = data.find(b" ", begin, begin + _MAX_STAMP_BYTES)
                if space < 0:
                    raise http.client.HTTPException("a record of the log has no time")
                position.passed(data[begin:space])
                begin = space + 1
            if skip_count:
                skip_count -= 1
            else:
                records.append(data[begin:end])
        rest = data[start:]
        if records:
            yield b"".join(records)
    if rest:
        raise http.client.IncompleteRead(rest)
