"""The bill of an attempt: means, peaks, energy over counters that begin anew, gaps, and what is written down of it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.core.gpus import GpuUsage
from nodeservice.gpu.bill import GpuBill, GpuSample

POWER_CAP, HW_THERMAL, IDLE = 0x04, 0x40, 0x01


def sample(uuid: str = "GPU-a", **facts: object) -> GpuSample:
    return GpuSample(**{"uuid": uuid, "name": "H200", **facts})  # type: ignore[arg-type]


def billed(*looks: tuple[float, GpuSample]) -> GpuUsage:
    bill = GpuBill()
    for at, seen in looks:
        bill.add([seen], now_seconds=at)
    (used,) = bill.usage()
    return used


def test_nothing_seen_is_an_empty_bill() -> None:
    assert GpuBill().usage() == ()


def test_the_mean_is_weighed_by_time_and_the_peak_is_the_most_that_was_seen() -> None:
    used = billed(
        (0.0, sample(utilization_percent=50.0)),
        (1.0, sample(utilization_percent=100.0)),
        (6.0, sample(utilization_percent=20.0)),
    )
    assert (used.seconds, used.utilization_mean_percent, used.utilization_peak_percent) == (6.0, 33.3, 100.0)


def test_what_the_driver_does_not_tell_is_not_known_and_not_nothing() -> None:
    used = billed((0.0, sample()), (1.0, sample()))
    assert used == GpuUsage(uuid="GPU-a", name="H200", seconds=1.0, throttled_seconds=0.0)


def test_looks_without_a_load_leave_the_mean_of_the_others_as_it_is() -> None:
    used = billed((0.0, sample()), (1.0, sample(utilization_percent=80.0)), (2.0, sample()))
    assert (used.seconds, used.utilization_mean_percent) == (2.0, 80.0)


def test_where_looks_are_seldom_the_time_between_two_is_observed_all_the_same() -> None:
    bill = GpuBill()
    for at in (0.0, 10.2, 20.4, 60.0):
        bill.add([sample(utilization_percent=50.0)], now_seconds=at, every_seconds=10.0)
    (used,) = bill.usage()
    assert (used.seconds, used.utilization_mean_percent) == (20.4, 50.0)


def test_memory_is_the_most_that_was_seen() -> None:
    looks = [(float(at), sample(memory_bytes=count)) for at, count in enumerate((5, 9, 7, None))]
    assert billed(*looks).memory_peak_bytes == 9


@pytest.mark.parametrize(
    ("readings", "joules"),
    [
        ([5_000], 0.0),
        ([5_000, 7_500], 2.5),
        ([5_000, 7_000, 1_500], 3.5),  # the driver was loaded anew, and counts from 0
        ([5_000, None, 9_000], 4.0),  # not told for a moment
        ([None, 5_000, 6_000], 1.0),
        ([None, None], None),
    ],
)
def test_energy_is_what_the_driver_s_counter_rose_by(readings: list[int | None], joules: float | None) -> None:
    looks = [(float(number), sample(energy_millijoules=count)) for number, count in enumerate(readings)]
    assert billed(*looks).energy_joules == joules


def test_over_a_long_gap_only_the_energy_is_known() -> None:
    used = billed(
        (0.0, sample(utilization_percent=50.0, energy_millijoules=0)),
        (600.0, sample(utilization_percent=90.0, energy_millijoules=9_000, throttle_reasons=HW_THERMAL)),
        (601.0, sample(utilization_percent=70.0, energy_millijoules=9_000)),
    )
    assert (used.seconds, used.utilization_mean_percent, used.energy_joules) == (1.0, 70.0, 9.0)
    assert used.throttled_seconds == 0.0


def test_a_clock_that_goes_back_costs_no_seconds() -> None:
    assert billed((10.0, sample()), (9.0, sample()), (10.0, sample())).seconds == 1.0


def test_heat_and_power_hold_clocks_back_and_idling_does_not() -> None:
    used = billed(
        (0.0, sample()),
        (1.0, sample(throttle_reasons=POWER_CAP)),
        (2.0, sample(throttle_reasons=HW_THERMAL | IDLE)),
        (3.0, sample(throttle_reasons=IDLE)),
    )
    assert used.throttled_seconds == 2.0


def test_each_gpu_has_its_own_row_in_order_and_gpus_come_and_go() -> None:
    bill = GpuBill()
    bill.add([sample("GPU-b", memory_bytes=2), sample("GPU-a", memory_bytes=1)], now_seconds=0.0)
    bill.add([sample("GPU-a", memory_bytes=1)], now_seconds=1.0)
    assert [(used.uuid, used.seconds, used.memory_peak_bytes) for used in bill.usage()] == [
        ("GPU-a", 1.0, 1),
        ("GPU-b", 0.0, 2),
    ]


def test_an_error_event_is_told_once_even_if_it_comes_before_the_first_look() -> None:
    bill = GpuBill()
    for code in (79, 45, 79):
        bill.note_xid("GPU-a", code)
    bill.add([sample(memory_bytes=7)], now_seconds=0.0)
    (used,) = bill.usage()
    assert (used.xids, used.name, used.memory_peak_bytes) == ((79, 45), "H200", 7)


# ---- written down -----------------------------------------------------------------------------------------------------


def test_what_was_written_down_goes_on_where_it_was() -> None:
    bill = GpuBill()
    bill.add([sample(utilization_percent=40.0, energy_millijoules=1_000, memory_bytes=8)], now_seconds=0.0)
    bill.add([sample(utilization_percent=40.0, energy_millijoules=2_000, memory_bytes=8)], now_seconds=1.0)
    bill.note_xid("GPU-a", 31)
    later = GpuBill.from_text(bill.as_text())
    assert later.usage() == bill.usage()
    later.add([sample(utilization_percent=80.0, energy_millijoules=5_000)], now_seconds=7_000.0)
    later.add([sample(utilization_percent=80.0, energy_millijoules=5_000)], now_seconds=7_001.0)
    (used,) = later.usage()
    assert (used.seconds, used.utilization_mean_percent, used.energy_joules) == (2.0, 60.0, 4.0)
    assert (used.memory_peak_bytes, used.xids) == (8, (31,))


def meter(**facts: object) -> str:
    return json.dumps({"GPU-a": {"name": "H200", **facts}})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0" * 50,
        "{",
        "null",
        "3",
        "[]",
        '"x"',
        '{"GPU-a": null}',
        '{"GPU-a": []}',
        '{"GPU-a": {"name": 5}}',
        "[" * 100_000,
        meter(unknown=1),
        meter(seconds="1"),
        meter(seconds=None),
        meter(seconds=-1),
        meter(seconds=float("nan")),
        meter(percent_seconds=float("inf")),
        meter(throttled_seconds="1"),
        meter(peak_percent=[]),
        meter(memory_peak_bytes=1.5),
        meter(memory_peak_bytes=2**63),
        meter(energy_millijoules="9"),
        meter(energy_joules={}),
        meter(xids=None),
        meter(xids=""),
        meter(xids=["79"]),
        meter(xids=[7.5]),
        meter(xids=[-1]),
        '{"GPU-a": {"seconds": ' + "9" * 5_000 + "}}",
    ],
)
def test_a_text_that_is_no_bill_is_an_empty_one_and_what_comes_is_billed(text: str) -> None:
    bill = GpuBill.from_text(text)
    assert bill.usage() == ()
    bill.add([sample(utilization_percent=1.0, energy_millijoules=1, memory_bytes=1)], now_seconds=0.0)
    bill.note_xid("GPU-a", 79)
    assert bill.usage()[0].xids == (79,)


rows: st.SearchStrategy[Mapping[str, object]] = st.dictionaries(
    st.sampled_from(["name", "seconds", "peak_percent", "memory_peak_bytes", "energy_millijoules", "xids"]),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2)
    ),
)


@given(st.one_of(st.text(), st.dictionaries(st.text(max_size=3), rows, max_size=2).map(json.dumps)))
def test_whatever_was_written_down_later_looks_are_billed(text: str) -> None:
    bill = GpuBill.from_text(text)
    looked_at = sample(utilization_percent=1.0, energy_millijoules=1, memory_bytes=1, throttle_reasons=HW_THERMAL)
    for at in (0.0, 1.0):
        bill.add([looked_at], now_seconds=at)
    for uuid in ("GPU-a", *(used.uuid for used in bill.usage())):
        bill.note_xid(uuid, 79)
    assert GpuBill.from_text(bill.as_text()).usage() == bill.usage()
