"""A node that is killed, frozen or failed at each named point: every task ends once, runs once, and leaves its results."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future

import docker
import pytest

from nodeservice.daemon.fault_points import POINTS
from nodeservice.errors import ConfigError, TransientError
from nodeservice.fault_points import FaultPoint
from tests.conftest import own_node_id
from tests.integration.ordeal import Ordeal, go_through
from tests.integration.side_by_side import side_by_side

pytestmark = [pytest.mark.engine, pytest.mark.crash, pytest.mark.timeout(240)]

OUTLIVES_ITS_STOP = "runtime.kill"
"""Called only for a container that is still there after its stop: no task of an ordeal is."""
REACHED = tuple(point for point in POINTS if not point.startswith(OUTLIVES_ITS_STOP))
FROZEN = (
    "journal.save.after", "runtime.create.after", "runtime.start.after", "runtime.wait_exited.after",
    "store.put.after", "uplink.report.before",
)  # fmt: skip


REPEATS = int(os.environ.get("TEST_FAULT_REPEATS", "1"))
Case = tuple[str, str, int]
"""What happens, at which point, and which of the repetitions it is."""


@pytest.fixture(scope="module")
def ordeals(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    demo_image: str,
    docker_client: docker.APIClient,
) -> Iterator[dict[Hashable, Future[Ordeal]]]:
    home = tmp_path_factory.mktemp("ordeals")  # here: the factory serves one thread

    async def run(case: Case) -> Ordeal:
        action, point, number = case
        # Repeated, it happens also at the second and third time: to another task, or in another phase.
        fault = f"{action}:{1 + number % 3}"
        with own_node_id(docker_client) as node_id:
            return await go_through(home / f"{action}-{point}-{number}", node_id, point, fault, docker_client)

    with side_by_side(request, run, at_a_time=3) as ordeals:
        yield ordeals


def cases(action: str, points: Sequence[str]) -> pytest.MarkDecorator:
    chosen = [(action, point, number) for number in range(REPEATS) for point in points]
    return pytest.mark.parametrize("case", chosen, ids=[f"{point}-{number}" for _, point, number in chosen])


@cases("kill", REACHED)
def test_a_node_killed_there_loses_nothing_and_does_nothing_twice(
    case: Case, ordeals: dict[Hashable, Future[Ordeal]]
) -> None:
    ordeal = ordeals[case].result()
    assert (ordeal.broken, ordeal.double_reports) == ([], 0)
    assert ordeal.reached or case[2] % 3


@cases("fail", REACHED)
def test_a_call_that_fails_there_is_made_again(case: Case, ordeals: dict[Hashable, Future[Ordeal]]) -> None:
    ordeal = ordeals[case].result()
    assert ordeal.broken == []
    assert ordeal.double_reports <= (1 if ordeal.point == "uplink.report.after" else 0)


@cases("stop", FROZEN)
def test_a_node_frozen_there_goes_on_when_it_is_thawed(case: Case, ordeals: dict[Hashable, Future[Ordeal]]) -> None:
    ordeal = ordeals[case].result()
    assert (ordeal.broken, ordeal.double_reports) == ([], 0)
    assert ordeal.reached or case[2] % 3


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
