"""Placement and the pass over the queue."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.master import placement, plan
from nodeservice.master.amounts import GIB, Amounts
from nodeservice.master.placement import Choice, NeverFits, Offer, Waiting, can_take, place
from nodeservice.master.plan import Candidate, make_plan
from nodeservice.master.request import GpuWish, Request

SMALL = Amounts(cpu_milli=1000, memory_bytes=GIB, disk_bytes=GIB)
NODE = Amounts(cpu_milli=4000, memory_bytes=8 * GIB, disk_bytes=100 * GIB)


def asks(amounts: Amounts) -> Request:
    return Request(amounts=amounts, gpus=GpuWish(count=amounts.gpu_count))


def offer(name: str, allocatable: Amounts = NODE, assigned: Amounts | None = None, blocked: str = "") -> Offer:
    return Offer(worker_id=name, allocatable=allocatable, assigned=assigned or Amounts(), blocked=blocked)


def test_without_any_node_a_task_waits() -> None:
    assert place(asks(SMALL), []) == Waiting("NO_NODE", "no node has registered yet")


def test_nodes_that_are_gone_cost_nothing_while_one_that_is_there_could_hold_the_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at: list[str] = []
    real = Offer.lacking_ever
    monkeypatch.setattr(Offer, "lacking_ever", lambda one, asked: looked_at.append(one.worker_id) or real(one, asked))
    gone = [offer(f"gone{number}", blocked="has been silent") for number in range(3)]
    answer = place(asks(SMALL), [*gone, offer("busy", assigned=NODE), offer("small", Amounts(cpu_milli=1))])
    assert answer == Waiting("INSUFFICIENT_CPU", "1 CPU asked; node busy has 0 CPU free now")
    assert looked_at == ["busy", "small"]
    small = offer("small", Amounts(cpu_milli=1))
    assert place(asks(SMALL), [*gone, small]) == Waiting(
        "NODE_UNAVAILABLE", "; ".join(f"node {one.worker_id} has been silent" for one in gone)
    )
    assert isinstance(place(asks(Amounts(cpu_milli=9000)), [*gone, small]), NeverFits)


def test_the_node_on_which_the_least_stays_unused_is_chosen() -> None:
    empty, fuller = offer("a"), offer("b", assigned=Amounts(cpu_milli=2000, memory_bytes=4 * GIB))
    assert place(asks(SMALL), [empty, fuller]) == Choice("b")


def test_a_task_without_gpus_leaves_gpu_nodes_to_those_that_need_them() -> None:
    gpu_node = offer("a", Amounts(cpu_milli=1000, memory_bytes=GIB, disk_bytes=GIB, gpu_count=4))
    assert place(asks(SMALL), [gpu_node, offer("b")]) == Choice("b")
    assert place(asks(SMALL), [gpu_node]) == Choice("a")


def test_the_target_is_honoured_even_where_another_node_fits_better() -> None:
    nodes = [offer("a"), offer("b", assigned=Amounts(cpu_milli=3000))]
    assert place(asks(SMALL), nodes, target="a") == Choice("a")
    answer = place(asks(SMALL), nodes, target="c")
    assert isinstance(answer, Waiting)
    assert answer.reason == "TARGET_UNKNOWN"


@pytest.mark.parametrize(
    ("request_", "reason", "words"),
    [
        (Amounts(cpu_milli=5000), "INSUFFICIENT_CPU", "5 CPU asked"),
        (Amounts(memory_bytes=9 * GIB), "INSUFFICIENT_MEMORY", "9.00 GiB memory asked"),
        (Amounts(disk_bytes=101 * GIB), "INSUFFICIENT_STORAGE", "101.00 GiB disk asked"),
        (Amounts(gpu_count=1), "INSUFFICIENT_GPU", "1 GPU asked"),
    ],
)
def test_what_no_node_could_ever_hold_names_the_missing_resource(request_: Amounts, reason: str, words: str) -> None:
    answer = place(asks(request_), [offer("a"), offer("b", SMALL)])
    assert isinstance(answer, NeverFits)
    assert answer.reason == reason
    assert words in answer.message
    assert "node a" in answer.message


def test_a_request_that_only_two_nodes_together_could_hold_never_fits() -> None:
    many_cpus = offer("c", Amounts(cpu_milli=16000, memory_bytes=GIB))
    much_memory = offer("m", Amounts(cpu_milli=1000, memory_bytes=64 * GIB))
    answer = place(asks(Amounts(cpu_milli=8000, memory_bytes=32 * GIB)), [many_cpus, much_memory])
    assert isinstance(answer, NeverFits)
    assert "no single node" in answer.message


def test_a_full_node_makes_a_task_wait_with_the_missing_resource() -> None:
    answer = place(asks(SMALL), [offer("a", assigned=NODE)])
    assert answer == Waiting("INSUFFICIENT_CPU", "1 CPU asked; node a has 0 CPU free now")


def test_a_silent_node_makes_a_task_wait_and_never_makes_it_impossible() -> None:
    answer = place(asks(SMALL), [offer("a", blocked="is draining")])
    assert answer == Waiting("NODE_UNAVAILABLE", "node a is draining")


def test_a_node_that_just_refused_the_task_is_passed_over() -> None:
    assert place(asks(SMALL), [offer("a"), offer("b")], excluded={"a"}) == Choice("b")
    answer = place(asks(SMALL), [offer("a")], excluded={"a"})
    assert isinstance(answer, Waiting)
    assert answer.reason == "NODE_REFUSED"


def test_a_resource_of_which_nothing_is_asked_is_never_missing() -> None:
    overdrawn = offer("a", assigned=Amounts(disk_bytes=200 * GIB))
    assert place(asks(Amounts(cpu_milli=1000)), [overdrawn]) == Choice("a")


# ---- the pass ---------------------------------------------------------------------------------------------------------


def candidate(name: str, request: Amounts, waited: float = 0.0) -> Candidate:
    return Candidate(key=(name, 1), request=asks(request), waited_seconds=waited)


def test_a_task_that_does_not_fit_now_is_skipped_and_smaller_ones_go_first() -> None:
    node = offer("a", assigned=Amounts(cpu_milli=2000))
    made = make_plan([candidate("big", NODE), candidate("small", SMALL)], [node], patience_seconds=60)
    assert made.assign == ((("small", 1), "a"),)
    assert made.waiting["big", 1].reason == "INSUFFICIENT_CPU"


def test_a_task_that_has_waited_too_long_gets_a_node_kept_for_it() -> None:
    node = offer("a", assigned=Amounts(cpu_milli=2000))
    made = make_plan([candidate("big", NODE, waited=61), candidate("small", SMALL)], [node], patience_seconds=60)
    assert made.assign == ()
    assert made.waiting["small", 1].reason == "RESERVED"


def test_a_node_that_is_kept_leaves_the_others_to_smaller_tasks() -> None:
    nodes = [offer("a", assigned=Amounts(cpu_milli=2000)), offer("b", SMALL)]
    made = make_plan([candidate("big", NODE, waited=61), candidate("small", SMALL)], nodes, patience_seconds=60)
    assert made.assign == ((("small", 1), "b"),)


def test_a_task_that_never_fits_keeps_no_node() -> None:
    made = make_plan(
        [candidate("giant", Amounts(cpu_milli=10**6), waited=999), candidate("small", SMALL)],
        [offer("a")],
        patience_seconds=60,
    )
    assert made.assign == ((("small", 1), "a"),)
    assert made.never["giant", 1].reason == "INSUFFICIENT_CPU"


amounts = st.builds(
    Amounts,
    cpu_milli=st.integers(0, 8000),
    memory_bytes=st.integers(0, 16),
    disk_bytes=st.integers(0, 16),
    gpu_count=st.integers(0, 4),
)
offers = st.lists(
    st.builds(
        Offer,
        worker_id=st.sampled_from("abcd"),
        allocatable=amounts,
        assigned=amounts,
        blocked=st.sampled_from(["", "", "is silent"]),
    ),
    max_size=4,
    unique_by=lambda o: o.worker_id,
)
queues = st.lists(
    st.builds(
        Candidate,
        key=st.tuples(st.text("xyz", min_size=1, max_size=6), st.just(1)),
        request=amounts.map(asks),
        target=st.sampled_from(["", "", "", "a", "z"]),
        waited_seconds=st.floats(0, 120),
        excluded=st.frozensets(st.sampled_from("abcd"), max_size=2),
    ),
    max_size=12,
    unique_by=lambda c: c.key,
)


@given(queues, offers)
def test_a_pass_never_gives_more_than_there_is_and_answers_for_every_task(
    queue: list[Candidate], nodes: list[Offer]
) -> None:
    made = make_plan(queue, nodes, patience_seconds=60)
    by_key = {c.key: c for c in queue}
    by_name = {o.worker_id: o for o in nodes}
    answered = [key for key, _ in made.assign] + list(made.waiting) + list(made.never)
    assert sorted(answered) == sorted(by_key)
    totals = {name: o.assigned for name, o in by_name.items()}
    for key, name in made.assign:
        task, node = by_key[key], by_name[name]
        assert not node.blocked
        assert name not in task.excluded
        assert task.target in ("", name)
        assert not node.allocatable.minus(totals[name]).lacking(task.request.amounts)
        totals[name] = totals[name].plus(task.request.amounts)


@given(queues, offers)
def test_what_never_fits_would_not_fit_on_empty_nodes_either(queue: list[Candidate], nodes: list[Offer]) -> None:
    made = make_plan(queue, nodes, patience_seconds=60)
    for task in queue:
        candidates = [o for o in nodes if task.target in ("", o.worker_id)]
        possible = any(not o.allocatable.lacking(task.request.amounts) for o in candidates)
        assert (task.key in made.never) == (bool(candidates) and not possible)


few_kinds = st.lists(
    st.builds(
        Candidate,
        key=st.tuples(st.text("xyz", min_size=1, max_size=6), st.just(1)),
        request=st.sampled_from(
            [Amounts(cpu_milli=500), Amounts(cpu_milli=900, memory_bytes=2), Amounts(gpu_count=1)]
        ).map(asks),
        excluded=st.sampled_from([frozenset(), frozenset(), frozenset("a")]),
        avoid=st.sampled_from([frozenset(), frozenset(), frozenset("b")]),
    ),
    max_size=25,
    unique_by=lambda c: c.key,
)


@given(st.one_of(queues, few_kinds), offers)
def test_remembering_equal_requests_changes_no_answer(queue: list[Candidate], nodes: list[Offer]) -> None:
    """The pass keeps answers for requests that are alike; each must be what `place` itself says at that moment."""
    made = make_plan(queue, nodes, patience_seconds=1000)
    room = {o.worker_id: o for o in nodes}
    assigned = dict(made.assign)
    for task in queue:
        answer = place(task.request, list(room.values()), target=task.target, excluded=task.excluded, avoid=task.avoid)
        if isinstance(answer, Choice):
            assert assigned[task.key] == answer.worker_id
            before = room[answer.worker_id]
            room[answer.worker_id] = offer(
                before.worker_id, before.allocatable, before.assigned.plus(task.request.amounts), before.blocked
            )
        else:
            assert task.key not in assigned


def test_a_burst_of_equal_tasks_does_not_look_at_all_nodes_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def counted(*args: Any, **options: Any) -> bool:
        nonlocal looks
        looks += 1
        return can_take(*args, **options)

    monkeypatch.setattr(placement, "can_take", counted)
    monkeypatch.setattr(plan, "can_take", counted)
    nodes = [offer(f"n{number}") for number in range(100)]
    tasks = [Candidate(key=(f"t{number}", 1), request=asks(SMALL)) for number in range(300)]
    made = make_plan(tasks, nodes, patience_seconds=60)
    assert len(made.assign) == 300
    assert looks <= 2 * len(nodes) + len(tasks)
