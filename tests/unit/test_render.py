"""Tables for people fit a terminal, and options mean the same to `run` and `submit`."""

from __future__ import annotations

import pytest

from nodeservice.cli.render import show_nodes
from nodeservice.cli.task_json import node_document
from nodeservice.cli.task_options import limits_given
from nodeservice.wire import master_worker_pb2 as pb

NOTHING: dict[str, object] = {
    "wait_timeout": None, "pull_timeout": None, "total_timeout": None, "stop_signal": None, "exclusive_cpus": False,
    "open_files": None, "read_rate": None, "write_rate": None,
}  # fmt: skip


def test_the_last_heartbeat_of_a_node_is_shown_to_the_second(capsys: pytest.CaptureFixture[str]) -> None:
    view = pb.NodeView(worker_id="node-1", state="ACTIVE", last_heartbeat_unix_ms=1_764_000_000_123)
    show_nodes([node_document(view), node_document(pb.NodeView(worker_id="never-heard"))])
    lines = capsys.readouterr().out.splitlines()
    assert next(line.rstrip() for line in lines if "node-1" in line).endswith(" 11-24 16:00:00")
    assert "16:00" not in next(line for line in lines if "never-heard" in line)


@pytest.mark.parametrize("name", ["wait", "pull", "total"])
def test_a_time_limit_of_zero_is_none(name: str) -> None:
    given = limits_given(**NOTHING | {f"{name}_timeout": "0s"})  # type: ignore[arg-type]
    assert given == {f"{name}_timeout_seconds": None}
    assert not pb.Task(**given).HasField(f"{name}_timeout_seconds")  # type: ignore[arg-type]
