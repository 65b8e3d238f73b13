"""Takes the engine's log frames apart into the bytes that the container wrote; pure."""

from __future__ import annotations

import http.client
from collections.abc import Iterable, Iterator
from zlib import crc32

from nodeservice.runtime.log_track import Records

_HEADER_BYTES = 8
_NEWLINE = 10
_MAX_STAMP_BYTES = 40
_FRAME_SURPLUS_BYTES = 12
"""A frame is so much longer than its record in a file of the driver `local`, for lines below 128 bytes, by UTC."""
_SAID_BY_THE_ENGINE = 3
"""The stream of a frame in which Docker tells why it can't go on with the log, which then ends as if it were whole."""
_WHOLE_BUFFER_BYTES = 16384
"""The engine cuts lines that are longer than this into records of this size; the last one is always shorter."""


def read_frames(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of the records, joined per chunk.

    Raises IncompleteRead when the last frame is cut, and HTTPException when the engine could not read on.

    A frame is a byte for the stream, three of zero, four for the length, then one record: a line with its end, or a part of
    one.
    """
    rest = b""
    for chunk in chunks:
        data = rest + chunk if rest else chunk
        start, size = 0, len(data)
        records: list[bytes] = []
        while size - start >= _HEADER_BYTES:
            begin = start + _HEADER_BYTES
            end = begin + int.from_bytes(data[start + 4 : begin], "big")
            if end > size or data[start] == _SAID_BY_THE_ENGINE:
                break
            records.append(data[begin:end])
            start = end
        rest = data[start:]
        if records:
            yield b"".join(records)
        _raise_if_the_engine_says(rest)
    if rest:
        raise http.client.IncompleteRead(rest)


def read_records(chunks: Iterable[bytes]) -> Iterator[Records]:
    """The records of Docker's driver `local`, per chunk, with their lines mended. Raises as `read_frames`.

    The driver loses the end of a line that it had to cut. It is put back: a record without a line end that follows one of
    full size in its stream, and is shorter itself, is the last of its line. The one case that cannot be told apart is a
    stream whose very last line is that long and has no end; it gets one. This wants frames with a time and a space before
    each record: without them the engine does not send records that are empty.
    """
    rest = b""
    cut_streams: set[int] = set()
    for chunk in chunks:
        data = rest + chunk if rest else chunk
        start, size = 0, len(data)
        texts: list[bytes] = []
        stamps: list[bytes] = []
        streams: list[int] = []
        while size - start >= _HEADER_BYTES:
            begin = start + _HEADER_BYTES
            end = begin + int.from_bytes(data[start + 4 : begin], "big")
            if end > size or data[start] == _SAID_BY_THE_ENGINE:
                break
            space = data.find(b" ", begin, min(end, begin + _MAX_STAMP_BYTES))
            if space < 0:
                raise http.client.HTTPException("a record of the log has no time")
            stream, text = data[start], data[space + 1 : end]
            if text and text[-1] == _NEWLINE:
                if cut_streams:
                    cut_streams.discard(stream)
            elif len(text) == _WHOLE_BUFFER_BYTES:
                cut_streams.add(stream)
            elif stream in cut_streams:
                cut_streams.discard(stream)
                text += b"\n"
            texts.append(text)
            stamps.append(data[begin:space])
            streams.append(stream)
            start = end
        rest = data[start:]
        if texts:
            stored_bytes = start - _FRAME_SURPLUS_BYTES * len(texts)
            yield Records(texts=texts, stamps=stamps, streams=streams, engine_bytes=stored_bytes)
        _raise_if_the_engine_says(rest)
    if rest:
        raise http.client.IncompleteRead(rest)


def _raise_if_the_engine_says(frame: bytes) -> None:
    if frame[:1] == bytes([_SAID_BY_THE_ENGINE]) and len(frame) >= _HEADER_BYTES:
        end = _HEADER_BYTES + int.from_bytes(frame[4:_HEADER_BYTES], "big")
        if end <= len(frame):
            raise http.client.HTTPException(frame[_HEADER_BYTES:end].decode(errors="replace").strip())


class Reread:
    """Finds what one reading of a log has missed at its end by a second one, without keeping the first."""

    def __init__(self) -> None:
        self._size_bytes = 0
        self._checksum = 0

    def noted(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Pass the first reading on."""
        for piece in pieces:
            self._size_bytes += len(piece)
            self._checksum = crc32(piece, self._checksum)
            yield piece

    def missed(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """What the second reading has after the bytes of the first. Nothing if it does not begin with them: it lost its
        beginning to the size limit, and where the first ended cannot be told."""
        left, checksum = self._size_bytes, 0
        for piece in pieces:
            known = piece[:left]
            if known:
                checksum = crc32(known, checksum)
                left -= len(known)
            if len(piece) > len(known):
                if checksum != self._checksum:
                    return
                yield piece[len(known) :]
