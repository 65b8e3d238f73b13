"""Where readings of a log stand: what the engine repeats is left out, what it threw away is told."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.ports import LogMark
from nodeservice.runtime.log_track import LogTrack, Records

BEGUN = datetime(2026, 1, 1, tzinfo=UTC)
OUT, ERR = 1, 2
BOUND_BYTES = 1024 * 1024


def stamp(number: float) -> bytes:
    return (BEGUN + timedelta(seconds=number)).strftime("%Y-%m-%dT%H:%M:%S.%f000Z").encode()


def records(*numbers: float, stream: int = OUT, engine_bytes: int = 100) -> Records:
    """One a second, each with its number as its text."""
    return Records(
        texts=[b"%d\n" % number for number in numbers],
        stamps=[stamp(number) for number in numbers],
        streams=[stream for _ in numbers],
        engine_bytes=engine_bytes,
    )


def told(track: LogTrack, batches: Iterable[Records], *, follows: bool = False) -> list[bytes | str]:
    """What it hands on, with a word where bytes may be missing."""
    pieces: list[bytes | str] = []
    for piece in track.read(batches, follows=follows):
        if isinstance(piece, LogMark):
            pieces.extend(["gap"] if piece.is_gap else [])
        else:
            pieces.extend(piece.split())
    return pieces


def position(track: LogTrack) -> str:
    return track.mark().position


@given(st.integers(min_value=0, max_value=12), st.integers(min_value=1, max_value=12))
def test_a_second_reading_adds_just_what_the_first_has_missed(read: int, size: int) -> None:
    track, numbers = LogTrack(), range(12)
    first = told(track, [records(*numbers[:read])])
    second = told(track, [records(*numbers[begin : begin + size]) for begin in range(0, 12, size)])
    assert first + second == [b"%d" % number for number in numbers]
    assert not track.is_in_doubt


def test_what_was_thrown_away_before_a_second_reading_is_told_where_it_is_missing() -> None:
    track = LogTrack()
    assert told(track, [records(0, 1, 2)], follows=True) == [b"0", b"1", b"2"]
    assert told(track, [records(7, 8), records(9)]) == ["gap", b"7", b"8", b"9"]


def test_a_second_reading_that_begins_later_and_overlaps_repeats_nothing() -> None:
    track = LogTrack()
    assert told(track, [records(0, 1, 2, 3)], follows=True) == [b"0", b"1", b"2", b"3"]
    assert told(track, [records(2), records(3, 4), records(5)]) == [b"4", b"5"]
    assert track.is_in_doubt  # a whole file may have been passed over unseen


def test_records_that_the_engine_gives_again_are_left_out() -> None:
    track = LogTrack()
    assert told(track, [records(0, 1, 2, 3), records(4, 2), records(3), records(4, 5, 6)], follows=True) == [
        b"%d" % number for number in range(7)
    ]


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_the_last_record_given_again_is_left_out_wherever_a_batch_ends(cut: int) -> None:
    track, numbers = LogTrack(), [0, 1, 2, 2, 3]
    batches = [records(*numbers[:cut]), records(*numbers[cut:])]
    assert told(track, batches, follows=True) == [b"0", b"1", b"2", b"3"]


def test_lines_that_share_a_time_under_a_coarse_clock_are_all_there() -> None:
    track, lines = LogTrack(), records(1, 1, 1, 1)
    lines.texts[1] = b"other\n"
    assert told(track, [lines[:2], lines[2:]], follows=True) == [b"1", b"other", b"1", b"1"]


def test_a_clock_that_is_set_back_costs_no_line() -> None:
    ahead = (datetime.now(UTC) - BEGUN).total_seconds() + 3600
    track = LogTrack()
    assert told(track, [records(ahead, ahead + 1), records(10, 11)], follows=True)[2:] == [b"10", b"11"]
    late = LogTrack()  # read long after, when the newest time has passed
    batches = [records(50, 51), records(10, 11), records(52)]
    assert told(late, batches) == [b"50", b"51", b"10", b"11", b"52"]
    assert told(late, batches) == []


def test_records_of_two_streams_that_stand_a_moment_apart_are_neither_lost_nor_told() -> None:
    mixed = Records(
        texts=[b"a\n", b"b\n", b"c\n"],
        stamps=[stamp(0.2), stamp(0.1), stamp(0.3)],
        streams=[ERR, OUT, ERR],
        engine_bytes=100,
    )
    track = LogTrack()
    assert told(track, [mixed[:2]]) == [b"a", b"b"]
    lost = LogTrack(position(track))
    assert told(track, [mixed]) == [b"c"]
    assert told(lost, [records(0.25, stream=ERR), records(0.3)]) == ["gap", b"0", b"0"]


def test_parts_of_a_line_share_their_time_and_are_counted() -> None:
    parts = records(1, 1, 1, 1, 2)
    parts.texts = [text.replace(b"\n", b" ") for text in parts.texts]
    track = LogTrack()
    assert told(track, [parts[:1], parts[1:3]]) == [b"1"] * 3
    assert told(LogTrack(position(track)), [parts[:2], parts[2:]]) == [b"1", b"2"]


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([records(0, 1, 2, 3, 4)], [b"3", b"4"]),
        ([records(1), records(2, 3, 4)], [b"3", b"4"]),
        ([records(3, 4)], ["gap", b"3", b"4"]),
        ([records(0, 1, 2)], []),
    ],
)
def test_a_reading_goes_on_from_a_position(batches: list[Records], expected: list[bytes | str]) -> None:
    before = LogTrack()
    told(before, [records(0, 1, 2)])
    assert told(LogTrack(position(before)), batches) == expected


def test_a_log_that_was_read_late_is_whole_for_certain_only_if_it_does_not_fill_a_file() -> None:
    small, large = LogTrack(), LogTrack()
    told(small, [records(0, engine_bytes=BOUND_BYTES * 9 // 10)])
    assert small.is_in_doubt
    assert not small.may_lack(BOUND_BYTES)
    told(large, [records(0, engine_bytes=BOUND_BYTES)])
    assert large.may_lack(BOUND_BYTES)


def test_what_was_written_before_the_engine_came_to_read_counts_as_read_late() -> None:
    track = LogTrack()
    time.sleep(0.001)
    asked = (datetime.now(UTC) - BEGUN).total_seconds()
    time.sleep(0.001)
    told(track, [records(asked, engine_bytes=BOUND_BYTES // 2), records(asked + 1e-6, engine_bytes=BOUND_BYTES // 2)])
    assert track.may_lack(BOUND_BYTES)


def test_a_log_that_was_read_from_its_start_is_whole_however_large() -> None:
    soon = (datetime.now(UTC) - BEGUN).total_seconds() + 60
    track = LogTrack()
    told(track, [records(0), records(soon), records(soon + 1, engine_bytes=9 * BOUND_BYTES)], follows=True)
    told(track, [records(0, soon, soon + 1)])
    assert not track.is_in_doubt


def test_what_is_not_known_of_a_log_stays_unknown_to_the_reading_that_goes_on() -> None:
    backlog, interrupted = records(0, 1, engine_bytes=BOUND_BYTES), LogTrack()
    told(interrupted, [backlog[:1]], follows=True)
    assert not interrupted.may_lack(BOUND_BYTES)
    going_on = LogTrack(position(interrupted))
    told(going_on, [backlog])
    assert going_on.may_lack(BOUND_BYTES)
    begun_anew = LogTrack(position(interrupted).replace(stamp(0).decode(), stamp(-1).decode(), 1))
    told(begun_anew, [backlog[:1]])
    assert begun_anew.may_lack(1000 * BOUND_BYTES)


def test_a_position_that_is_none_begins_anew() -> None:
    assert told(LogTrack("not a position"), [records(0, 1)]) == [b"0", b"1"]
