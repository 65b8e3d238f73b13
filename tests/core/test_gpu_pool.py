"""Which GPUs a task gets, and why none: whole ones, MIG instances, parts, closeness, the words of a refusal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import pytest

from nodeservice.core.gpu_pool import GpuLack, GpuPick, GpuQuestion, counted, free_count, gpu_lack, pick_gpus
from nodeservice.core.gpus import GpuPart, GpuRequest, GpuShare, GpuUnit, ShareMethod
from nodeservice.core.model import GIB, MIB, Lease, Resources

ANY = GpuRequest()
WATCHED, DRIVER, MPS, MIG = ShareMethod.WATCHED, ShareMethod.DRIVER, ShareMethod.MPS, ShareMethod.MIG


def gpu(letter: str, gib: int = 80, **facts: object) -> GpuUnit:
    values: dict[str, object] = {
        "uuid": f"GPU-{letter}",
        "name": "NVIDIA H100 80GB HBM3",
        "memory_bytes": gib * GIB,
        "compute_capability": (9, 0),
        "share_methods": (WATCHED,),
    }
    return GpuUnit(**{**values, **facts})  # type: ignore[arg-type]


def mig(letter: str, profile: str = "1g.10gb", parent: str = "GPU-p", **facts: object) -> GpuUnit:
    slices, gib = int(profile[0]), int(profile.split(".")[1].removesuffix("gb"))
    values: dict[str, object] = {
        "uuid": f"MIG-{letter}",
        "name": f"NVIDIA H100 80GB HBM3 MIG {profile}",
        "memory_bytes": gib * GIB,
        "compute_capability": (9, 0),
        "mig_profile": profile,
        "parent_uuid": parent,
        "memory_milli": gib * 1000 // 80,
        "compute_milli": slices * 1000 // 7,
        "counts": False,
    }
    return GpuUnit(**{**values, **facts})  # type: ignore[arg-type]


def row(count: int) -> list[GpuUnit]:
    return [gpu(chr(ord("a") + number)) for number in range(count)]


def linked(units: Sequence[GpuUnit], closeness: Mapping[tuple[int, int], int]) -> list[GpuUnit]:
    """Closeness by the numbers of two GPUs, in both directions."""
    near: dict[int, dict[str, int]] = {number: {} for number in range(len(units))}
    for (one, other), value in closeness.items():
        near[one][units[other].uuid] = near[other][units[one].uuid] = value
    return [replace(unit, closeness=near[number]) for number, unit in enumerate(units)]


def two_sockets(count: int = 8) -> list[GpuUnit]:
    """Half of the GPUs at each socket; neighbours are bridged by NVLink in twos."""
    pairs: dict[tuple[int, int], int] = {}
    for one, other in combinations(range(count), 2):
        same_socket = (one < count // 2) == (other < count // 2)
        bridged = one // 2 == other // 2
        pairs[one, other] = (30 if same_socket else 10) + (4000 if bridged else 0)
    return linked(row(count), pairs)


def whole(*uuids: str) -> Lease:
    return Lease(granted=Resources(gpu_count=len(uuids)), gpu_uuids=uuids)


def holds_part(uuid: str, gib: int, sm_percent: int = 0, method: ShareMethod = WATCHED) -> Lease:
    part = GpuPart(memory_bytes=gib * GIB, sm_percent=sm_percent, method=method)
    return Lease(granted=Resources(), gpu_uuids=(uuid,), gpu_part=part)


def asked(
    units: Sequence[GpuUnit],
    count: int = 0,
    request: GpuRequest = ANY,
    *,
    leases: Sequence[Lease] = (),
    allowed: bool = False,
) -> GpuQuestion:
    return GpuQuestion(units=units, leases=leases, count=count, request=request, sharing_allowed=allowed)


def got(question: GpuQuestion) -> tuple[str, ...]:
    picked = pick_gpus(question)
    assert isinstance(picked, GpuPick), picked
    assert gpu_lack(question) is None
    return picked.uuids


def got_part(question: GpuQuestion) -> tuple[str, GpuPart]:
    picked = pick_gpus(question)
    assert isinstance(picked, GpuPick), picked
    assert picked.part is not None
    (uuid,) = picked.uuids
    return uuid, picked.part


def refused(question: GpuQuestion) -> GpuLack:
    picked = pick_gpus(question)
    assert isinstance(picked, GpuLack), picked
    assert gpu_lack(question) == picked
    return picked


def share(gib: int = 0, sm_percent: int = 0, milli: int = 0, **request: object) -> GpuRequest:
    of = GpuShare(milli=milli, memory_bytes=gib * GIB, sm_percent=sm_percent)
    return GpuRequest(share=of, **request)  # type: ignore[arg-type]


# ---- which will do ----------------------------------------------------------------------------------------------------


def test_a_task_that_asks_for_no_gpu_gets_none_even_where_there_are_none() -> None:
    assert got(asked([])) == ()
    assert got(asked(row(2))) == ()


def test_as_many_as_asked_are_given_and_each_once() -> None:
    uuids = got(asked(row(8), 5))
    assert len(set(uuids)) == 5


def test_a_part_of_the_product_name_in_any_case_names_the_model() -> None:
    units = [gpu("a", name="NVIDIA A100-SXM4-80GB"), gpu("b")]
    assert got(asked(units, 1, GpuRequest(model="h100"))) == ("GPU-b",)


def test_a_gpu_with_less_memory_than_asked_will_not_do() -> None:
    units = [gpu("a", 40), gpu("b", 80)]
    assert got(asked(units, 1, GpuRequest(min_memory_bytes=41 * GIB))) == ("GPU-b",)


def test_compute_capabilities_compare_as_numbers_and_not_as_text() -> None:
    units = [gpu("a", compute_capability=(9, 0)), gpu("b", compute_capability=(10, 0))]
    assert got(asked(units, 1, GpuRequest(min_compute_capability=(9, 5)))) == ("GPU-b",)


def test_a_mig_profile_gets_instances_of_that_profile_alone() -> None:
    units = [gpu("a"), mig("b", "2g.20gb"), mig("c"), mig("d")]
    assert got(asked(units, 2, GpuRequest(mig_profile="1g.10gb"))) == ("MIG-c", "MIG-d")


def test_a_count_alone_never_gets_a_mig_instance_unless_the_operator_counts_them() -> None:
    assert not refused(asked([mig("a")], 1)).ever
    assert got(asked([mig("a", counts=True), gpu("b")], 1)) == ("MIG-a",)


def test_named_gpus_are_given_and_of_more_names_than_asked_some() -> None:
    units = row(4)
    assert got(asked(units, 1, GpuRequest(uuids=("GPU-c",)))) == ("GPU-c",)
    assert set(got(asked(units, 2, GpuRequest(uuids=("GPU-d", "GPU-b", "GPU-x"))))) == {"GPU-b", "GPU-d"}


def test_a_mig_instance_that_is_named_is_given_though_a_count_alone_would_not_get_it() -> None:
    assert got(asked([gpu("b"), mig("a")], 1, GpuRequest(uuids=("MIG-a",)))) == ("MIG-a",)


def test_what_somebody_holds_is_not_given_again() -> None:
    units = row(3)
    assert set(got(asked(units, 2, leases=[whole("GPU-b")]))) == {"GPU-a", "GPU-c"}
    assert refused(asked(units, 3, leases=[whole("GPU-b")])).available_count == 2


def test_a_gpu_of_which_a_part_is_held_is_no_whole_gpu() -> None:
    assert refused(asked(row(1), 1, leases=[holds_part("GPU-a", 1)])).ever


def test_an_instance_of_a_gpu_that_is_held_as_a_whole_is_not_given() -> None:
    """It was split between the grant and the start of the task that has it."""
    units = [mig("a", counts=True)]
    holder = [whole("GPU-p")]
    assert refused(asked(units, 1, leases=holder)).ever
    assert refused(asked(units, 1, GpuRequest(mig_profile="1g.10gb"), leases=holder)).ever
    assert refused(asked(units, 0, share(1), leases=holder)).ever
    assert free_count(units, holder) == 0


def test_only_counted_gpus_that_are_well_are_counted_and_only_those_nobody_touches_are_free() -> None:
    units = [gpu("a"), gpu("b", unwell="XID 79"), gpu("c"), mig("d"), gpu("e")]
    assert counted(units) == 3
    assert free_count(units, [whole("GPU-a"), holds_part("GPU-c", 1)]) == 1


# ---- which is best ----------------------------------------------------------------------------------------------------


def test_the_least_capable_gpu_that_will_do_is_given() -> None:
    units = [gpu("a", 141), gpu("b", 40), gpu("c", 80)]
    assert got(asked(units, 1)) == ("GPU-b",)
    assert got(asked(units, 1, GpuRequest(min_memory_bytes=50 * GIB))) == ("GPU-c",)


def test_of_as_much_memory_the_older_one_is_the_less_capable_even_with_some_more_of_it() -> None:
    """An A100 of 80 GB shows some more MiB than an H100 of 80 GB."""
    older = gpu("b", memory_bytes=80 * GIB + 300 * MIB, compute_capability=(8, 0))
    assert got(asked([gpu("a"), older], 1)) == ("GPU-b",)


def test_what_the_driver_keeps_for_itself_differs_a_little_and_does_not_tear_neighbours_apart() -> None:
    units = two_sockets()
    odd = [replace(unit, memory_bytes=unit.memory_bytes - (number * 7 % 5) * MIB) for number, unit in enumerate(units)]
    assert got(asked(odd, 2)) == got(asked(units, 2))
    assert got(asked(odd, 4)) == ("GPU-a", "GPU-b", "GPU-c", "GPU-d")


def test_two_gpus_are_a_bridged_pair() -> None:
    units = two_sockets()
    assert got(asked(units, 2)) == ("GPU-a", "GPU-b")
    assert got(asked(units, 2, leases=[whole("GPU-a", "GPU-d", "GPU-e")])) == ("GPU-g", "GPU-h")


def test_four_gpus_are_of_one_socket() -> None:
    units = two_sockets()
    assert got(asked(units, 4)) == ("GPU-a", "GPU-b", "GPU-c", "GPU-d")
    assert got(asked(units, 4, leases=[whole("GPU-b")])) == ("GPU-e", "GPU-f", "GPU-g", "GPU-h")


def test_one_gpu_is_taken_where_its_neighbour_is_gone_already() -> None:
    assert got(asked(two_sockets(), 1, leases=[whole("GPU-c")])) == ("GPU-d",)


def test_two_of_eight_leave_a_whole_socket_to_the_next() -> None:
    first = got(asked(two_sockets(), 2))
    second = got(asked(two_sockets(), 2, leases=[whole(*first)]))
    assert {*first, *second} == {"GPU-a", "GPU-b", "GPU-c", "GPU-d"}


def test_where_nothing_is_closer_than_anything_else_the_choice_is_the_same_each_time() -> None:
    units = row(8)
    assert got(asked(units, 3)) == got(asked(list(reversed(units)), 3)) == ("GPU-a", "GPU-b", "GPU-c")


def test_four_of_sixteen_are_together_though_not_all_choices_are_looked_at() -> None:
    units = two_sockets(16)
    taken = [whole("GPU-a", "GPU-b", "GPU-c", "GPU-d", "GPU-e", "GPU-f")]
    chosen = got(asked(units, 4, leases=taken))
    assert set(chosen) < {unit.uuid for unit in units[8:]}
    assert len({(ord(uuid[-1]) - ord("a")) // 2 for uuid in chosen}) == 2, "two bridged pairs"
    assert set(got(asked(units, 8))) in ({unit.uuid for unit in units[:8]}, {unit.uuid for unit in units[8:]})


def test_eight_of_fourteen_are_of_one_socket_whichever_gpu_comes_first() -> None:
    units = two_sockets(16)
    assert set(got(asked(units, 8, leases=[whole("GPU-a", "GPU-d")]))) == {unit.uuid for unit in units[8:]}
    assert set(got(asked(units, 8, leases=[whole("GPU-i", "GPU-p")]))) == {unit.uuid for unit in units[:8]}


class Counting(Mapping[str, int]):
    """Closeness that counts how often it is asked."""

    asked_count = 0

    def __init__(self, near: Mapping[str, int]) -> None:
        self._near = near

    def __getitem__(self, uuid: str) -> int:
        Counting.asked_count += 1
        return self._near[uuid]

    def __iter__(self) -> Iterator[str]:
        return iter(self._near)

    def __len__(self) -> int:
        return len(self._near)


@pytest.mark.parametrize(("total", "count"), [(16, 8), (16, 4), (16, 3), (8, 4), (64, 32)])
def test_a_choice_costs_no_more_than_some_ten_thousand_questions(total: int, count: int) -> None:
    """All 8 of 16 would be 12,870 choices of 92 questions each; all 32 of 64 are more than can be looked at."""
    pairs = dict.fromkeys(combinations(range(total), 2), 10)
    units = [replace(unit, closeness=Counting(unit.closeness)) for unit in linked(row(total), pairs)]
    Counting.asked_count = 0
    assert len(got(asked(units, count))) == count
    assert 0 < Counting.asked_count <= 50_000


def test_hundreds_of_mig_instances_are_chosen_among_without_looking_at_closeness() -> None:
    units = [mig(f"{number:03}", counts=True) for number in range(112)]
    assert got(asked(units, 56)) == tuple(f"MIG-{number:03}" for number in range(56))


# ---- parts ------------------------------------------------------------------------------------------------------------


def test_a_watched_part_is_given_only_where_the_operator_allows_it() -> None:
    lack = refused(asked(row(1), 0, share(10)))
    assert not lack.ever
    assert "gpu_sharing" in lack.words
    assert got_part(asked(row(1), 0, share(10), allowed=True)) == (
        "GPU-a",
        GpuPart(memory_bytes=10 * GIB, sm_percent=0, method=WATCHED),
    )


def test_memory_alone_is_held_by_the_driver_without_anybody_s_leave() -> None:
    units = [gpu("a", share_methods=(DRIVER, WATCHED))]
    assert got_part(asked(units, 0, share(10)))[1].method is DRIVER


def test_a_fraction_is_of_the_compute_too_so_a_driver_that_holds_memory_alone_needs_leave_for_it() -> None:
    units = [gpu("a", share_methods=(DRIVER, WATCHED))]
    refused(asked(units, 0, share(milli=500)))
    part = got_part(asked(units, 0, share(milli=500), allowed=True))[1]
    assert part == GpuPart(memory_bytes=40 * GIB, sm_percent=50, method=DRIVER)


def test_a_percentage_of_the_sms_is_given_by_mig_and_mps_alone() -> None:
    lack = refused(asked([gpu("a", share_methods=(DRIVER, WATCHED))], 0, share(10, 20), allowed=True))
    assert "compute" in lack.words
    of_mps = got_part(asked([gpu("a", share_methods=(MPS,))], 0, share(10, 20)))[1]
    assert of_mps == GpuPart(memory_bytes=10 * GIB, sm_percent=20, method=MPS)
    assert got_part(asked([mig("a", "2g.20gb")], 0, share(10, 20)))[1].method is MIG
    refused(asked([mig("a", "1g.10gb")], 0, share(10, 20)))


def test_a_part_that_a_mig_instance_serves_is_all_of_that_instance() -> None:
    uuid, part = got_part(asked([mig("a", "2g.20gb")], 0, share(5)))
    assert uuid == "MIG-a"
    assert part == GpuPart(memory_bytes=20 * GIB, sm_percent=28, method=MIG)
    refused(asked([mig("a")], 0, share(5), leases=[whole("MIG-a")]))


def test_half_a_gpu_is_an_instance_with_half_of_its_memory_and_compute() -> None:
    instances = [mig("a", "1g.10gb"), mig("b", "3g.40gb"), mig("c", "4g.40gb"), mig("d", "7g.80gb")]
    assert got_part(asked(instances, 0, share(milli=500)))[0] == "MIG-c"
    assert got_part(asked(instances, 0, share(milli=420)))[0] == "MIG-b"
    refused(asked(instances[:2], 0, share(milli=500)))


def test_a_mig_instance_comes_first_then_a_gpu_that_is_shared_already_then_a_fresh_one() -> None:
    units = [gpu("a"), gpu("b"), mig("c", "4g.40gb")]
    begun = holds_part("GPU-b", 70)
    assert got_part(asked(units, 0, share(5), leases=[begun], allowed=True))[0] == "MIG-c"
    assert got_part(asked(units, 0, share(5), leases=[begun, whole("MIG-c")], allowed=True))[0] == "GPU-b"
    assert got_part(asked(units, 0, share(20), leases=[begun, whole("MIG-c")], allowed=True))[0] == "GPU-a"


def test_the_smallest_instance_and_the_fullest_gpu_that_will_do_are_taken() -> None:
    instances = [mig("a", "3g.40gb"), mig("b", "1g.10gb"), mig("c", "2g.20gb")]
    assert got_part(asked(instances, 0, share(15)))[0] == "MIG-c"
    leases = [holds_part("GPU-a", 20), holds_part("GPU-b", 50)]
    assert got_part(asked(row(2), 0, share(10), leases=leases, allowed=True))[0] == "GPU-b"


def test_the_memory_of_parts_is_never_more_than_the_gpu_has() -> None:
    leases = [holds_part("GPU-a", 50), holds_part("GPU-a", 20)]
    assert got_part(asked(row(1), 0, share(10), leases=leases, allowed=True))[0] == "GPU-a"
    assert refused(asked(row(1), 0, share(11), leases=leases, allowed=True)).ever


def test_the_compute_of_parts_is_never_more_than_the_gpu_has() -> None:
    units = [gpu("a", share_methods=(MPS,))]
    leases = [holds_part("GPU-a", 1, 60, MPS)]
    got_part(asked(units, 0, share(1, 40), leases=leases))
    assert refused(asked(units, 0, share(1, 41), leases=leases)).ever


@pytest.mark.parametrize(("milli", "times"), [(125, 8), (333, 3), (250, 4), (167, 5), (142, 7), (1, 100)])
def test_as_many_fractions_fit_as_make_one_gpu(milli: int, times: int) -> None:
    units = [gpu("a", share_methods=(MPS,))]
    leases: list[Lease] = []
    for _ in range(times):
        _, part = got_part(asked(units, 0, share(milli=milli), leases=leases))
        assert part.sm_percent >= 1
        leases.append(Lease(granted=Resources(), gpu_uuids=("GPU-a",), gpu_part=part))
    assert sum(lease.gpu_part.memory_bytes for lease in leases if lease.gpu_part) <= 80 * GIB
    assert sum(lease.gpu_part.sm_percent for lease in leases if lease.gpu_part) <= 100


def test_no_part_is_given_of_a_gpu_that_somebody_holds_whole() -> None:
    assert refused(asked(row(1), 0, share(1), leases=[whole("GPU-a")], allowed=True)).ever


def test_clients_of_mps_share_with_no_one_else_where_the_compute_mode_was_changed_meanwhile() -> None:
    by_mps, by_watch = gpu("a", share_methods=(MPS,)), gpu("a", share_methods=(WATCHED,))
    refused(asked([by_mps], 0, share(1), leases=[holds_part("GPU-a", 1)]))
    refused(asked([by_watch], 0, share(1), leases=[holds_part("GPU-a", 1, 0, MPS)], allowed=True))
    got_part(asked([gpu("a", share_methods=(DRIVER,))], 0, share(1), leases=[holds_part("GPU-a", 1)]))


def test_a_part_is_of_a_gpu_that_meets_the_rest_of_the_request_too() -> None:
    units = [gpu("a", 40), gpu("b", 80), gpu("c", 80, compute_capability=(10, 0))]
    wanted = share(1, min_memory_bytes=50 * GIB, min_compute_capability=(10, 0))
    assert got_part(asked(units, 0, wanted, allowed=True))[0] == "GPU-c"
    assert got_part(asked(units, 0, share(1, uuids=("GPU-b",)), allowed=True))[0] == "GPU-b"


def test_more_than_any_gpu_has_is_never_given() -> None:
    lack = refused(asked(row(2), 0, share(81), allowed=True))
    assert not lack.ever
    refused(asked([gpu("a", memory_bytes=0)], 0, share(milli=500), allowed=True))


# ---- words ------------------------------------------------------------------------------------------------------------


def test_a_refusal_names_all_that_was_asked_and_how_many_there_are() -> None:
    request = GpuRequest(
        model="H200",
        mig_profile="1g.18gb",
        min_memory_bytes=16 * GIB,
        min_compute_capability=(9, 0),
        uuids=("MIG-a", "MIG-b"),
    )
    lack = refused(asked(row(2), 2, request))
    assert lack == GpuLack(words=lack.words, ever=False, available_count=0)
    for word in ("2 asked", "H200", "1g.18gb", "16 GiB", "9.0", "2 that are named", "0 in all"):
        assert word in lack.words


def test_a_refusal_for_now_says_how_many_are_free() -> None:
    lack = refused(asked(row(4), 3, leases=[whole("GPU-a", "GPU-b")]))
    assert (lack.ever, lack.available_count) == (True, 2)
    assert "3 asked, 2 free" in lack.words


def test_gpus_that_are_out_of_service_refuse_and_the_words_say_which_and_why() -> None:
    units = [gpu("a", unwell="XID 79 (GPU has fallen off the bus)"), gpu("b")]
    for question in (
        asked(units, 2),
        asked(units, 0, share(1, uuids=("GPU-a",)), allowed=True),
        asked([mig("c", unwell="XID 79 (GPU has fallen off the bus)")], 1, GpuRequest(mig_profile="1g.10gb")),
    ):
        lack = refused(question)
        assert lack.ever, "it may come back"
        assert "1 out of service" in lack.words
        assert "fallen off the bus" in lack.words
    assert got(asked(units, 1)) == ("GPU-b",)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (share(milli=500), "0.5 of a GPU asked"),
        (share(10), "10 GiB of a GPU asked"),
        (share(10, 20), "10 GiB and 20 % of the SMs of a GPU asked"),
        (share(10, model="B200"), "10 GiB of a GPU asked (model B200), this node has none"),
        (share(90), "no GPU here has that to give"),
        (share(90, 10), "no GPU here has that to give"),
        (share(10, 10), "nothing here can keep a task to that share of the compute"),
    ],
)
def test_a_refused_part_is_told_in_words(request_: GpuRequest, words: str) -> None:
    assert words in refused(asked(row(1), 0, request_)).words


def test_a_part_that_is_not_free_now_says_so() -> None:
    lack = refused(asked(row(1), 0, share(10), leases=[whole("GPU-a")], allowed=True))
    assert (lack.ever, "no GPU has that free" in lack.words) == (True, True)
