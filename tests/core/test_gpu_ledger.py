"""Whatever tasks come, end and whatever becomes of the GPUs: none is granted twice, none too much, and none is lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from nodeservice.core.gpus import GpuRequest, GpuShare, GpuUnit, ShareMethod
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import GIB, AttemptId, Lease, Phase, Resources, TaskRecord, TaskSpec, TraceIds

THOUSANDS = 20 * settings.default.max_examples
"""300 in the fast profile, 2,000 otherwise."""
NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROOM = Resources(cpu_milli=10**6, memory_bytes=10**15, disk_bytes=10**15)
PROFILES = {"1g.10gb": 10, "2g.20gb": 20, "3g.40gb": 40}
METHODS: tuple[tuple[ShareMethod, ...], ...] = (
    (),
    (ShareMethod.WATCHED,),
    (ShareMethod.DRIVER, ShareMethod.WATCHED),
    (ShareMethod.MPS,),
    (ShareMethod.MPS,),
)

# ---- machines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Board:
    """One GPU: whole, or split once it has profiles."""

    gib: int
    methods: tuple[ShareMethod, ...]
    profiles: tuple[str, ...]
    mig_counts: bool


boards = st.builds(
    Board,
    gib=st.sampled_from([40, 80, 81]),
    methods=st.sampled_from(METHODS),
    profiles=st.one_of(st.just(()), st.lists(st.sampled_from(sorted(PROFILES)), max_size=3).map(tuple)),
    mig_counts=st.booleans(),
)


def units_of(machine: Sequence[Board], unwell: frozenset[int], whole: frozenset[int]) -> tuple[GpuUnit, ...]:
    """`whole`: those that were put together again, whatever they were made of."""
    found: list[GpuUnit] = []
    for number, board in enumerate(machine):
        why = "XID 79" if number in unwell else ""
        if not board.profiles or number in whole:
            near = {f"GPU-{other}": 10 if other // 2 == number // 2 else 1 for other in range(len(machine))}
            found.append(
                GpuUnit(
                    uuid=f"GPU-{number}",
                    name="H100",
                    memory_bytes=board.gib * GIB,
                    compute_capability=(9, 0),
                    closeness=near,
                    share_methods=board.methods,
                    unwell=why,
                )
            )
            continue
        found += [
            GpuUnit(
                uuid=f"MIG-{number}-{place}",
                name=f"H100 MIG {profile}",
                memory_bytes=PROFILES[profile] * GIB,
                compute_capability=(9, 0),
                mig_profile=profile,
                parent_uuid=f"GPU-{number}",
                memory_milli=PROFILES[profile] * 1000 // board.gib,
                compute_milli=int(profile[0]) * 1000 // 7,
                counts=board.mig_counts,
                unwell=why,
            )
            for place, profile in enumerate(board.profiles)
        ]
    return tuple(found)


# ---- what happens -----------------------------------------------------------------------------------------------------

shares = st.one_of(
    st.builds(GpuShare, milli=st.sampled_from([1, 125, 250, 333, 500, 999])),
    st.builds(
        GpuShare,
        memory_bytes=st.sampled_from([1, 1, 5, 20, 80]).map(lambda gib: gib * GIB),
        sm_percent=st.sampled_from([0, 35, 70, 100]),
    ),
)
wishes = st.one_of(
    st.tuples(st.integers(1, 4), st.just(GpuRequest())),
    st.tuples(st.integers(1, 2), st.builds(GpuRequest, mig_profile=st.sampled_from(sorted(PROFILES)))),
    st.tuples(st.just(1), st.builds(GpuRequest, min_memory_bytes=st.sampled_from([30 * GIB, 80 * GIB]))),
    st.tuples(st.just(1), st.builds(GpuRequest, uuids=st.sampled_from([("GPU-0",), ("MIG-0-0", "GPU-1")]))),
    *[st.tuples(st.just(0), st.builds(GpuRequest, share=shares))] * 4,
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), wishes),
        st.tuples(st.just("ask"), wishes),
        st.tuples(st.just("end"), st.integers(0, 30)),
        st.tuples(st.just("crash"), st.none()),
        st.tuples(st.just("quarantine"), st.frozensets(st.integers(0, 3))),
        st.tuples(st.just("put together"), st.frozensets(st.integers(0, 3), max_size=1)),
    ),
    min_size=8,
    max_size=40,
)


@dataclass
class Node:
    machine: Sequence[Board]
    allowed: bool
    unwell: frozenset[int] = frozenset()
    whole: frozenset[int] = frozenset()
    records: dict[AttemptId, TaskRecord] = field(default_factory=dict)
    ledger: Ledger = field(init=False)

    def __post_init__(self) -> None:
        self.ledger = self.new_ledger()

    @property
    def units(self) -> tuple[GpuUnit, ...]:
        return units_of(self.machine, self.unwell, self.whole)

    def new_ledger(self) -> Ledger:
        return Ledger(ROOM, self.units, gpu_sharing_allowed=self.allowed)

    def changed(self) -> None:
        self.ledger.resize(ROOM, self.units)

    def ask(self, count: int, wish: GpuRequest) -> None:
        id_, request = AttemptId(f"t{len(self.records)}"), Resources(gpu_count=count, cpu_milli=1)
        short = self.ledger.shortfall(request, gpu=wish)
        if short is not None:
            assert short.words
            return
        lease = self.ledger.grant(id_, request, gpu=wish)
        self.check_granted(lease, count, wish)
        self.records[id_] = record(id_, lease, wish)

    def end(self, number: int) -> None:
        id_ = AttemptId(f"t{number}")
        if id_ in self.records:
            self.ledger.release_compute(id_)
            self.ledger.release_compute(id_)
            self.ledger.release_disk(id_)
            self.records[id_] = replace(self.records[id_], compute_released=True, disk_released=True)

    def crash(self) -> None:
        """A ledger made from the journal is the one that was lost."""
        before, self.ledger = self.ledger, self.new_ledger()
        self.ledger.restore(self.records.values())
        assert self.ledger.leased == before.leased
        assert self.ledger.free == before.free
        assert in_order(self.ledger.gpu_leases()) == in_order(before.gpu_leases())

    def check_granted(self, lease: Lease, count: int, wish: GpuRequest) -> None:
        by_uuid = {unit.uuid: unit for unit in self.units}
        assert len(set(lease.gpu_uuids)) == len(lease.gpu_uuids) == (count if wish.share is None else 1)
        for uuid in lease.gpu_uuids:
            unit = by_uuid[uuid]
            assert not unit.unwell
            assert unit.memory_bytes >= wish.min_memory_bytes
            assert not wish.uuids or uuid in wish.uuids
            assert wish.share or (unit.mig_profile == wish.mig_profile if wish.mig_profile else True)
            assert wish.share or wish.mig_profile or wish.uuids or unit.counts
            assert unit.parent_uuid not in self.held(), "the GPU that it is a part of is somebody's"
        part, asked = lease.gpu_part, wish.share
        assert (part is None) == (asked is None)
        if part is None or asked is None:
            return
        unit = by_uuid[lease.gpu_uuids[0]]
        assert part.memory_bytes >= max(asked.memory_bytes, unit.memory_bytes * asked.milli // 1000)
        assert part.method in unit.share_methods or (part.method is ShareMethod.MIG and unit.mig_profile)
        if part.method in (ShareMethod.WATCHED, ShareMethod.DRIVER):
            assert asked.sm_percent == 0
            assert self.allowed or (part.method is ShareMethod.DRIVER and not asked.milli)

    def held(self) -> set[str]:
        return {uuid for record in self.live() for uuid in record.lease.gpu_uuids}

    def live(self) -> list[TaskRecord]:
        return [record for record in self.records.values() if not record.compute_released]

    def check(self) -> None:
        memory = {f"GPU-{number}": board.gib * GIB for number, board in enumerate(self.machine)}
        holders: dict[str, list[Lease]] = {}
        for task in self.live():
            for uuid in task.lease.gpu_uuids:
                holders.setdefault(uuid, []).append(task.lease)
        for uuid, leases in holders.items():
            if len(leases) == 1:
                continue
            parts = [lease.gpu_part for lease in leases if lease.gpu_part is not None]
            assert len(parts) == len(leases), f"{uuid} is held whole, and by another one"
            assert all(part.method is not ShareMethod.MIG for part in parts), f"{uuid} is one instance"
            assert sum(part.memory_bytes for part in parts) <= memory[uuid]
            assert sum(part.sm_percent for part in parts) <= 100
        assert in_order(self.ledger.gpu_leases()) == in_order(task.lease for task in self.live())
        untouched = [unit for unit in self.units if unit.counts and not unit.unwell and unit.uuid not in holders]
        assert self.ledger.free.gpu_count == sum(unit.parent_uuid not in holders for unit in untouched)


def in_order(leases: Iterable[Lease]) -> list[Lease]:
    return sorted(leases, key=lambda lease: (lease.gpu_uuids, repr(lease.gpu_part)))


def record(id_: AttemptId, lease: Lease, wish: GpuRequest) -> TaskRecord:
    return TaskRecord(
        spec=TaskSpec(id=id_, image="demo", request=lease.granted, gpu=wish, pids_limit=10, fingerprint="f"),
        lease=lease,
        trace=TraceIds(trace_id="0" * 32, span_id="0" * 16),
        accepted_at=NOW,
        phase=Phase.RUNNING,
        timings=(),
    )


@settings(max_examples=THOUSANDS, deadline=None)
@given(machine=st.lists(boards, min_size=1, max_size=4), allowed=st.booleans(), story=actions)
def test_no_gpu_is_granted_twice_none_too_much_and_none_is_lost(
    machine: list[Board], allowed: bool, story: list[tuple[str, object]]
) -> None:
    node = Node(machine, allowed)
    for action, detail in story:
        match action, detail:
            case "ask", (int(count), GpuRequest() as wish):
                node.ask(count, wish)
            case "end", int(number):
                node.end(number)
            case "crash", _:
                node.crash()
            case "quarantine", frozenset() as unwell:
                node.unwell = unwell
                node.changed()
            case "put together", frozenset() as whole:
                # Only a GPU of which nobody holds an instance can be.
                split = {f"MIG-{number}-{place}" for number in whole | node.whole for place in range(3)}
                if not split & node.held():
                    node.whole = whole
                    node.changed()
        node.check()
    for number in range(len(node.records)):
        node.end(number)
    node.unwell = frozenset()
    node.changed()
    assert node.ledger.leased == Resources()
    assert node.ledger.free.gpu_count == sum(1 for unit in node.units if unit.counts)
    everything = [unit.uuid for unit in node.units]
    again = GpuRequest(uuids=tuple(everything))
    lease = node.ledger.grant(AttemptId("last"), Resources(gpu_count=len(everything)), gpu=again)
    assert set(lease.gpu_uuids) == set(everything)


def test_a_lease_on_a_gpu_that_is_there_no_more_is_kept_until_it_ends() -> None:
    ledger = Ledger(ROOM, [GpuUnit(uuid="GPU-a", name="H", memory_bytes=GIB)])
    ledger.grant(AttemptId("t"), Resources(gpu_count=1))
    ledger.resize(ROOM, [])
    assert [lease.gpu_uuids for lease in ledger.gpu_leases()] == [("GPU-a",)]
    ledger.resize(ROOM, [GpuUnit(uuid="GPU-a", name="H", memory_bytes=GIB)])
    assert ledger.shortfall(Resources(gpu_count=1)) is not None
    ledger.release_compute(AttemptId("t"))
    assert ledger.shortfall(Resources(gpu_count=1)) is None
