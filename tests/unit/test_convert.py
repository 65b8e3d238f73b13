"""What a node makes of a task as it comes over the wire."""

from __future__ import annotations

import math

import pytest

from nodeservice.core.model import Resources
from nodeservice.errors import RequestError
from nodeservice.rpc.convert import TaskDefaults, spec_from_task
from nodeservice.wire import master_worker_pb2 as pb

DEFAULTS = TaskDefaults(request=Resources(), pids_limit=1, timeout_seconds=None, grace_seconds=0.0)


def test_a_task_that_asks_for_open_files_is_told_from_one_that_gets_the_default() -> None:
    asked = spec_from_task(pb.Task(task_id="t", docker_image="i", open_files_limit=65_536), DEFAULTS)
    plain = spec_from_task(pb.Task(task_id="t", docker_image="i"), DEFAULTS)
    assert (asked.open_files_limit, asked.open_files_asked) == (65_536, True)
    assert (plain.open_files_limit, plain.open_files_asked) == (65_536, False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"req_cpu": -0.5}, "req_cpu is -0.5"),
        ({"req_memory": 1e300}, "req_memory is 1e+300"),
        ({"req_storage": math.nan}, "req_storage is nan"),
        ({"cpu_milli": -1}, "cpu_milli is -1"),
        ({"req_memory": 1.0, "memory_bytes": 2**62}, f"memory_bytes is {2**62}"),
        ({"disk_bytes": 2**63 - 1}, f"disk_bytes is {2**63 - 1}"),
        ({"req_cpu": 2.0, "cpu_milli": 1000}, "req_cpu is 2.0"),
    ],
)
def test_an_amount_that_is_refused_is_told_as_it_was_sent(fields: dict[str, float], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        spec_from_task(pb.Task(task_id="t", docker_image="i", **fields), DEFAULTS)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{words} (")
    assert caught.value.field == words.split(maxsplit=1)[0]
