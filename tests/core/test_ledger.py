"""The ledger never overcommits, never doubles a GPU, and gives back everything."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from functools import reduce

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodeservice.core.cpus import Cpu
from nodeservice.core.gpus import GpuUnit
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import AttemptId, Lease, Phase, Resources, TaskRecord, TaskSpec, TraceIds
from nodeservice.errors import InvariantError

NODE = Resources(cpu_milli=4000, memory_bytes=1000, disk_bytes=1000, gpu_count=4)
GPUS = tuple(GpuUnit(uuid=f"GPU-{letter}", name="H", memory_bytes=100) for letter in "abcd")
T0 = datetime(2026, 1, 1, tzinfo=UTC)

requests = st.builds(
    Resources,
    cpu_milli=st.integers(0, 5000),
    memory_bytes=st.integers(0, 1200),
    disk_bytes=st.integers(0, 1200),
    gpu_count=st.integers(0, 5),
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("grant"), st.integers(0, 9), requests),
        st.tuples(st.just("compute"), st.integers(0, 9), st.none()),
        st.tuples(st.just("disk"), st.integers(0, 9), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=120, deadline=None)
@given(actions)
def test_no_sequence_overcommits_or_grants_a_gpu_twice(sequence: list[tuple[str, int, Resources | None]]) -> None:
    ledger = Ledger(NODE, GPUS)
    gpus_of: dict[AttemptId, tuple[str, ...]] = {}
    compute_of: dict[AttemptId, Resources] = {}
    disk_of: dict[AttemptId, int] = {}
    for action, number, request in sequence:
        owner = AttemptId(f"t{number}")
        if action == "grant" and request is not None:
            if ledger.shortfall(request) is not None:
                continue
            try:
                lease = ledger.grant(owner, request)
            except InvariantError:
                continue
            held = {uuid for uuids in gpus_of.values() for uuid in uuids}
            assert not held & set(lease.gpu_uuids)
            assert len(lease.gpu_uuids) == request.gpu_count
            gpus_of[owner] = lease.gpu_uuids
            compute_of[owner], disk_of[owner] = replace(request, disk_bytes=0), request.disk_bytes
        elif action == "compute":
            ledger.release_compute(owner)
            gpus_of.pop(owner, None)
            compute_of.pop(owner, None)
        else:
            ledger.release_disk(owner)
            disk_of.pop(owner, None)
        leased = ledger.leased
        compute = reduce(Resources.plus, compute_of.values(), Resources())
        assert leased == replace(compute, disk_bytes=sum(disk_of.values())), "whatever goes back first"
        assert leased.cpu_milli <= NODE.cpu_milli
        assert leased.memory_bytes <= NODE.memory_bytes
        assert leased.disk_bytes <= NODE.disk_bytes
        assert leased.gpu_count <= NODE.gpu_count
    for number in range(10):
        ledger.release_compute(AttemptId(f"t{number}"))
        ledger.release_disk(AttemptId(f"t{number}"))
    assert ledger.leased == Resources()
    assert ledger.free == NODE


def test_compute_goes_back_before_disk() -> None:
    ledger = Ledger(NODE, GPUS)
    ledger.grant(AttemptId("t"), Resources(cpu_milli=1000, memory_bytes=10, disk_bytes=20, gpu_count=1))
    ledger.release_compute(AttemptId("t"))
    assert ledger.leased == Resources(disk_bytes=20)


def test_an_attempt_whose_files_are_still_here_holds_its_disk_after_a_restart() -> None:
    amount = Resources(cpu_milli=1000, memory_bytes=10, disk_bytes=20, gpu_count=1)
    record = TaskRecord(
        spec=TaskSpec(id=AttemptId("t"), image="x", request=amount, pids_limit=1, fingerprint="f"),
        lease=Lease(granted=amount, gpu_uuids=("GPU-a",)),
        trace=TraceIds(trace_id="a" * 32, span_id="b" * 16),
        accepted_at=T0,
        phase=Phase.RETAINING,
        compute_released=True,
        timings=(),
    )
    ledger = Ledger(NODE, GPUS)
    ledger.restore([record, replace(record, spec=replace(record.spec, id=AttemptId("u")), phase=Phase.FINISHED)])
    assert ledger.leased == Resources(disk_bytes=20)


def test_a_request_beyond_the_node_is_told_apart_from_one_that_must_wait() -> None:
    ledger = Ledger(NODE, GPUS)
    ledger.grant(AttemptId("t"), Resources(memory_bytes=900))
    waits = ledger.shortfall(Resources(memory_bytes=500))
    never = ledger.shortfall(Resources(memory_bytes=5000))
    assert waits is not None
    assert (waits.resource, waits.ever, waits.available) == ("memory_bytes", True, 100)
    assert never is not None
    assert (never.ever, never.available) == (False, 1000)


def test_a_second_grant_to_the_same_owner_is_refused() -> None:
    ledger = Ledger(NODE, GPUS)
    ledger.grant(AttemptId("t"), Resources(cpu_milli=1))
    with pytest.raises(InvariantError):
        ledger.grant(AttemptId("t"), Resources(cpu_milli=1))


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 4)), max_size=40))
def test_no_cpu_is_exclusive_to_two_and_one_is_always_shared(sequence: list[tuple[bool, int, int]]) -> None:
    cpus = [Cpu(numa_node=number // 4, core=number // 2, id=number) for number in range(8)]
    ledger = Ledger(Resources(cpu_milli=7900), cpus=cpus)
    held: dict[AttemptId, tuple[int, ...]] = {}
    for grant, number, count in sequence:
        owner = AttemptId(f"t{number}")
        request = Resources(cpu_milli=count * 1000)
        if not grant:
            ledger.release_compute(owner)
            ledger.release_disk(owner)
            held.pop(owner, None)
        elif owner not in held and ledger.shortfall(request, exclusive_cpus=True) is None:
            held[owner] = ledger.grant(owner, request, exclusive_cpus=True).cpu_ids
            assert len(held[owner]) == count
        taken = [cpu for ids in held.values() for cpu in ids]
        assert len(taken) == len(set(taken))
        assert set(ledger.shared_cpu_ids) == ({cpu.id for cpu in cpus} - set(taken) if taken else set())
        assert not taken or ledger.shared_cpu_ids
        assert ledger.exclusive_cpu_ids == held


def test_exclusive_cpus_come_from_those_that_are_there_now() -> None:
    cpus = [Cpu(numa_node=0, core=number, id=number) for number in range(4)]
    ledger = Ledger(Resources(cpu_milli=4000), cpus=cpus)
    assert ledger.grant(AttemptId("before"), Resources(cpu_milli=1000), exclusive_cpus=True).cpu_ids == (0,)
    ledger.resize(Resources(cpu_milli=3000), (), cpus[1:])
    assert ledger.shortfall(Resources(cpu_milli=2000), exclusive_cpus=True) is None, (
        "the one that is gone takes no place"
    )
    assert ledger.grant(AttemptId("after"), Resources(cpu_milli=2000), exclusive_cpus=True).cpu_ids == (1, 2)
    assert ledger.shared_cpu_ids == (3,)
