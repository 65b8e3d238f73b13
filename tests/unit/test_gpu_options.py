"""GPUs as `run` and `submit` take them from the command line."""

from __future__ import annotations

import inspect

import pytest

from nodeservice.cli.client import submit
from nodeservice.cli.gpu_options import GpuAsk, gpus_asked
from nodeservice.cli.run_command import run
from nodeservice.cli.submission import Submission
from nodeservice.core.gpus import GpuRequest, GpuShare
from nodeservice.core.model import GIB
from nodeservice.errors import RequestError
from nodeservice.master.checks import check_task
from nodeservice.rpc.convert_gpu import gpu_request
from nodeservice.wire import master_worker_pb2 as pb

A, B = (f"GPU-00000000-0000-0000-0000-{number:012d}" for number in (1, 2))

GIVEN = [
    ({}, GpuAsk()),
    ({"gpus": "0"}, GpuAsk()),
    ({"gpus": "2"}, GpuAsk(count=2)),
    ({"gpus": "2.0"}, GpuAsk(count=2)),
    ({"gpus": "0.5"}, GpuAsk(request=GpuRequest(share=GpuShare(milli=500)))),
    ({"gpus": ".125"}, GpuAsk(request=GpuRequest(share=GpuShare(milli=125)))),
    ({"gpus": "0.5", "model": "A100"}, GpuAsk(request=GpuRequest(model="A100", share=GpuShare(milli=500)))),
    ({"model": "T4"}, GpuAsk(count=1, request=GpuRequest(model="T4"))),
    ({"gpus": "2", "min_memory": "40g"}, GpuAsk(count=2, request=GpuRequest(min_memory_bytes=40 * GIB))),
    ({"capability": "9.0"}, GpuAsk(count=1, request=GpuRequest(min_compute_capability=(9, 0)))),
    ({"mig": "1g.18gb"}, GpuAsk(count=1, request=GpuRequest(mig_profile="1g.18gb"))),
    ({"uuids": [A, B]}, GpuAsk(count=2, request=GpuRequest(uuids=(A, B)))),
    ({"uuids": [A, B], "gpus": "1"}, GpuAsk(count=1, request=GpuRequest(uuids=(A, B)))),
    ({"memory": "10g"}, GpuAsk(request=GpuRequest(share=GpuShare(memory_bytes=10 * GIB)))),
    ({"memory": "10g", "sms": 30}, GpuAsk(request=GpuRequest(share=GpuShare(memory_bytes=10 * GIB, sm_percent=30)))),
]


@pytest.mark.parametrize(("options", "asked"), GIVEN, ids=str)
def test_what_is_typed_is_what_is_asked(options: dict[str, object], asked: GpuAsk) -> None:
    assert gpus_asked(**options) == asked  # type: ignore[arg-type]


@pytest.mark.parametrize(("options", "asked"), GIVEN, ids=str)
def test_node_and_master_read_from_the_wire_what_was_typed(options: dict[str, object], asked: GpuAsk) -> None:
    task = submission(asked).task()
    assert gpu_request(task) == (asked.count, asked.request)
    assert check_task(pb.Task.FromString(task.SerializeToString())).gpus.count == asked.count


def submission(asked: GpuAsk) -> Submission:
    return Submission(image="i", cpus="1", memory="64m", disk="1g", gpus=asked, task_id="t")


def test_a_number_alone_is_said_in_the_old_field_alone() -> None:
    assert not submission(GpuAsk(count=2)).task().HasField("gpu")
    assert submission(GpuAsk(count=2)).task().req_gpu == 2.0
    half = submission(gpus_asked(gpus="0.5")).task()
    assert (half.req_gpu, half.HasField("gpu")) == (0.5, False)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"gpus": "1.5"}, "--gpus"),
        ({"gpus": "-1"}, "--gpus"),
        ({"gpus": "many"}, "--gpus"),
        ({"gpus": "0.0001"}, "--gpus"),
        ({"gpus": "5000"}, "--gpus"),
        ({"gpus": "٣"}, "--gpus"),
        ({"gpus": "0", "model": "T4"}, "--gpus"),
        ({"model": "T4\n"}, "--gpu-model"),
        ({"min_memory": "lots"}, "--gpu-min-memory"),
        ({"capability": "9"}, "--gpu-capability"),
        ({"mig": "half"}, "--gpu-mig"),
        ({"mig": "1g.18gb", "gpus": "0.5"}, "--gpus"),
        ({"uuids": ["0"]}, "--gpu-uuid"),
        ({"uuids": [A, A]}, "--gpu-uuid"),
        ({"uuids": [A], "gpus": "2"}, "--gpu-uuid"),
        ({"memory": "10g", "gpus": "2"}, "--gpu-memory"),
        ({"memory": "10g", "gpus": "0.5"}, "--gpu-memory"),
        ({"memory": "10"}, "--gpu-memory"),
        ({"memory": "0"}, "--gpu-memory"),
        ({"sms": 30}, "--gpu-sms"),
        ({"memory": "10g", "sms": 0}, "--gpu-sms"),
        ({"memory": "10g", "sms": 101}, "--gpu-sms"),
    ],
    ids=str,
)
def test_an_error_names_the_option_and_the_remedy(options: dict[str, object], option: str) -> None:
    with pytest.raises(RequestError) as caught:
        gpus_asked(**options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{option} ")
    assert caught.value.hint
    assert (caught.value.reason, caught.value.field) == ("INVALID_REQUEST", option.removeprefix("--"))
    assert "gpu." not in str(caught.value)


def test_both_commands_have_the_same_gpu_options() -> None:
    of_run, of_submit = (
        {name: one.annotation for name, one in inspect.signature(command).parameters.items() if name.startswith("gpu")}
        for command in (run, submit)
    )
    assert of_run == of_submit
    assert len(of_run) == 8
