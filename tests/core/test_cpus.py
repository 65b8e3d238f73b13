"""Exclusive cores: enough, free, near each other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nodeservice.core.cpus import Cpu, pick_cpus

# Two NUMA nodes of four physical cores with two hardware threads each, numbered as Linux does: second threads come last.
CPUS = [Cpu(numa_node=core // 4, core=core, id=core + 8 * thread) for thread in (0, 1) for core in range(8)]
ALL = {cpu.id for cpu in CPUS}
NODE_OF = {cpu.id: cpu.numa_node for cpu in CPUS}
CORE_OF = {cpu.id: cpu.core for cpu in CPUS}


@given(st.sets(st.sampled_from(sorted(ALL))), st.integers(1, 17))
def test_as_many_as_asked_all_free_and_none_twice(free: set[int], count: int) -> None:
    picked = pick_cpus(CPUS, free, count)
    if picked is None:
        assert len(free) < count
        return
    assert len(set(picked)) == count == len(picked)
    assert set(picked) <= free
    assert list(picked) == sorted(picked)


@given(st.sets(st.sampled_from(sorted(ALL)), min_size=1), st.integers(1, 8))
def test_one_numa_node_where_one_has_enough(free: set[int], count: int) -> None:
    picked = pick_cpus(CPUS, free, count)
    if any(sum(NODE_OF[cpu] == node for cpu in free) >= count for node in (0, 1)):
        assert picked is not None
        assert len({NODE_OF[cpu] for cpu in picked}) == 1


def test_threads_of_one_core_are_taken_together() -> None:
    picked = pick_cpus(CPUS, ALL, 4)
    assert picked is not None
    assert len({CORE_OF[cpu] for cpu in picked}) == 2


def test_a_whole_core_is_not_made_up_of_parts_of_two() -> None:
    assert pick_cpus(CPUS, ALL - {0}, 2) == (1, 9)


def test_where_no_node_has_enough_the_largest_is_taken_first() -> None:
    picked = pick_cpus(CPUS, ALL - {4, 5, 6, 12, 13, 14}, 9)
    assert picked is not None
    assert [NODE_OF[cpu] for cpu in picked].count(1) == 1
    node_0_is_small = pick_cpus(CPUS, ALL - {0, 1, 2, 8, 9, 10}, 9)
    assert node_0_is_small is not None
    assert [NODE_OF[cpu] for cpu in node_0_is_small].count(0) == 1


def test_a_single_cpu_comes_from_a_core_that_is_shared_already() -> None:
    assert pick_cpus(CPUS, ALL - {2}, 1) == (10,)


def test_the_fuller_node_is_filled_first() -> None:
    picked = pick_cpus(CPUS, ALL - {0, 8}, 6)
    assert picked is not None
    assert {NODE_OF[cpu] for cpu in picked} == {0}
