"""Which GPUs the master thinks will do: by itself, against the queue, and against what the node itself decides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.core.gpu_pool import GpuLack, GpuPick, GpuQuestion, pick_gpus
from nodeservice.core.gpus import GpuRequest, GpuShare
from nodeservice.core.model import GIB, Lease, Resources
from nodeservice.gpu.health import GpuState
from nodeservice.gpu.units import SharingPolicy, units_of
from nodeservice.master.amounts import Amounts
from nodeservice.master.gpu_fit import GpuRoom, Unit, room_of, units_told
from nodeservice.master.nodes import Node
from nodeservice.master.placement import Choice, NeverFits, Offer, Waiting, place
from nodeservice.master.plan import Candidate, make_plan
from nodeservice.master.request import GpuWish, Request
from nodeservice.ports import Gpu, GpuInventory, MigInstance
from nodeservice.rpc.convert_gpu import gpu_infos
from nodeservice.wire import master_worker_pb2 as pb


def unit(number: int, name: str = "NVIDIA H200", gib: int = 140, **facts: object) -> Unit:
    known: dict[str, object] = {"compute_capability": (9, 0), **facts}
    return Unit(uuid=f"GPU-{number}", name=name, memory_bytes=gib * GIB, **known)  # type: ignore[arg-type]


T4 = unit(4, "Tesla T4", 15, compute_capability=(7, 5))
H200 = unit(1)
MIG = unit(7, "NVIDIA H200 MIG 1g.18gb", 16, mig_profile="1g.18gb", memory_milli=116, counts=False)
PLENTY = Amounts(cpu_milli=10**6, memory_bytes=10**15, disk_bytes=10**15)


def node(name: str, *units: Unit, trouble: str = "", gpu_count: int | None = None) -> Offer:
    count = sum(one.counts and not one.unwell for one in units) if gpu_count is None else gpu_count
    return Offer(
        worker_id=name,
        allocatable=replace(PLENTY, gpu_count=count),
        gpus=GpuRoom(units, trouble) if units or trouble else None,
    )


def wants(**wish: object) -> Request:
    asked = GpuWish(**wish)  # type: ignore[arg-type]
    return Request(amounts=Amounts(gpu_count=asked.count), gpus=asked)


@pytest.mark.parametrize(
    ("wish", "suitable"),
    [
        ({"count": 1}, "GPU-1 GPU-4"),
        ({"count": 1, "model": "h200"}, "GPU-1"),
        ({"count": 1, "min_memory_bytes": 20 * GIB}, "GPU-1"),
        ({"count": 1, "min_compute_capability": (9, 0)}, "GPU-1"),
        ({"count": 1, "mig_profile": "1g.18gb"}, "GPU-7"),
        ({"count": 1, "uuids": ("GPU-4", "GPU-7")}, "GPU-4 GPU-7"),
        ({"part_milli": 100}, "GPU-7"),
        ({"part_memory_bytes": 16 * GIB}, "GPU-7"),
        ({"part_memory_bytes": 17 * GIB}, ""),
    ],
    ids=str,
)
def test_a_wish_is_met_by_those_that_have_what_it_names(wish: dict[str, object], suitable: str) -> None:
    found = GpuRoom((H200, T4, MIG)).free(GpuWish(**wish))  # type: ignore[arg-type]
    assert {one.uuid for one in found} == {*suitable.split()}


@pytest.mark.parametrize(
    ("methods", "wish", "can"),
    [
        (("mps",), {"part_milli": 500}, True),
        (("mps",), {"part_memory_bytes": GIB, "part_sm_percent": 30}, True),
        (("driver",), {"part_memory_bytes": GIB}, True),
        (("driver",), {"part_milli": 500}, False),
        (("driver", "watched"), {"part_milli": 500}, True),
        (("watched",), {"part_memory_bytes": GIB, "part_sm_percent": 30}, False),
        ((), {"part_memory_bytes": GIB}, False),
    ],
    ids=str,
)
def test_a_part_is_possible_only_where_the_node_says_that_a_task_is_kept_to_it(
    methods: tuple[str, ...], wish: dict[str, object], can: bool
) -> None:
    assert GpuRoom((replace(H200, share_methods=methods),)).could(GpuWish(**wish)) is can  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("profile", "memory_milli", "milli", "can"),
    [
        ("1g.6gb", 246, 250, True),  # an A30
        ("2g.12gb", 497, 500, True),
        ("1g.24gb", 498, 500, True),  # an RTX PRO 5000
        ("2g.35gb", 247, 250, True),
        ("3g.71gb", 494, 450, False),
        ("1g.18gb", 116, 200, False),
    ],
)
def test_a_mig_instance_is_as_large_a_part_as_its_gpu_has_slices(
    profile: str, memory_milli: int, milli: int, can: bool
) -> None:
    instance = replace(MIG, mig_profile=profile, memory_milli=memory_milli)
    assert GpuRoom((instance,)).could(GpuWish(part_milli=milli)) is can


def test_the_least_capable_gpu_that_will_do_is_taken_first() -> None:
    left = GpuRoom((H200, T4)).taking(GpuWish(count=1))
    assert left is not None
    assert {one.uuid: one.held_milli for one in left.units} == {"GPU-1": 0, "GPU-4": 1000}


def test_a_part_goes_beside_another_part_before_it_breaks_a_whole_gpu() -> None:
    whole, begun = (replace(unit(n), share_methods=("watched",), held_milli=held) for n, held in ((1, 0), (2, 300)))
    left = GpuRoom((whole, begun)).taking(GpuWish(part_milli=500))
    assert left is not None
    assert [one.held_milli for one in left.units] == [0, 800]
    again = left.taking(GpuWish(part_milli=500))
    assert again is not None
    assert [one.held_milli for one in again.units] == [500, 800]


# ---- placement ---------------------------------------------------------------------------------------------------------


def test_a_model_that_no_node_has_is_refused_and_what_there_is_is_named() -> None:
    answer = place(wants(count=1, model="B200"), [node("a", H200, T4), node("b", gpu_count=0)])
    assert answer == NeverFits(
        "INSUFFICIENT_GPU", "1 GPU (model B200) asked; node a has 0 that will do, of 2 (NVIDIA H200, Tesla T4)"
    )


def test_a_gpu_out_of_service_makes_a_task_wait_and_the_reason_is_told() -> None:
    sick = replace(T4, unwell="fell off the bus")
    answer = place(wants(count=1, model="T4"), [node("a", H200, sick)])
    assert isinstance(answer, Waiting)
    assert answer.message == (
        "1 GPU (model T4) asked; node a has 0 free now; 1 out of service, such as GPU-4: fell off the bus"
    )


def test_a_node_whose_driver_is_broken_makes_a_task_wait_since_nobody_knows_what_it_has() -> None:
    answer = place(wants(count=1), [node("a", trouble="GPU_DRIVER: not loaded")])
    assert isinstance(answer, Waiting)
    assert "GPU_DRIVER: not loaded" in answer.message
    assert isinstance(place(wants(count=1), [node("a", gpu_count=0)]), NeverFits)


def test_a_task_for_a_plain_gpu_gets_no_mig_instance_that_does_not_count() -> None:
    assert isinstance(place(wants(count=1), [node("a", MIG)]), NeverFits)
    assert place(wants(count=1, mig_profile="1g.18gb"), [node("a", MIG)]) == Choice("a")


def test_of_two_nodes_the_one_with_the_lesser_gpu_that_will_do_is_chosen() -> None:
    nodes = [node("a", H200), node("b", T4)]
    assert place(wants(count=1, min_memory_bytes=10 * GIB), nodes) == Choice("b")
    assert place(wants(count=1, min_memory_bytes=20 * GIB), nodes) == Choice("a")


def test_a_peer_that_tells_only_a_number_gets_what_only_it_can_decide() -> None:
    old = node("old", gpu_count=2)
    assert place(wants(count=2, model="B200"), [old]) == Choice("old")
    assert place(wants(part_milli=500), [old]) == Choice("old")
    assert isinstance(place(wants(count=3), [old]), NeverFits)
    assert place(wants(count=1, model="H200"), [old, node("z", H200)]) == Choice("z"), "who tells comes first"


def test_a_part_by_amounts_never_goes_to_a_peer_that_would_see_no_gpu_in_it() -> None:
    """Its `req_gpu` is 0: a peer that does not know the extension would run the task without any GPU."""
    assert isinstance(place(wants(part_memory_bytes=GIB), [node("old", gpu_count=2)]), NeverFits)


# ---- what a node told, and what happened since ---------------------------------------------------------------------------


def told(number: int, held: int = 0, **facts: object) -> pb.GpuInfo:
    known = {"name": "NVIDIA H200", "memory_total_bytes": 141 * GIB, "leasable": True, "counted": True, "state": "WELL"}
    return pb.GpuInfo(uuid=f"GPU-{number}", held_milli=held, **(known | facts))  # type: ignore[arg-type]


def test_only_an_entry_with_a_state_comes_from_a_node_that_tells_what_can_be_leased() -> None:
    assert units_told([]) is None
    assert units_told([told(1, state="")]) is None
    assert units_told([told(1, leasable=False)]) == ()


def test_what_the_driver_keeps_of_the_memory_is_not_there_for_tasks() -> None:
    (one,) = units_told([told(1, memory_reserved_bytes=GIB)]) or ()
    assert one.memory_bytes == 140 * GIB


def test_what_was_given_since_is_taken_off_and_what_ended_since_is_free() -> None:
    units = units_told([told(1, 1000), told(2)])
    assert units is not None
    ended = pb.RunningTask(task_id="t", gpu_uuids=["GPU-1"], gpu_allocated=1.0)
    one = GpuWish(count=1)
    assert [u.uuid for u in room_of(units, "", untold=[], ended=[]).free(one)] == ["GPU-2"]
    assert room_of(units, "", untold=[one], ended=[]).free(one) == []
    assert [u.uuid for u in room_of(units, "", untold=[one], ended=[ended]).free(one)] == ["GPU-2"]


@pytest.mark.parametrize("hostile", [math.nan, math.inf, -math.inf, 1e308, -1.0])
def test_a_node_may_send_any_number_as_what_a_task_that_ended_held(hostile: float) -> None:
    units = units_told([told(1, 600)])
    assert units is not None
    ended = pb.RunningTask(task_id="t", gpu_uuids=["GPU-1"], gpu_allocated=hostile)
    (unit,) = room_of(units, "", untold=[], ended=[ended]).units
    assert unit.held_milli == (0 if hostile > 0 else 600)


def a_node(*gpus: pb.GpuInfo, listed: Sequence[pb.RunningTask] = ()) -> Node:
    made = Node(
        worker_id="w", address="a", info=pb.WorkerInfo(), capacity=PLENTY, allocatable=PLENTY, registered_at_ms=0,
        heard_at_ms=0, known_since=0.0, heartbeat=pb.Heartbeat(running_tasks=listed),
    )  # fmt: skip
    made.tell_gpus(gpus, [])
    return made


def test_a_task_that_the_heartbeat_lists_is_not_counted_twice() -> None:
    listed = pb.RunningTask(task_id="t", attempt=1, gpu_uuids=["GPU-1"], gpu_allocated=1.0)
    given_ = {("t", 1): wants(count=1)}
    assert len(a_node(told(1, 1000), told(2), listed=[listed]).room(given_).free(GpuWish(count=1))) == 1  # type: ignore[union-attr]
    assert len(a_node(told(1), told(2)).room(given_).free(GpuWish(count=1))) == 1  # type: ignore[union-attr]


def test_a_part_that_ended_gives_back_only_what_it_held() -> None:
    listed = pb.RunningTask(task_id="t", attempt=2, gpu_uuids=["GPU-1"], gpu_allocated=0.3)
    shared = a_node(told(1, 800, share_methods=["watched"]), listed=[listed])
    shared.ended.add(("t", 2))
    room = shared.room({})
    assert room is not None
    assert room.units[0].held_milli == 500


# ---- properties ----------------------------------------------------------------------------------------------------------

NAMES = ("NVIDIA H200", "Tesla T4")
units = st.builds(
    Unit,
    uuid=st.sampled_from([f"GPU-{n}" for n in range(6)]),
    name=st.sampled_from(NAMES),
    memory_bytes=st.sampled_from([10_000, 20_000]),
    compute_capability=st.sampled_from([(7, 5), (9, 0)]),
    mig_profile=st.sampled_from(["", "", "", "1g.5gb"]),
    memory_milli=st.sampled_from([60, 125]),
    counts=st.booleans(),
    unwell=st.sampled_from(["", "", "", "lost"]),
    held_milli=st.sampled_from([0, 0, 0, 300, 1000]),
    share_methods=st.sampled_from([(), ("watched",), ("mps",)]),
)
rooms = st.lists(units, max_size=4, unique_by=lambda one: one.uuid).map(lambda found: GpuRoom(tuple(found)))
parts = st.one_of(
    st.builds(GpuWish, part_milli=st.sampled_from([100, 500, 900]), model=st.sampled_from(["", "T4"])),
    st.builds(GpuWish, part_memory_bytes=st.sampled_from([1_000, 9_000, 15_000])),
)
whole = st.builds(
    GpuWish,
    count=st.integers(1, 3),
    model=st.sampled_from(["", "", "t4"]),
    min_memory_bytes=st.sampled_from([0, 15_000]),
    min_compute_capability=st.sampled_from([(0, 0), (8, 0)]),
    mig_profile=st.sampled_from(["", "", "1g.5gb"]),
    uuids=st.frozensets(st.sampled_from(["GPU-0", "GPU-1", "GPU-2"]), max_size=3),
)
wishes = st.one_of(st.just(GpuWish()), parts, whole)
queues = st.lists(wishes, max_size=6)
nodes = st.lists(rooms, max_size=3).map(
    lambda found: [Offer(worker_id=f"n{i}", allocatable=PLENTY, gpus=room) for i, room in enumerate(found)]
)


def plainly_suits(one: Unit, wish: GpuWish) -> bool:
    """The words of the documentation, without any of the arithmetic of the code."""
    if wish.uuids and one.uuid not in wish.uuids:
        return False
    if wish.model.lower() not in one.name.lower() or one.memory_bytes < wish.min_memory_bytes:
        return False
    if one.compute_capability < wish.min_compute_capability:
        return False
    if not wish.is_part:
        return one.mig_profile == wish.mig_profile if wish.mig_profile else one.counts or one.uuid in wish.uuids
    if one.mig_profile:  # one slice of seven
        return one.memory_bytes >= wish.part_memory_bytes and wish.part_milli <= min(one.memory_milli, 143) + 20
    return bool(one.share_methods) and one.memory_bytes >= wish.part_memory_bytes


def thousandths(one: Unit, wish: GpuWish) -> int:
    if not wish.is_part or one.mig_profile:
        return 1000
    return wish.part_milli or -(-wish.part_memory_bytes * 1000 // one.memory_bytes)


def can_all_be_held(room: Sequence[Unit], asked: Sequence[GpuWish]) -> bool:
    """By trying every way."""
    needs = [wish for wish in asked for _ in range(1 if wish.is_part else wish.count)]

    def tried(index: int, held: dict[str, int]) -> Iterator[bool]:
        if index == len(needs):
            yield True
            return
        for one in room:
            needed = thousandths(one, needs[index])
            if not one.unwell and plainly_suits(one, needs[index]) and held[one.uuid] + needed <= 1000:
                yield from tried(index + 1, {**held, one.uuid: held[one.uuid] + needed})

    return any(tried(0, {one.uuid: one.held_milli for one in room}))


@given(queues, nodes)
def test_all_that_a_node_is_given_in_one_pass_it_can_hold_together(queue: list[GpuWish], offers: list[Offer]) -> None:
    candidates = [Candidate(key=(f"t{i}", 1), request=request_of(wish)) for i, wish in enumerate(queue)]
    plan = make_plan(candidates, offers, patience_seconds=60)
    for offer in offers:
        given_ = [c.request.gpus for c in candidates if (c.key, offer.worker_id) in plan.assign]
        assert offer.gpus is not None
        assert can_all_be_held(offer.gpus.units, given_)


@given(wishes, nodes)
def test_a_request_is_refused_for_ever_exactly_when_no_node_could_hold_it_empty(
    wish: GpuWish, offers: list[Offer]
) -> None:
    answer = place(request_of(wish), offers)
    if not offers:
        assert isinstance(answer, Waiting)
        return
    empty = [[replace(one, held_milli=0, unwell="") for one in offer.gpus.units] for offer in offers if offer.gpus]
    assert isinstance(answer, NeverFits) == (not any(can_all_be_held(room, [wish]) for room in empty))
    if not isinstance(answer, NeverFits):
        now = [offer.worker_id for offer in offers if offer.gpus and can_all_be_held(offer.gpus.units, [wish])]
        assert (answer.worker_id in now) if isinstance(answer, Choice) else not now


def request_of(wish: GpuWish) -> Request:
    return Request(amounts=Amounts(cpu_milli=1, gpu_count=wish.count), gpus=wish)


# ---- the node decides by the same rules ----------------------------------------------------------------------------------


LAYOUTS = {7: (8, ("3g.71gb", 3), ("1g.18gb", 1)), 4: (4, ("2g.12gb", 2), ("1g.6gb", 1)), 2: (2, ("1g.24gb", 1))}
"""By the slices of the compute: the slices of the memory, and some profiles with the slices that they have of both."""


def gpu(number: int, *, gib: int, split: bool, mode: int, name: str, slices: int) -> Gpu:
    of_memory, *profiles = LAYOUTS[slices]
    instances = tuple(
        MigInstance(
            uuid=f"MIG-00000000-0000-0000-0000-{number:06d}{index:06d}", name=f"{name} MIG {profile}", profile=profile,
            memory_total_bytes=gib * GIB * count // of_memory, gpu_instance_id=index, compute_instance_id=0,
            compute_slice_count=count,
        )
        for index, (profile, count) in enumerate(profiles)
    )  # fmt: skip
    return Gpu(
        uuid=f"GPU-00000000-0000-0000-0000-{number:012d}", name=name, memory_total_bytes=gib * GIB,
        memory_reserved_bytes=GIB, compute_capability=(9, 0) if gib > 20 else (7, 5), mig_enabled=split,
        mig_instances=instances if split else (), compute_mode=mode, memory_limits=number % 2 == 0,
        mig_slice_count=slices,
    )  # fmt: skip


inventories = st.lists(
    st.builds(
        gpu,
        number=st.integers(0, 5),
        gib=st.sampled_from([16, 80]),
        split=st.booleans(),
        mode=st.sampled_from([0, 0, 2, 3]),
        name=st.sampled_from(NAMES),
        slices=st.sampled_from(sorted(LAYOUTS)),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda one: one.uuid,
).map(lambda found: GpuInventory(gpus=tuple(found), driver_version="580"))
policies = st.builds(
    SharingPolicy, allowed=st.booleans(), mig_counts=st.booleans(), mps=st.booleans(), driver_limits=st.booleans()
)
requests = st.tuples(
    st.integers(1, 3),
    st.builds(
        GpuRequest,
        model=st.sampled_from(["", "H200"]),
        min_memory_bytes=st.sampled_from([0, 40 * GIB]),
        mig_profile=st.sampled_from(["", "", "1g.18gb"]),
        share=st.none(),
    ),
) | st.tuples(
    st.just(0),
    st.builds(
        GpuRequest,
        model=st.sampled_from(["", "H200"]),
        share=st.sampled_from(
            [
                GpuShare(milli=100),
                GpuShare(milli=250),
                GpuShare(milli=385),
                GpuShare(milli=450),
                GpuShare(memory_bytes=159 * GIB // 2),
                GpuShare(memory_bytes=8 * GIB),
                GpuShare(memory_bytes=30 * GIB, sm_percent=20),
            ]
        ),
    ),
)


def as_wish(count: int, request: GpuRequest) -> GpuWish:
    share = request.share or GpuShare()
    return GpuWish(
        count=count,
        model=request.model,
        min_memory_bytes=request.min_memory_bytes,
        mig_profile=request.mig_profile,
        part_milli=share.milli,
        part_memory_bytes=share.memory_bytes,
        part_sm_percent=share.sm_percent,
    )


@given(inventories, policies, st.lists(requests, max_size=5), requests)
def test_what_the_master_reads_in_a_nodes_words_is_what_the_node_would_decide(
    inventory: GpuInventory, policy: SharingPolicy, before: list[tuple[int, GpuRequest]], asked: tuple[int, GpuRequest]
) -> None:
    leasable = units_of(inventory, {}, policy)
    leases: list[Lease] = []

    def picked(count: int, request: GpuRequest) -> GpuPick | GpuLack:
        return pick_gpus(
            GpuQuestion(units=leasable, leases=leases, count=count, request=request, sharing_allowed=policy.allowed)
        )

    for count, request in before:
        pick = picked(count, request)
        if isinstance(pick, GpuPick):
            leases.append(Lease(granted=Resources(gpu_count=count), gpu_uuids=pick.uuids, gpu_part=pick.part))
    infos = gpu_infos(
        inventory, leasable, leases, lambda _: (GpuState.WELL, ""), sharing_allowed=policy.allowed
    )  # fmt: skip
    room, answer, wish = GpuRoom(units_told(infos) or ()), picked(*asked), as_wish(*asked)

    assert room.could(wish) == (isinstance(answer, GpuPick) or answer.ever)
    # The shares of the compute that others hold are not told; else nothing is offered that the node refuses.
    of_compute = any(share.sm_percent for _, request in (*before, asked) if (share := request.share) is not None)
    if isinstance(answer, GpuLack) and not of_compute:
        assert room.taking(wish) is None
