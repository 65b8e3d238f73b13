"""What is refused, and that the refusal names field and remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.core import admission
from nodeservice.core.ledger import Ledger
from nodeservice.core.model import AttemptId, Resources, TaskRecord, TaskSpec
from nodeservice.errors import CapacityError, NodeServiceError, RequestError

MIB = 1024**2
SPEC = TaskSpec(
    id=AttemptId("task-1764000000"),
    image="demo",
    request=Resources(cpu_milli=1000, memory_bytes=64 * MIB),
    pids_limit=100,
    fingerprint="f",
)


def unknown(_spec: TaskSpec) -> TaskRecord | None:
    return None


def admit(
    spec: TaskSpec, *, free: Resources | None = None, draining: bool = False, live: int = 0
) -> admission.Admitted:
    ledger = Ledger(free or Resources(cpu_milli=2000, memory_bytes=2**30, disk_bytes=2**30))
    return admission.admit(spec, known=unknown, ledger=ledger, draining=draining, live_count=live, max_live_count=10)


@pytest.mark.parametrize(
    "task_id",
    ["", "..", "../etc", "a/b", "a..b", ".hidden", "-x", "a b", "a\n", "ä", "x" * 129, "x" * 10_000_000, "a\0b"],
)
def test_a_hostile_id_is_refused_with_a_short_message(task_id: str) -> None:
    with pytest.raises(RequestError) as caught:
        admit(replace(SPEC, id=AttemptId(task_id)))
    assert caught.value.field == "task_id"
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@given(st.text())
def test_an_id_that_passes_is_safe_as_a_file_name(text: str) -> None:
    try:
        admission.check_task_id(text)
    except NodeServiceError:
        return
    assert "/" not in text
    assert ".." not in text
    assert text.isascii()
    assert 0 < len(text) <= 128


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("docker_image", replace(SPEC, image="")),
        ("docker_image", replace(SPEC, image="a\nb")),
        ("task_name", replace(SPEC, task_name="x" * 300)),
        ("req_cpu", replace(SPEC, request=Resources(cpu_milli=1, memory_bytes=64 * MIB))),
        ("req_memory", replace(SPEC, request=Resources(cpu_milli=1000, memory_bytes=1))),
        ("req_storage", replace(SPEC, request=Resources(cpu_milli=1000, memory_bytes=64 * MIB, disk_bytes=-1))),
        ("pids_limit", replace(SPEC, pids_limit=0)),
        ("timeout_seconds", replace(SPEC, timeout_seconds=-1.0)),
        ("timeout_seconds", replace(SPEC, timeout_seconds=float("inf"))),
        ("grace_seconds", replace(SPEC, grace_seconds=float("nan"))),
        ("attempt", replace(SPEC, id=AttemptId("t", 0))),
        ("argv", replace(SPEC, argv=("a",), command="b")),
        ("command", replace(SPEC, command="x" * 200_000)),
        ("env", replace(SPEC, env=(("1A", "x"),))),
        ("env", replace(SPEC, env=(("A", "x\0"),))),
    ],
)
def test_a_bad_field_is_named_with_its_remedy(field: str, spec: TaskSpec) -> None:
    with pytest.raises(RequestError) as caught:
        admit(spec)
    assert caught.value.field == field
    assert caught.value.reason == "INVALID_REQUEST"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("reason", "request_"),
    [
        ("INSUFFICIENT_CPU", Resources(cpu_milli=9000, memory_bytes=64 * MIB)),
        ("INSUFFICIENT_MEMORY", Resources(cpu_milli=1000, memory_bytes=2**40)),
        ("INSUFFICIENT_STORAGE", Resources(cpu_milli=1000, memory_bytes=64 * MIB, disk_bytes=2**40)),
        ("INSUFFICIENT_GPU", Resources(cpu_milli=1000, memory_bytes=64 * MIB, gpu_count=1)),
    ],
)
def test_a_request_that_does_not_fit_names_the_missing_resource(reason: str, request_: Resources) -> None:
    with pytest.raises(CapacityError) as caught:
        admit(replace(SPEC, request=request_))
    assert caught.value.reason == reason
    assert "in all" in str(caught.value)


def test_a_draining_node_and_a_full_list_refuse() -> None:
    with pytest.raises(CapacityError, match="no new tasks"):
        admit(SPEC, draining=True)
    with pytest.raises(CapacityError, match="already holds 10"):
        admit(SPEC, live=10)
