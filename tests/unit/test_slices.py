"""The slices of tasks, where systemd makes the cgroups: their names, and that none is made without its limits."""

from __future__ import annotations

import contextlib
import itertools
import time
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
from jeepney import HeaderFields, MessageType

from nodeservice.core.model import MIB, AttemptId, Resources, TaskSpec
from nodeservice.limits import slices
from nodeservice.limits.cgroup import KernelTaskCgroups
from nodeservice.limits.hierarchy import Mount
from nodeservice.limits.plan import CgroupLimits
from nodeservice.limits.slices import SlicePlaces, SliceTree, escape

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


class SlowSystemd(SliceTree):
    """Answers as systemd does: a stop is queued, and carried out when the caller waits, or before the next call."""

    def __init__(self, top: Path) -> None:
        self.limits: dict[str, dict[str, Any]] = {}
        """By name of the slice."""
        self._to_stop: list[str] = []
        self._directory = top
        mount = Mount(root="/", point=str(top), filesystem="cgroup2", device="cgroup2", super_options=frozenset())
        super().__init__((mount,))

    def work(self, _seconds: float = 0) -> None:
        while self._to_stop:
            unit = self._to_stop.pop()
            self.limits.pop(unit, None)
            with contextlib.suppress(FileNotFoundError):  # the service has taken the task's own away
                self._path(unit).rmdir()

    def _path(self, unit: str) -> Path:
        words = unit.removesuffix(".slice").split("-")
        return self._directory.joinpath(*(f"{'-'.join(words[:n])}.slice" for n in range(1, len(words) + 1)))

    def _call(self, method: str, signature: str, body: tuple[Any, ...], *, tolerated: tuple[str, ...] = ()) -> bool:
        self.work()
        if method == "StartTransientUnit":
            for name in self._path(body[0]).relative_to(self._directory).parts:
                self.limits.setdefault(name, {})  # what is above it comes along, without limits
            self._path(body[0]).mkdir(parents=True)
        if method in ("StartTransientUnit", "SetUnitProperties"):
            self.limits[body[0]] |= {name: value for name, (_, value) in body[2]}
        if method == "StopUnit":
            self._to_stop.append(body[0])
        return True


async def test_the_share_of_a_node_is_held_again_though_its_slice_was_just_about_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes with the last task, when systemd comes to it; the next task may be quicker."""
    systemd = SlowSystemd(tmp_path)
    monkeypatch.setattr(slices, "time", SimpleNamespace(monotonic=time.monotonic, sleep=systemd.work))
    cgroups = KernelTaskCgroups(places=SlicePlaces("n"), tree=systemd)
    await cgroups.share(Resources(cpu_milli=1500, memory_bytes=512 * MIB))
    for number in range(3):
        id_ = AttemptId(f"task{number}", 1)
        request = Resources(cpu_milli=500, memory_bytes=64 * MIB)
        task = TaskSpec(id=id_, image="nodeservice/demo", request=request, pids_limit=32, fingerprint="")
        assert await cgroups.prepare(task) == f"nodeservice-n-task{number}.1.slice"
        assert systemd.limits["nodeservice-n.slice"]["MemoryMax"] == 512 * MIB
        assert systemd.limits[f"nodeservice-n-task{number}.1.slice"]["MemoryMax"] == 64 * MIB
        await cgroups.remove(id_)
    await cgroups.close()


class Bus:
    """A connection that answers so many calls; then it raises `end`."""

    def __init__(self, answers: int, end: Exception, heard: list[str]) -> None:
        self._answers, self._end, self._heard = answers, end, heard

    def send_and_get_reply(self, message: Any, *, timeout: float) -> Any:
        assert timeout > 0
        if self._answers == 0:
            raise self._end
        self._answers -= 1
        self._heard.append(message.header.fields[HeaderFields.member])
        return SimpleNamespace(header=SimpleNamespace(message_type=MessageType.method_return))

    def close(self) -> None:
        self._answers = 0


@pytest.fixture
def made(tmp_path: Path) -> tuple[Mount]:
    """A hierarchy in which there is the slice of a task."""
    (tmp_path / "nodeservice.slice/nodeservice-n.slice/nodeservice-n-task.1.slice").mkdir(parents=True)
    return (Mount(root="/", point=str(tmp_path), filesystem="cgroup2", device="", super_options=frozenset()),)


LIMITS = CgroupLimits(memory_bytes=64 * MIB, cpu_quota_us=None, pids_max=None)
TASK = SlicePlaces("n").of_task(AttemptId("task", 1))


def test_a_bus_that_was_started_anew_keeps_no_task_from_its_slice(
    made: tuple[Mount], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    buses = [Bus(1, BrokenPipeError(), heard), Bus(2, ConnectionResetError(), heard)]
    monkeypatch.setattr(slices, "open_dbus_connection", lambda bus: buses.pop(0))
    tree = SliceTree(made)
    tree.create(TASK, LIMITS)
    assert (heard, buses) == (["GetUnitByControlGroup", "SetUnitProperties"], [])


@pytest.mark.parametrize("end", [ConnectionResetError(), TimeoutError()])
def test_a_bus_that_stays_away_is_told_after_one_more_try_and_silence_at_once(
    made: tuple[Mount], monkeypatch: pytest.MonkeyPatch, end: Exception
) -> None:
    heard: list[str] = []
    buses = [Bus(1, end, heard), Bus(0, ConnectionResetError(), heard), Bus(1, end, heard)]
    monkeypatch.setattr(slices, "open_dbus_connection", lambda bus: buses.pop(0))
    tree = SliceTree(made)
    with pytest.raises(OSError, match="can't be reached over D-Bus"):
        tree.create(TASK, LIMITS)
    assert len(buses) == (2 if isinstance(end, TimeoutError) else 1)
