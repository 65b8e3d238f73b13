"""A node that is killed, frozen or failed at each named point: every task ends once, runs once, and leaves its results."""

from __future__ import annotations

from pathlib import Path

import docker
import pytest

from nodeservice.daemon.fault_points import POINTS
from nodeservice.errors import ConfigError, TransientError
from nodeservice.fault_points import FaultPoint
from tests.integration.ordeal import COMMANDS, go_through

pytestmark = [pytest.mark.engine, pytest.mark.crash, pytest.mark.timeout(240)]

OUTLIVES_ITS_STOP = "runtime.kill"
"""Called only for a container that is still there after its stop: no task of an ordeal is."""
REACHED = tuple(point for point in POINTS if not point.startswith(OUTLIVES_ITS_STOP))
FROZEN = (
    "journal.save.after", "runtime.create.after", "runtime.start.after", "runtime.wait_exited.after",
    "store.put.after", "uplink.report.before",
)  # fmt: skip


@pytest.mark.parametrize("point", REACHED)
async def test_a_node_killed_there_loses_nothing_and_does_nothing_twice(
    point: str, tmp_path: Path, node_id: str, demo_image: str, docker_client: docker.APIClient
) -> None:
    ordeal = await go_through(tmp_path / "node", node_id, point, "kill", docker_client)
    assert (ordeal.reached, ordeal.broken) == (True, [])
    # Killed between the master's answer and the note of it, the node can't know: so for each report that is under way then.
    in_doubt = point in ("uplink.report.after", "journal.save.before")
    assert ordeal.double_reports <= (len(COMMANDS) if in_doubt else 0)


@pytest.mark.parametrize("point", REACHED)
async def test_a_call_that_fails_there_is_made_again(
    point: str, tmp_path: Path, node_id: str, demo_image: str, docker_client: docker.APIClient
) -> None:
    ordeal = await go_through(tmp_path / "node", node_id, point, "fail", docker_client)
    assert ordeal.broken == []
    assert ordeal.double_reports <= (1 if point == "uplink.report.after" else 0)


@pytest.mark.parametrize("point", FROZEN)
async def test_a_node_frozen_there_goes_on_when_it_is_thawed(
    point: str, tmp_path: Path, node_id: str, demo_image: str, docker_client: docker.APIClient
) -> None:
    ordeal = await go_through(tmp_path / "node", node_id, point, "stop", docker_client)
    assert (ordeal.reached, ordeal.broken, ordeal.double_reports) == (True, [], 0)


def test_a_point_counts_and_acts_once() -> None:
    point = FaultPoint("store.put.after:fail:2", POINTS)
    point.reached("store.put.after")
    point.reached("store.put.before")
    with pytest.raises(TransientError):
        point.reached("store.put.after")
    point.reached("store.put.after")


@pytest.mark.parametrize("text", ["store.put", "store.put.after", "store.put.after:explode", "store.put.after:kill:x"])
def test_a_point_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        FaultPoint(text, POINTS)
