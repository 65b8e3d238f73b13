"""How the slices of tasks are called where systemd makes the cgroups."""

from __future__ import annotations

import itertools
from pathlib import PurePosixPath

import pytest

from nodeservice.core.model import AttemptId
from nodeservice.limits.slices import SlicePlaces, escape

LONGEST = "a" + "-" * 127
"""Ids of nodes and tasks have 128 characters at most; a dash takes four of a unit's 255."""


@pytest.mark.parametrize("node_id", ["node-1", "n" * 128, LONGEST])
@pytest.mark.parametrize("task_id", ["task-1", "t" * 128, LONGEST])
def test_every_node_and_task_has_a_name_that_systemd_takes(node_id: str, task_id: str) -> None:
    """A task without a slice would be held by its container alone, outside of what all tasks may have together."""
    places = SlicePlaces(node_id)
    names = PurePosixPath(places.of_task(AttemptId(task_id, 2_147_483_647))).parts
    assert max(map(len, names)) <= 255
    for above, below in itertools.pairwise(names):
        assert below.removesuffix(".slice").rpartition("-")[0] == above.removesuffix(".slice"), "a dash separates them"


def test_names_that_are_too_long_stay_apart_from_one_another_and_from_all_others() -> None:
    tasks = [AttemptId(LONGEST, 1), AttemptId(LONGEST, 2), AttemptId(LONGEST[:-1], 1)]
    names = {SlicePlaces(node).parent_for_engine(task) for node in ("n", LONGEST, LONGEST[:-1]) for task in tasks}
    assert len(names) == 9
    assert all(name.removesuffix(".slice").rpartition("-")[2].startswith("_") for name in names)


def test_a_name_that_is_short_enough_can_be_read() -> None:
    assert SlicePlaces("node-1").parent_for_engine(AttemptId("task", 1)) == "nodeservice-node\\x2d1-task.1.slice"
    assert escape("t" * 128) == "t" * 128
