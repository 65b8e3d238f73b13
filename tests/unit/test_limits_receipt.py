"""Plan and receipt: the kernel's rounding, and every way in which what is in force can differ from what was asked."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.core.model import MIB, AttemptId, Resources, TaskSpec
from nodeservice.limits.plan import PIDS_OVERHEAD, CgroupLimits, cpu_milli_of, cpu_quota_us, plan_cgroup
from nodeservice.limits.receipt import receipt

ASKED = {"cpu_milli": 500, "memory_bytes": 64 * MIB, "memory_swap_bytes": 64 * MIB, "pids_limit": 32}
KERNEL = {"cgroup_version": 1, "path": "/nodeservice/n.node/t.1", "occupied": True, **ASKED}


def spec(*, cpu_milli: int = 500, memory_bytes: int = 64 * MIB) -> TaskSpec:
    return TaskSpec(
        id=AttemptId("t"),
        image="i",
        request=Resources(cpu_milli=cpu_milli, memory_bytes=memory_bytes),
        pids_limit=32,
        fingerprint="",
    )


def test_the_plan_is_in_the_kernels_units() -> None:
    planned = plan_cgroup(Resources(cpu_milli=1500, memory_bytes=64 * MIB), pids_limit=32)

    assert planned == CgroupLimits(memory_bytes=64 * MIB, cpu_quota_us=150_000, pids_max=32 + PIDS_OVERHEAD)


@given(st.integers(min_value=10, max_value=1_000_000))
def test_every_cpu_share_that_a_node_admits_survives_the_way_to_the_kernel_and_back(cpu_milli: int) -> None:
    assert cpu_milli_of(cpu_quota_us(cpu_milli), 100_000) == cpu_milli


def test_a_quota_is_never_below_what_the_kernel_takes() -> None:
    assert cpu_quota_us(1) == 1_000


def test_limits_that_hold_make_a_receipt_without_mismatch() -> None:
    written = receipt(spec(), kernel=KERNEL, engine=ASKED)

    assert written["asked"] == written["effective"] == ASKED
    assert written["read_from"] == dict.fromkeys(ASKED, "kernel")
    assert written["mismatches"] == []
    assert written["cgroup"] == {"version": 1, "path": "/nodeservice/n.node/t.1"}
    assert json.loads(json.dumps(written)) == written


def test_without_a_cgroup_the_engines_word_counts_and_is_named_as_such() -> None:
    written = receipt(spec(), kernel={}, engine=ASKED)

    assert written["effective"] == ASKED
    assert set(dict(written["read_from"]).values()) == {"engine"}  # type: ignore[call-overload]
    assert written["mismatches"] == []
    assert "cgroup" not in written


def test_a_cgroup_in_which_nothing_ran_proves_nothing() -> None:
    written = receipt(spec(), kernel={**KERNEL, "occupied": False}, engine={})

    assert written["effective"] == dict.fromkeys(ASKED)
    assert len(written["mismatches"]) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("nothing", [0, -1, None])
@pytest.mark.parametrize("name", list(ASKED))
def test_a_limit_that_nobody_holds_is_a_mismatch(name: str, nothing: int | None) -> None:
    written = receipt(spec(), kernel={**KERNEL, name: None}, engine={**ASKED, name: nothing})

    assert written["effective"][name] is None  # type: ignore[index]
    assert written["mismatches"] == [f"{name}: asked {ASKED[name]}, in force no limit"]


def test_doubled_swap_is_a_mismatch() -> None:
    doubled = 128 * MIB
    written = receipt(spec(), kernel={}, engine={**ASKED, "memory_swap_bytes": doubled})

    assert written["mismatches"] == [f"memory_swap_bytes: asked {64 * MIB}, in force {doubled} (engine)"]


def test_the_overhead_for_pids_in_the_tasks_cgroup_is_no_mismatch_while_the_container_is_held_tighter() -> None:
    written = receipt(spec(), kernel={**KERNEL, "pids_limit": 32 + PIDS_OVERHEAD}, engine=ASKED)

    assert written["mismatches"] == []
    assert written["effective"]["pids_limit"] == 32  # type: ignore[index]
    assert written["read_from"]["pids_limit"] == "engine"  # type: ignore[index]


@pytest.mark.parametrize(("held", "same"), [(64 * MIB + 4096, True), (64 * MIB, False), (64 * MIB + 8192, False)])
def test_memory_is_compared_in_whole_pages(held: int, same: bool) -> None:
    asked = spec(memory_bytes=64 * MIB + 5000)
    kernel = {**KERNEL, "memory_bytes": held, "memory_swap_bytes": held}

    written = receipt(asked, kernel=kernel, engine={}, page_bytes=4096)

    assert (written["mismatches"] == []) is same


def test_a_share_below_the_kernels_least_is_raised_to_it_without_complaint() -> None:
    written = receipt(spec(cpu_milli=3), kernel={**KERNEL, "cpu_milli": 10}, engine=ASKED)

    assert written["mismatches"] == []


def test_a_tighter_limit_than_asked_is_a_mismatch_too() -> None:
    written = receipt(spec(), kernel={**KERNEL, "cpu_milli": 250}, engine=ASKED)

    assert written["mismatches"] == ["cpu_milli: asked 500, in force 250 (kernel)"]
