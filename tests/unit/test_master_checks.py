"""What the master refuses before it does anything with it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeservice.cli.client import TaskState
from nodeservice.core import admission
from nodeservice.core.model import Resources
from nodeservice.errors import RequestError
from nodeservice.master.amounts import GIB, Amounts
from nodeservice.master.checks import check_address, check_task, check_traceparent, is_id
from nodeservice.master.dialing import node_address
from nodeservice.master.incoming import check_path, read_manifest
from nodeservice.master.nodes import amounts_of
from nodeservice.master.request import GpuWish
from nodeservice.master.rows import State
from nodeservice.rpc.convert import TaskDefaults, spec_from_task
from nodeservice.wire import master_worker_pb2 as pb

UUID = "GPU-00000000-0000-0000-0000-000000000001"
DEFAULTS = TaskDefaults(
    request=Resources(cpu_milli=1000, memory_bytes=GIB, disk_bytes=GIB),
    pids_limit=100,
    timeout_seconds=None,
    grace_seconds=10.0,
)
"""Of a node."""


def task(**fields: object) -> pb.Task:
    return pb.Task(**{"task_id": "t-1", "docker_image": "busybox", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["", ".", "..", "a/b", "../x", "a..b", "-a", "a" * 129, "ä", "a b", "a\n", "a\0b", "10 MB" * 10**6]
)
def test_hostile_ids_are_refused(text: str) -> None:
    assert not is_id(text)


@given(st.text())
def test_an_id_is_always_safe_as_one_component_of_a_path(text: str) -> None:
    if is_id(text):
        assert "/" not in text
        assert text not in (".", "..")
        assert text.isascii()
        assert text.isprintable()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"task_id": "../../etc"}, "task_id"),
        ({"docker_image": ""}, "docker_image"),
        ({"docker_image": "--privileged"}, "docker_image"),
        ({"docker_image": "a b"}, "docker_image"),
        ({"command": "ls", "argv": ["ls"]}, "argv"),
        ({"req_cpu": math.nan}, "req_cpu"),
        ({"req_cpu": math.inf}, "req_cpu"),
        ({"req_memory": -1.0}, "req_memory"),
        ({"req_storage": 1e300}, "req_storage"),
        ({"req_gpu": 1.5}, "req_gpu"),
        ({"req_gpu": 0.0001}, "req_gpu"),
        ({"req_gpu": math.nan}, "req_gpu"),
        ({"req_gpu": -1.0}, "req_gpu"),
        ({"req_gpu": 1e9}, "req_gpu"),
        ({"gpu": pb.GpuRequest(model="T4")}, "req_gpu"),
        ({"req_gpu": 1, "gpu": pb.GpuRequest(model="a\nb")}, "gpu.model"),
        ({"req_gpu": 1, "gpu": pb.GpuRequest(min_memory_bytes=-1)}, "gpu.min_memory_bytes"),
        ({"req_gpu": 1, "gpu": pb.GpuRequest(min_compute_capability="nine")}, "gpu.min_compute_capability"),
        ({"req_gpu": 1, "gpu": pb.GpuRequest(mig_profile="; rm")}, "gpu.mig_profile"),
        ({"req_gpu": 0.5, "gpu": pb.GpuRequest(mig_profile="1g.18gb")}, "gpu.mig_profile"),
        ({"req_gpu": 1, "gpu": pb.GpuRequest(uuids=["0"])}, "gpu.uuids"),
        ({"req_gpu": 1, "gpu": pb.GpuRequest(uuids=["GPU-0000000A-0000-0000-0000-000000000000"])}, "gpu.uuids"),
        ({"req_gpu": 1, "gpu": pb.GpuRequest(uuids=[UUID, UUID])}, "gpu.uuids"),
        ({"req_gpu": 2, "gpu": pb.GpuRequest(uuids=[UUID])}, "gpu.uuids"),
        ({"req_gpu": 1, "gpu": pb.GpuRequest(share=pb.GpuShare(memory_bytes=GIB))}, "gpu.share"),
        ({"gpu": pb.GpuRequest(share=pb.GpuShare())}, "gpu.share.memory_bytes"),
        ({"gpu": pb.GpuRequest(share=pb.GpuShare(memory_bytes=GIB, sm_percent=101))}, "gpu.share.sm_percent"),
        ({"memory_bytes": -5}, "memory_bytes"),
        ({"memory_bytes": GIB, "req_memory": 2.0}, "memory_bytes"),
        ({"cpu_milli": 2**62}, "cpu_milli"),
        ({"attempt": 0}, "attempt"),
        ({"attempt": -1}, "attempt"),
        ({"timeout_seconds": math.nan}, "timeout_seconds"),
        ({"timeout_seconds": -1.0}, "timeout_seconds"),
        ({"grace_seconds": math.inf}, "grace_seconds"),
        ({"pull_policy": "sometimes"}, "pull_policy"),
        ({"pids_limit": 0}, "pids_limit"),
        ({"sla_multiplier": math.nan}, "sla_multiplier"),
        ({"submitted_at": -1}, "submitted_at"),
        ({"submitted_at": 2**62}, "submitted_at"),
        ({"target_worker_id": "../w"}, "target_worker_id"),
        ({"task_name": "../name"}, "task_name"),
        ({"user_id": "a\nb"}, "user_id"),
        ({"command": "a\0b"}, "command"),
        ({"env": [pb.EnvVar(name="A=B", value="")]}, "env"),
        ({"env": [pb.EnvVar(name="A", value="\0")]}, "env"),
        ({"command": "x" * 2**20}, "task"),
    ],
)
def test_a_hostile_task_is_refused_with_the_field_named(fields: dict[str, object], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_task(task(**fields))
    assert caught.value.reason == "INVALID_REQUEST"
    assert caught.value.field == field
    assert len(str(caught.value)) < 500


def test_old_fields_count_cores_and_gib() -> None:
    request = check_task(task(req_cpu=0.5, req_memory=1.5, req_storage=2, req_gpu=1))
    assert request.gpus == GpuWish(count=1)
    assert request.amounts == Amounts(cpu_milli=500, memory_bytes=3 * GIB // 2, disk_bytes=2 * GIB, gpu_count=1)


def test_an_exact_field_wins_over_a_rounded_old_one() -> None:
    assert check_task(task(req_memory=0.0625, memory_bytes=64 * 1024**2 + 5)).amounts.memory_bytes == 64 * 1024**2 + 5
    assert check_task(task(memory_bytes=64 * 1024**2 + 7)).amounts.memory_bytes == 64 * 1024**2 + 7


@pytest.mark.parametrize(
    "fields",
    [
        {"memory_bytes": 64},
        {"memory_bytes": 0},
        {"req_memory": 64 / GIB},
        {"req_cpu": 0.001},
        {"cpu_milli": 500, "exclusive_cpus": True},
        {"pids_limit": 4_000_001},
        {"open_files_limit": 3},
        {"stop_signal": "SIGFOO"},
        {"grace_seconds": 2 * 86400.0},
        {"timeout_seconds": 800 * 86400.0},
        {"wait_timeout_seconds": -1.0},
        {"read_bytes_per_second": 5},
        {"command": "x" * 128 * 1024},
        {"argv": ["a", "\0"]},
        {"env": [pb.EnvVar(name="1 bad", value="x")]},
        {"env": [pb.EnvVar(name="A", value="x" * 128 * 1024)]},
        {"env": [pb.EnvVar(name=f"A{i}") for i in range(1001)]},
    ],
)
def test_what_no_node_takes_for_its_value_alone_is_refused_at_once_and_in_the_same_words(
    fields: dict[str, object],
) -> None:
    with pytest.raises(RequestError) as at_master:
        check_task(task(**fields))
    with pytest.raises(RequestError) as at_node:
        admission.check(spec_from_task(task(**fields), DEFAULTS))
    assert str(at_master.value) == str(at_node.value)


def test_zero_is_no_limit_and_what_is_not_given_is_the_nodes_to_choose() -> None:
    check_task(task())
    check_task(task(timeout_seconds=0, pull_timeout_seconds=0, write_bytes_per_second=0, grace_seconds=0))


def test_a_number_below_one_is_a_part_of_a_gpu_and_a_description_is_read() -> None:
    assert check_task(task(req_gpu=0.25)).gpus == GpuWish(part_milli=250)
    described = pb.GpuRequest(model="H200", min_memory_bytes=GIB, min_compute_capability="9.0", uuids=[UUID])
    assert check_task(task(req_gpu=1, gpu=described)).gpus == GpuWish(
        count=1,
        model="H200",
        min_memory_bytes=GIB,
        min_compute_capability=(9, 0),
        uuids=frozenset({UUID}),
    )
    part = pb.GpuRequest(share=pb.GpuShare(memory_bytes=GIB, sm_percent=30))
    assert check_task(task(gpu=part)).gpus == GpuWish(part_memory_bytes=GIB, part_sm_percent=30)


@pytest.mark.parametrize("profile", ["1g.18gb", "1c.3g.71gb", "1g.24gb+me.all", "1g.24gb-me", "4g.96gb+gfx"])
def test_mig_profiles_that_nodes_know_are_known_here(profile: str) -> None:
    asked = task(req_gpu=1, gpu=pb.GpuRequest(mig_profile=profile))
    assert check_task(asked).gpus == GpuWish(count=1, mig_profile=profile)


def test_the_client_knows_the_states_that_the_current_attempt_of_a_task_can_have() -> None:
    assert [*TaskState] == [state for state in State if state not in (State.LOST, State.DROPPED)]


def test_an_empty_description_asks_for_no_gpu() -> None:
    assert check_task(task(gpu=pb.GpuRequest())).gpus == GpuWish()


def test_a_broken_trace_context_is_dropped_and_not_an_error() -> None:
    good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert check_traceparent(good) == good
    for bad in ("", "x", good + "0", good.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32), good + "\n"):
        assert check_traceparent(bad) == ""


# ---- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "peer", "expected"),
    [
        ({}, "ipv4:10.0.0.7:41234", "10.0.0.7:50052"),
        ({"listen_address": "0.0.0.0:7000"}, "ipv4:10.0.0.7:41234", "10.0.0.7:7000"),
        ({"listen_address": ":7000"}, "ipv4:10.0.0.7:41234", "10.0.0.7:7000"),
        ({"listen_address": "[::]:7000"}, "ipv6:%5Bfe80::1%5D:41234", "[fe80::1]:7000"),
        ({"worker_ip": "node-7.example"}, "ipv4:10.0.0.7:1", "node-7.example:50052"),
        ({"worker_ip": "10.1.1.1", "listen_address": ":7000"}, "ipv4:10.0.0.7:1", "10.1.1.1:7000"),
        ({"worker_ip": "10.1.1.1:9", "listen_address": ":7000"}, "ipv4:10.0.0.7:1", "10.1.1.1:9"),
        ({"worker_ip": "fe80::2"}, "ipv4:10.0.0.7:1", "[fe80::2]:50052"),
    ],
)
def test_the_advertised_address_wins_else_the_peer_with_the_listening_port(
    info: dict[str, str], peer: str, expected: str
) -> None:
    assert node_address(pb.WorkerInfo(**info), peer) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["unix:/etc/x", "dns:///evil", "a b:1", "host:0", "host:70000", "host:x", "", "a" * 300, "h\n:1"]
)
def test_what_is_not_an_address_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        check_address("worker_ip", text, default_port=50052)


# ---- what nodes have --------------------------------------------------------------------------------------------------


def test_a_node_of_the_old_protocol_offers_its_totals() -> None:
    capacity, allocatable = amounts_of(pb.WorkerInfo(total_cpu=2, total_memory=4, total_storage=10, total_gpu=1))
    assert capacity == allocatable == Amounts(cpu_milli=2000, memory_bytes=4 * GIB, disk_bytes=10 * GIB, gpu_count=1)


def test_the_exact_allocatable_amounts_win() -> None:
    info = pb.WorkerInfo(total_cpu=2, allocatable=pb.Resources(cpu_milli=1500), capacity=pb.Resources(cpu_milli=2000))
    assert amounts_of(info) == (Amounts(cpu_milli=2000), Amounts(cpu_milli=1500))


@pytest.mark.parametrize(
    "fields",
    [
        {"total_cpu": math.nan},
        {"total_memory": -1.0},
        {"total_storage": 1e300},
        {"total_gpu": math.inf},
        {"total_gpu": 1e10},
    ],
)
def test_a_node_with_impossible_amounts_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(RequestError):
        amounts_of(pb.WorkerInfo(**fields))  # type: ignore[arg-type]


# ---- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../a", "a/../b", "a//b", "a/", "./a", "a\0b", "a\nb", "x" * 256, "d/" * 600 + "f"]
)
def test_a_hostile_path_is_refused(path: str) -> None:
    with pytest.raises(RequestError):
        check_path(path)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_a_request_error(data: bytes) -> None:
    with pytest.raises(RequestError):
        read_manifest(data, task_id="t", attempt=1)


@pytest.mark.parametrize(
    ("path", "size"),
    [('"a"', "-1"), ('"a"', "1e999"), ('"a"', "1.5"), ('"a"', "true"), ('"\\ud800"', "1"), ('["a"]', "1")],
)
def test_a_manifest_that_names_no_file_of_this_world_is_refused(path: str, size: str) -> None:
    file = f'{{"path":{path},"sha256":"{"0" * 64}","size_bytes":{size}}}'
    with pytest.raises(RequestError):
        read_manifest(f'{{"attempt":1,"files":[{file}],"task_id":"t"}}'.encode(), task_id="t", attempt=1)


def test_a_manifest_of_another_attempt_is_refused() -> None:
    data = b'{"attempt":1,"files":[],"skipped":[],"task_id":"t","version":1}'
    assert read_manifest(data, task_id="t", attempt=1) == ()
    with pytest.raises(RequestError, match="another attempt"):
        read_manifest(data, task_id="t", attempt=2)
