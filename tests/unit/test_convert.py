"""What a node makes of a task as it comes over the wire."""

from __future__ import annotations

from nodeservice.core.model import Resources
from nodeservice.rpc.convert import TaskDefaults, spec_from_task
from nodeservice.wire import master_worker_pb2 as pb

DEFAULTS = TaskDefaults(request=Resources(), pids_limit=1, timeout_seconds=None, grace_seconds=0.0)


def test_a_task_that_asks_for_open_files_is_told_from_one_that_gets_the_default() -> None:
    asked = spec_from_task(pb.Task(task_id="t", docker_image="i", open_files_limit=65_536), DEFAULTS)
    plain = spec_from_task(pb.Task(task_id="t", docker_image="i"), DEFAULTS)
    assert (asked.open_files_limit, asked.open_files_asked) == (65_536, True)
    assert (plain.open_files_limit, plain.open_files_asked) == (65_536, False)
