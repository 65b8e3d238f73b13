"""How a receipt is shown, also one that came over the wire and is none."""

from __future__ import annotations

import pytest

from nodeservice.cli.receipt_view import other_limits, receipt_rows, receipt_summary

LIMITS = {
    "asked": {"cpu_milli": 500, "disk_bytes": 9, "seccomp": 2},
    "effective": {"cpu_milli": 500, "disk_bytes": 9, "oom_group": None},
    "enforcement": {"cpu_milli": "hard", "disk_bytes": "watched", "oom_group": "none"},
    "read_from": {"cpu_milli": "/f", "disk_bytes": "/work", "oom_group": "/g"},
    "unread": {"seccomp": "it had ended"},
    "mismatches": ["cpu_milli: asked 500, in force 400 (/f)"],
    "cgroup": {"version": 1, "path": "/p"},
    "why_watched": "no project quota",
    "timeout_seconds": 3,
}


def test_each_limit_is_a_row() -> None:
    assert list(receipt_rows(LIMITS)) == [
        ("cpu_milli", "500", "500", "hard", "/f"),
        ("disk_bytes", "9", "9", "watched", "/work"),
        ("seccomp", "2", "?", "?", "not read: it had ended"),
        ("oom_group", "", "no limit", "none", "/g"),
    ]


def test_the_summary_names_what_is_not_plainly_hard() -> None:
    assert list(receipt_summary(LIMITS)) == [
        "limits: 1 hard; watched: disk_bytes (nodeservice doctor tells why)",
        "limit not as asked: cpu_milli: asked 500, in force 400 (/f)",
        "limits not read: seccomp: it had ended",
    ]


def test_what_is_no_part_of_the_receipt_is_left_for_others_to_show() -> None:
    assert other_limits(LIMITS) == {"timeout_seconds": 3}


@pytest.mark.parametrize("limits", [None, [], "x", 3, {}, {"asked": 3, "effective": [], "mismatches": {"a": 1}}])
def test_what_is_no_receipt_shows_nothing(limits: object) -> None:
    assert list(receipt_rows(limits)) == []
    assert list(receipt_summary(limits)) == []
