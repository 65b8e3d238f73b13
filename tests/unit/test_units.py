"""Amounts as people type them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.cli.units import parse_bytes, parse_cpus, parse_seconds
from nodeservice.errors import RequestError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64m", 64 * 1024**2),
        ("1.5g", 3 * 1024**3 // 2),
        ("512MiB", 512 * 1024**2),
        ("1048576", 1048576),
        ("10kb", 10240),
        ("7b", 7),
        (" 2G ", 2 * 1024**3),
        (".5k", 512),
        ("1t", 1024**4),
    ],
)
def test_bytes_are_exact_powers_of_1024(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "m", "-1", "1x", "0", "0m", "1.5", "1e9", "nan", "inf", "1 2", "9" * 100, "٣m", "999t" * 9]
)
def test_what_is_not_an_amount_of_bytes_is_refused_with_the_option_named(text: str) -> None:
    with pytest.raises(RequestError, match="--disk is") as caught:
        parse_bytes(text, option="--disk")
    assert caught.value.reason == "INVALID_REQUEST"
    assert caught.value.field == "disk"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "expected"), [("0.5", 500), ("2", 2000), ("1.25", 1250), ("500m", 500), ("0.001", 1), (".1", 100)]
)
def test_cpus_become_thousandths(text: str, expected: int) -> None:
    assert parse_cpus(text) == expected


@pytest.mark.parametrize("text", ["", "0", "0.0005", "-1", "nan", "1e3", "two", ".", "1.5m", "9999999"])
def test_what_is_not_a_number_of_cores_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--cpus is"):
        parse_cpus(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20s", 20),
        ("5m", 300),
        ("1h30m", 5400),
        ("2d", 172800),
        ("250ms", 0.25),
        ("1m500ms", 60.5),
        ("90", 90),
        ("1.5h", 5400),
        ("0", 0),
    ],
)
def test_durations_become_seconds(text: str, expected: float) -> None:
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("text", ["", "s", "1x", "-5s", "5s1m", "1h 30m", "nan", "1e5", "99999d", "5ss"])
def test_what_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--timeout is"):
        parse_seconds(text)


@given(st.integers(1, 10**15))
def test_a_plain_number_of_bytes_is_itself(count: int) -> None:
    assert parse_bytes(str(count)) == count


@given(st.integers(1, 10**9))
def test_cores_with_three_decimals_lose_nothing(milli: int) -> None:
    assert parse_cpus(f"{milli // 1000}.{milli % 1000:03d}") == milli


@given(st.text(max_size=12))
def test_any_text_is_an_amount_or_a_request_error(text: str) -> None:
    for parse in (parse_bytes, parse_cpus, parse_seconds):
        try:
            assert parse(text) >= 0
        except RequestError as error:
            assert error.hint  # noqa: PT017
