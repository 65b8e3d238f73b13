"""What is refused, and that the refusal names field and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.core import admission
from nodeservice.core.cpus import Cpu
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
    spec: TaskSpec,
    *,
    free: Resources | None = None,
    draining: bool = False,
    conditions: Mapping[str, str] | None = None,
    live: int = 0,
) -> TaskRecord | None:
    cpus = [Cpu(numa_node=0, core=core, id=core) for core in range(3)]
    ledger = Ledger(free or Resources(cpu_milli=2000, memory_bytes=2**30, disk_bytes=2**30), cpus=cpus)
    return admission.admit(
        spec,
        known=unknown,
        ledger=ledger,
        draining=draining,
        conditions=conditions or {},
        live_count=live,
        max_live_count=10,
    )


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
        ("wait_timeout_seconds", replace(SPEC, wait_timeout_seconds=-1.0)),
        ("pull_timeout_seconds", replace(SPEC, pull_timeout_seconds=float("inf"))),
        ("total_timeout_seconds", replace(SPEC, total_timeout_seconds=float("nan"))),
        ("stop_signal", replace(SPEC, stop_signal="SIGSTOP")),
        ("stop_signal", replace(SPEC, stop_signal="x" * 10_000)),
        ("open_files_limit", replace(SPEC, open_files_limit=0)),
        ("open_files_limit", replace(SPEC, open_files_limit=2**30)),
        ("exclusive_cpus", replace(SPEC, exclusive_cpus=True, request=replace(SPEC.request, cpu_milli=1500))),
        ("read_bytes_per_second", replace(SPEC, read_bytes_per_second=1)),
        ("write_bytes_per_second", replace(SPEC, write_bytes_per_second=-5)),
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


def test_a_node_that_is_not_well_takes_no_new_work_and_says_why() -> None:
    with pytest.raises(CapacityError) as caught:
        admit(SPEC, conditions={"DISK_LOW": "1 % of /var is free"})
    assert caught.value.reason == "DISK_LOW"
    assert "1 % of /var is free" in str(caught.value)


def test_exclusive_cores_leave_one_for_the_host_and_everybody_else() -> None:
    free = Resources(cpu_milli=3000, memory_bytes=2**30, disk_bytes=2**30)
    two, three = (replace(SPEC, exclusive_cpus=True, request=replace(SPEC.request, cpu_milli=n * 1000)) for n in (2, 3))
    admit(two, free=free)
    with pytest.raises(CapacityError) as caught:
        admit(three, free=free)
    assert (caught.value.reason, caught.value.field) == ("INSUFFICIENT_CPU", "exclusive_cpus")
    assert "this node allocates 2 in all" in str(caught.value)
