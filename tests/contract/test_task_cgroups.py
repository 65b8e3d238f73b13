"""The contract of TaskCgroups, over every implementation that this host can run.

The stand-in is a plain directory that offers the files of cgroup v2 and their kernel defaults; it proves our reading and
writing, not the kernel's behaviour. The kernel's own hierarchies take part where they can be written to.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from nodeservice.core.model import MIB, AttemptId, Resources, TaskSpec, Usage
from nodeservice.errors import RequestError, TransientError
from nodeservice.limits import v1
from nodeservice.limits.asked import ids_of
from nodeservice.limits.block_devices import disks_of
from nodeservice.limits.cgroup import KernelTaskCgroups, NoTaskCgroups, task_cgroups
from nodeservice.limits.hierarchy import Mount, read_mounts
from nodeservice.limits.places import DirectoryPlaces
from nodeservice.limits.plan import PIDS_OVERHEAD, CgroupLimits
from nodeservice.limits.tree import CgroupTree, online_cpus
from nodeservice.limits.v1 import V1CgroupTree
from nodeservice.limits.v2 import UnifiedCgroup, V2CgroupTree
from nodeservice.ports import EngineFacts

V2_DEFAULTS = {
    "cgroup.subtree_control": "",
    "cgroup.procs": "",
    "cpu.max": "max 100000",
    "cpu.stat": "usage_usec 0\nnr_throttled 0\nthrottled_usec 0",
    "io.max": "",
    "memory.max": "max",
    "memory.swap.max": "max",
    "memory.oom.group": "0",
    "memory.peak": "0",
    "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0",
    "pids.max": "max",
    "pids.current": "0",
    "pids.peak": "0",
    "cpuset.cpus": Path("/sys/devices/system/cpu/online").read_text(),
}
SHARE = Resources(cpu_milli=1500, memory_bytes=512 * MIB)


class UnifiedStandIn:
    """A directory that behaves like cgroup2 as far as mkdir and rmdir go."""

    def __init__(self, top: Path, controllers: str = "cpuset cpu io memory pids") -> None:
        self.top = top
        top.mkdir()
        (top / "cgroup.controllers").write_text(controllers)
        (top / "cgroup.subtree_control").write_text("")
        self.mounts = (
            Mount(root="/", point=str(top), filesystem="cgroup2", device="cgroup2", super_options=frozenset({"rw"})),
        )

    def mkdir(self, path: Path | str) -> None:
        directory = Path(path)
        directory.mkdir()
        handed_down = (directory.parent / "cgroup.subtree_control").read_text().replace("+", "")
        (directory / "cgroup.controllers").write_text(handed_down)
        for name, content in V2_DEFAULTS.items():
            if name.split(".")[0] in {"cgroup", *handed_down.split()}:
                (directory / name).write_text(content)
        if "cpuset" in handed_down.split():
            (directory / "cpuset.cpus.effective").symlink_to("cpuset.cpus")

    def rmdir(self, path: Path | str) -> None:
        directory = Path(path)
        if any(entry.is_dir() for entry in directory.iterdir()) or (directory / "cgroup.procs").read_text():
            raise OSError(errno.EBUSY, "busy")
        for entry in directory.iterdir():
            entry.unlink()
        directory.rmdir()

    def tree(self, disks: tuple[str, ...] = ()) -> V2CgroupTree:
        return V2CgroupTree(self.mounts, disks=disks, mkdir=self.mkdir, rmdir=self.rmdir)


def stand_in_tree(tmp_path: Path) -> CgroupTree:
    return UnifiedStandIn(tmp_path / "cgroup").tree()


def v1_tree(tmp_path: Path) -> CgroupTree:
    if os.geteuid() != 0:
        pytest.skip("cgroup v1: needs root")
    try:
        return V1CgroupTree(read_mounts())
    except OSError as error:
        pytest.skip(f"cgroup v1: {error}")


def v2_tree(tmp_path: Path) -> CgroupTree:
    if os.geteuid() != 0:
        pytest.skip("cgroup v2: needs root")
    top = Path("/sys/fs/cgroup/cgroup.controllers")
    if not top.exists() or "memory" not in top.read_text().split():
        pytest.skip("cgroup v2: this host has no unified hierarchy with the memory controller at /sys/fs/cgroup")
    return V2CgroupTree(read_mounts())


@pytest.fixture(params=[stand_in_tree, v1_tree, v2_tree])
async def cgroups(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[KernelTaskCgroups]:
    make: Callable[[Path], CgroupTree] = request.param
    node_id = f"test-{uuid.uuid4().hex[:12]}"
    tree = make(tmp_path)
    cgroups = KernelTaskCgroups(places=DirectoryPlaces(node_id), tree=tree)
    yield cgroups
    tree.remove(f"nodeservice/{node_id}.node")
    await cgroups.close()


def spec(
    task_id: str = "task", *, cpu_milli: int = 500, memory_bytes: int = 64 * MIB, pids_limit: int = 32
) -> TaskSpec:
    return TaskSpec(
        id=AttemptId(task_id, 1),
        image="nodeservice/demo",
        request=Resources(cpu_milli=cpu_milli, memory_bytes=memory_bytes),
        pids_limit=pids_limit,
        fingerprint="",
    )


def in_force(cgroups: KernelTaskCgroups, id_: AttemptId = AttemptId("task", 1)) -> dict[str, object]:  # noqa: B008
    """The tightest value of each limit, also of a cgroup in which nothing ran yet."""
    held: dict[str, object] = {}
    for reading in cgroups._tree.readings(cgroups._places.of_task(id_)):
        assert reading.source
        before = held.get(reading.limit)
        if before is None or (isinstance(reading.value, int) and isinstance(before, int) and reading.value < before):
            held[reading.limit] = reading.value
    return held


async def test_the_limits_read_back_are_those_asked(cgroups: KernelTaskCgroups) -> None:
    parent = await cgroups.prepare(spec())

    effective = in_force(cgroups)

    assert parent is not None
    assert parent.endswith("/task.1")
    assert effective["cpu_milli"] == 500
    assert effective["memory_bytes"] == 64 * MIB
    assert effective["memory_swap_bytes"] == 64 * MIB
    assert effective["pids_limit"] == 32 + PIDS_OVERHEAD
    assert await cgroups.readings(AttemptId("task", 1)) == [], "nothing ran in it: it limits nobody"


async def test_one_above_it_without_room_for_a_start_is_told(cgroups: KernelTaskCgroups) -> None:
    parent = await cgroups.prepare(spec(pids_limit=1))
    assert parent is not None
    assert await cgroups.crowded(AttemptId("task")) == "", "its own limit is no matter"
    tree = cgroups._tree
    top = tree._bases["pids"] / "pids" if isinstance(tree, V1CgroupTree) else tree._top  # type: ignore[attr-defined]
    node = (top / parent.lstrip("/")).parent
    (node / "pids.max").write_text("9")
    assert await cgroups.crowded(AttemptId("task")) == f"{node} has 0 of 9 processes"


async def test_preparing_again_gives_the_same_place_and_the_limits_of_the_last_call(cgroups: KernelTaskCgroups) -> None:
    first = await cgroups.prepare(spec())
    again = await cgroups.prepare(spec(memory_bytes=128 * MIB, cpu_milli=1000))

    effective = in_force(cgroups)

    assert again == first
    assert (effective["memory_bytes"], effective["memory_swap_bytes"]) == (128 * MIB, 128 * MIB)
    assert effective["cpu_milli"] == 1000


async def test_a_limit_may_also_be_lowered_again(cgroups: KernelTaskCgroups) -> None:
    await cgroups.prepare(spec(memory_bytes=128 * MIB))
    await cgroups.prepare(spec(memory_bytes=32 * MIB))

    effective = in_force(cgroups)

    assert (effective["memory_bytes"], effective["memory_swap_bytes"]) == (32 * MIB, 32 * MIB)


def cpus_of(cgroups: KernelTaskCgroups, *task_ids: str) -> list[tuple[int, ...]]:
    found = [in_force(cgroups, AttemptId(task_id, 1))["cpu_ids"] for task_id in task_ids]
    return [tuple(sorted(ids_of(str(cpus)))) for cpus in found]


def two_cpus() -> tuple[tuple[int, ...], tuple[int, ...]]:
    first, *others = online_cpus()
    if not others:
        pytest.skip("needs two CPUs")
    return (first,), tuple(others)


async def test_tasks_are_kept_off_exclusive_cpus_whether_they_came_before_or_after(cgroups: KernelTaskCgroups) -> None:
    own, others = two_cpus()
    exclusive = spec("exclusive")
    await cgroups.share(SHARE)
    await cgroups.prepare(spec("before"))
    await cgroups.share(SHARE, others, {exclusive.id: own})
    await cgroups.prepare(exclusive, own)
    await cgroups.prepare(spec("after"))
    assert cpus_of(cgroups, "before", "exclusive", "after") == [others, own, others]
    await cgroups.prepare(spec("before"))
    await cgroups.prepare(exclusive, own)
    assert cpus_of(cgroups, "before", "exclusive", "after") == [others, own, others]
    await cgroups.share(SHARE)
    await cgroups.prepare(spec("late"))
    assert cpus_of(cgroups, "before", "exclusive", "after", "late") == [online_cpus()] * 4


async def test_an_exclusive_cpu_that_is_offline_keeps_nothing_else_from_being_set(cgroups: KernelTaskCgroups) -> None:
    own, others = two_cpus()
    exclusive = spec("exclusive")
    await cgroups.share(SHARE)
    await cgroups.prepare(exclusive, own)
    await cgroups.prepare(spec("other"))
    offline = 1 + max(online_cpus())
    assert await cgroups.share(SHARE, others, {exclusive.id: (*own, offline)})
    assert cgroups.describe() is None
    assert cpus_of(cgroups, "exclusive", "other") == [own, others]


async def test_cpus_that_are_kept_out_above_are_not_told_as_in_force(tmp_path: Path) -> None:
    stand_in = UnifiedStandIn(tmp_path / "cgroup")
    cgroups = KernelTaskCgroups(places=DirectoryPlaces("n"), tree=stand_in.tree())
    await cgroups.prepare(spec(), [1])
    effective = stand_in.top / "nodeservice/n.node/task.1/cpuset.cpus.effective"
    effective.unlink()
    effective.write_text("0\n")  # as the kernel does where none of those that were written is to be had
    assert cpus_of(cgroups, "task") == [(0,)]
    await cgroups.close()


async def test_each_task_gets_the_cpus_that_it_should_have_whatever_it_had(cgroups: KernelTaskCgroups) -> None:
    """After a restart nobody here knows what was set before; a set without a CPU in common is not taken for one's own."""
    first, others = two_cpus()
    exclusive, shared = spec("exclusive"), spec("shared")
    await cgroups.prepare(exclusive)
    await cgroups.prepare(shared)
    await cgroups.share(SHARE, first, {exclusive.id: others})
    assert cpus_of(cgroups, "exclusive", "shared") == [others, first]
    await cgroups.share(SHARE, others, {exclusive.id: first})
    assert cpus_of(cgroups, "exclusive", "shared") == [first, others]


async def test_containers_move_with_their_tasks_whatever_cpus_they_had(tmp_path: Path) -> None:
    first, others = two_cpus()
    tree = v1_tree(tmp_path)
    cgroups = KernelTaskCgroups(places=DirectoryPlaces(f"test-{uuid.uuid4().hex[:12]}"), tree=tree)
    parent = await cgroups.prepare(spec())
    assert parent is not None
    container = Path(f"/sys/fs/cgroup/cpuset{parent}/container")
    (container / "inside").mkdir(parents=True)
    try:
        for cpus in (first, others, online_cpus(), first):
            await cgroups.share(SHARE, cpus)
            assert cgroups.describe() is None
            for place in (container.parent, container, container / "inside"):
                assert tuple(sorted(ids_of((place / "cpuset.cpus").read_text()))) == cpus
    finally:
        await cgroups.remove(AttemptId("task", 1))
        await cgroups.close()


async def test_what_an_engine_made_in_the_nodes_place_gets_the_share_with_the_first_task(
    cgroups: KernelTaskCgroups,
) -> None:
    node = cgroups._places.of_node()

    def memory_bytes() -> object:
        return next(found.value for found in cgroups._tree.readings(node) if found.limit == "memory_bytes")

    await cgroups.share(SHARE)
    cgroups._tree.create(f"{node}/engine", CgroupLimits(memory_bytes=None, cpu_quota_us=None, pids_max=None))
    assert memory_bytes() is None
    await cgroups.prepare(spec())
    assert memory_bytes() == SHARE.memory_bytes


HOLDS = """
import ctypes
assert ctypes.CDLL(None, use_errno=True).mlockall(3) == 0
held = bytearray(b"x") * (64 << 20)
print("holds", flush=True)
input()
"""


async def test_a_share_that_the_kernel_refuses_is_told_and_all_else_is_set(tmp_path: Path) -> None:
    """On cgroup v1 memory cannot be lowered below what is in use."""
    _, others = two_cpus()
    tree = v1_tree(tmp_path)
    cgroups = KernelTaskCgroups(places=DirectoryPlaces(f"test-{uuid.uuid4().hex[:12]}"), tree=tree)
    less = Resources(cpu_milli=700, memory_bytes=32 * MIB)
    assert await cgroups.share(SHARE)
    parent = await cgroups.prepare(spec(memory_bytes=256 * MIB))
    assert parent is not None
    node = Path(parent).parent
    memory, quota = (
        Path(f"/sys/fs/cgroup{file}")
        for file in (f"/memory{node}/memory.limit_in_bytes", f"/cpu{node}/cpu.cfs_quota_us")
    )
    script = 'echo $$ >"$1"/cgroup.procs; exec "$2" -c "$3"'
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", script, "sh", f"/sys/fs/cgroup/memory{parent}", sys.executable, HOLDS,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"holds\n"
        with capture_logs() as logs:
            assert not await cgroups.share(less, others)
            assert not await cgroups.share(less, others)
        assert [entry["log_level"] for entry in logs] == ["warning", "debug"]
        assert "share" in str(cgroups.describe())
        assert (int(memory.read_text()), int(quota.read_text())) == (SHARE.memory_bytes, 70_000)
        assert cpus_of(cgroups, "task") == [others]
        process.kill()
        await process.communicate()
        assert await cgroups.share(less, others)
        assert cgroups.describe() is None
        assert int(memory.read_text()) == less.memory_bytes
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
        await cgroups.remove(AttemptId("task", 1))
        await cgroups.close()


async def test_what_was_not_asked_is_not_limited(cgroups: KernelTaskCgroups) -> None:
    await cgroups.prepare(spec(cpu_milli=0, memory_bytes=0, pids_limit=0))

    effective = in_force(cgroups)

    assert [effective[name] for name in ("cpu_milli", "memory_bytes", "memory_swap_bytes", "pids_limit")] == [None] * 4


async def test_a_cgroup_in_which_nothing_ran_tells_no_usage(cgroups: KernelTaskCgroups) -> None:
    await cgroups.prepare(spec())

    assert await cgroups.usage(AttemptId("task", 1)) == Usage()
    assert not await cgroups.was_used(AttemptId("task", 1))
    assert not await cgroups.was_used(AttemptId("other", 1))


async def test_a_rate_that_the_kernel_holds_no_more_is_read_back_as_no_limit(tmp_path: Path) -> None:
    stand_in = UnifiedStandIn(tmp_path / "cgroup")
    cgroups = KernelTaskCgroups(places=DirectoryPlaces("node"), tree=stand_in.tree(disks=("8:0",)))
    parent = await cgroups.prepare(replace(spec(), read_bytes_per_second=MIB))
    assert parent is not None
    assert in_force(cgroups)["read_bytes_per_second"] == MIB

    (stand_in.top / parent.lstrip("/") / "io.max").write_text("8:0 rbps=max wbps=5 riops=max wiops=max\n")

    effective = in_force(cgroups)
    assert (effective["read_bytes_per_second"], effective["write_bytes_per_second"]) == (None, 5)
    await cgroups.close()


async def test_a_rate_is_refused_where_the_engine_cannot_be_told_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """On cgroup v1 it is the engine that sets it on the container, by the disk's file in /dev."""
    if os.geteuid() != 0:
        pytest.skip("cgroup v1: needs root")
    disks = disks_of([Path("/"), Path("/var/lib")])
    try:
        tree = V1CgroupTree(read_mounts(), disks=disks)
    except OSError as error:
        pytest.skip(f"cgroup v1: {error}")
    if not tree.throttles():
        pytest.skip(f"cgroup v1: no block I/O limits for the disks {disks}")
    monkeypatch.setattr(v1, "device_file", lambda _number: None)
    cgroups = KernelTaskCgroups(places=DirectoryPlaces(f"test-{uuid.uuid4().hex[:12]}"), tree=tree)
    try:
        with pytest.raises(RequestError) as caught:
            await cgroups.prepare(replace(spec(), write_bytes_per_second=MIB))
    finally:
        await cgroups.remove(spec().id)
    assert (caught.value.reason, caught.value.field) == ("LIMIT_NOT_ENFORCED", "write_bytes_per_second")
    await cgroups.close()


async def test_an_unknown_attempt_has_no_limits_and_no_usage_and_is_removed_already(cgroups: KernelTaskCgroups) -> None:
    unknown = AttemptId("never-made", 7)

    assert in_force(cgroups, unknown) == {}
    assert await cgroups.usage(unknown) == Usage()
    await cgroups.remove(unknown)


async def test_what_no_attempt_claims_is_named_and_can_be_removed(cgroups: KernelTaskCgroups) -> None:
    claimed, lost = spec("claimed"), spec("lost")
    for one in (claimed, lost):
        assert await cgroups.prepare(one) is not None
    [name] = await cgroups.unclaimed([claimed.id])
    assert await cgroups.unclaimed([claimed.id, lost.id]) == []
    assert await cgroups.remove_unclaimed(name)
    assert await cgroups.remove_unclaimed(name)
    assert await cgroups.unclaimed([]) == await cgroups.unclaimed([lost.id]) != []
    await cgroups.remove(claimed.id)
    assert await cgroups.unclaimed([]) == []


async def test_a_cgroup_that_nobody_claims_is_left_alone_while_a_process_lives_in_it(tmp_path: Path) -> None:
    tree = v1_tree(tmp_path)
    node_id = f"test-{uuid.uuid4().hex[:12]}"
    cgroups = KernelTaskCgroups(places=DirectoryPlaces(node_id), tree=tree)
    process = await asyncio.create_subprocess_exec("sleep", "600")
    try:
        await cgroups.prepare(spec("lost"))
        procs = Path(f"/sys/fs/cgroup/memory/nodeservice/{node_id}.node/lost.1/cgroup.procs")
        procs.write_text(str(process.pid))
        assert not await cgroups.remove_unclaimed("lost.1")
        assert process.returncode is None
        assert await cgroups.unclaimed([]) == ["lost.1"]
    finally:
        process.kill()
        await process.wait()
    assert await cgroups.remove_unclaimed("lost.1")
    await cgroups.close()


async def test_removing_takes_it_away_and_may_be_repeated(cgroups: KernelTaskCgroups) -> None:
    await cgroups.prepare(spec())

    await cgroups.remove(AttemptId("task", 1))
    await cgroups.remove(AttemptId("task", 1))

    assert in_force(cgroups) == {}


async def test_removing_one_task_leaves_the_other_alone(cgroups: KernelTaskCgroups) -> None:
    await cgroups.prepare(spec("other"))
    await cgroups.prepare(spec("task"))

    await cgroups.remove(AttemptId("task", 1))

    assert in_force(cgroups, AttemptId("other", 1))["memory_bytes"] == 64 * MIB


@pytest.mark.parametrize("task_id", ["../../escape", "a/b", "..", "", "x" * 5000, "a\0b", "cgroup.procs"])
async def test_a_hostile_id_stays_in_its_place(cgroups: KernelTaskCgroups, task_id: str) -> None:
    parent = await cgroups.prepare(spec(task_id))

    assert parent is not None
    assert parent.count("/") == 3
    assert ".." not in parent
    await cgroups.remove(AttemptId(task_id, 1))


def test_different_hostile_ids_get_different_places() -> None:
    places = {DirectoryPlaces("node").of_task(AttemptId(task_id)) for task_id in ("a/b", "a/c", "..", "", "a", "+a")}

    assert len(places) == 6


def test_a_container_that_ends_while_it_is_looked_at_is_not_told_to_have_no_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = UnifiedStandIn(tmp_path / "cgroup")
    tree = stand_in.tree()
    tree.create("node/task", CgroupLimits(memory_bytes=64 * MIB, cpu_quota_us=None, pids_max=40))
    container = stand_in.top / "node/task/container"
    stand_in.mkdir(container)
    (container / "pids.max").write_text("32")
    assert [found.value for found in tree.readings("node/task") if found.limit == "pids_limit"] == [40, 32]
    read = UnifiedCgroup.read

    def ends(self: UnifiedCgroup, name: str) -> object:
        if container.exists() and name == "cpu_max":
            stand_in.rmdir(container)
        return read(self, name)

    monkeypatch.setattr(UnifiedCgroup, "read", ends)
    assert [found.value for found in tree.readings("node/task") if found.limit == "pids_limit"] == [40]


async def test_the_counts_of_the_unified_hierarchy_become_usage(tmp_path: Path) -> None:
    stand_in = UnifiedStandIn(tmp_path / "cgroup")
    cgroups = KernelTaskCgroups(places=DirectoryPlaces("node"), tree=stand_in.tree())
    parent = await cgroups.prepare(spec())
    assert parent is not None
    task = stand_in.top / parent.lstrip("/")
    (task / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1000000\nnr_throttled 3\nthrottled_usec 250000\n")
    (task / "memory.peak").write_text("20971520\n")
    (task / "memory.events").write_text("low 0\nhigh 0\nmax 4\noom 2\noom_kill 1\n")
    (task / "pids.peak").write_text("5\n")

    assert await cgroups.usage(AttemptId("task", 1)) == Usage(
        memory_peak_bytes=20971520,
        cpu_seconds=1.5,
        cpu_throttled_seconds=0.25,
        pids_peak_count=5,
        oom_kill_count=1,
    )
    assert (task / "memory.swap.max").read_text() == "0"
    await cgroups.close()


async def test_what_an_older_kernel_does_not_count_is_unknown_and_not_zero(tmp_path: Path) -> None:
    stand_in = UnifiedStandIn(tmp_path / "cgroup")
    cgroups = KernelTaskCgroups(places=DirectoryPlaces("node"), tree=stand_in.tree())
    parent = await cgroups.prepare(spec())
    assert parent is not None
    task = stand_in.top / parent.lstrip("/")
    (task / "cpu.stat").write_text("usage_usec 10\n")
    (task / "memory.peak").unlink()
    (task / "pids.peak").unlink()

    usage = await cgroups.usage(AttemptId("task", 1))

    assert (usage.memory_peak_bytes, usage.pids_peak_count, usage.cpu_throttled_seconds) == (None, None, None)
    assert usage.oom_kill_count == 0
    await cgroups.close()


async def test_a_tighter_limit_of_the_container_is_the_one_in_force(tmp_path: Path) -> None:
    stand_in = UnifiedStandIn(tmp_path / "cgroup")
    cgroups = KernelTaskCgroups(places=DirectoryPlaces("node"), tree=stand_in.tree())
    parent = await cgroups.prepare(spec(pids_limit=32))
    assert parent is not None
    task = stand_in.top / parent.lstrip("/")
    (task / "cgroup.subtree_control").write_text("+pids +memory")
    stand_in.mkdir(task / "0123abcd")
    (task / "0123abcd/pids.max").write_text("32")

    effective = in_force(cgroups)

    assert effective["pids_limit"] == 32
    await cgroups.remove(AttemptId("task", 1))
    assert not (stand_in.top / "nodeservice").exists()
    await cgroups.close()


async def test_a_kernel_that_refuses_costs_the_cgroup_and_one_warning(tmp_path: Path) -> None:
    stand_in = UnifiedStandIn(tmp_path / "cgroup", controllers="hugetlb")
    cgroups = KernelTaskCgroups(places=DirectoryPlaces("node"), tree=stand_in.tree())

    with capture_logs() as logs:
        assert await cgroups.prepare(spec()) is None
        assert await cgroups.prepare(spec("other")) is None

    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["cgroup.not_prepared"]
    assert not (stand_in.top / "nodeservice").exists()
    told = {
        reading.limit: reading.note for reading in await cgroups.readings(AttemptId("task")) if not reading.readable
    }
    assert told.keys() >= {"cpu_milli", "memory_bytes", "memory_swap_bytes", "pids_limit"}
    assert all("no cgroup of its own: " in note and "controllers" in note for note in told.values()), told
    await cgroups.close()


async def test_a_read_only_hierarchy_costs_the_cgroup(tmp_path: Path) -> None:
    stand_in = UnifiedStandIn(tmp_path / "cgroup")

    def refuse(directory: Path | str) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(directory))

    cgroups = KernelTaskCgroups(
        places=DirectoryPlaces("node"), tree=V2CgroupTree(stand_in.mounts, mkdir=refuse, rmdir=refuse)
    )

    assert await cgroups.prepare(spec()) is None
    await cgroups.close()


async def test_a_cgroup_that_something_lives_in_is_an_error_to_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeservice.limits.cgroup._REMOVE_PAUSE_SECONDS", 0.001)
    stand_in = UnifiedStandIn(tmp_path / "cgroup")
    cgroups = KernelTaskCgroups(places=DirectoryPlaces("node"), tree=stand_in.tree())
    parent = await cgroups.prepare(spec())
    assert parent is not None
    task = stand_in.top / parent.lstrip("/")
    (task / "cgroup.procs").write_text("4711\n")

    with pytest.raises(TransientError, match="still holds a process") as raised:
        await cgroups.remove(AttemptId("task", 1))

    assert raised.value.reason == "CGROUP_BUSY"
    (task / "cgroup.procs").write_text("")
    await cgroups.remove(AttemptId("task", 1))
    assert not task.exists()
    await cgroups.close()


async def test_without_an_engine_or_with_a_driver_that_is_not_known_limits_sit_on_the_container_alone() -> None:
    facts = EngineFacts(
        name="docker",
        version="28",
        api_version="1.50",
        root_dir=Path("/var/lib/docker"),
        storage_driver="overlay2",
        cgroup_driver="none",
        cgroup_version=2,
        cpu_count=2,
        memory_bytes=1,
    )
    for cgroups in (task_cgroups(node_id="node", facts=None), task_cgroups(node_id="node", facts=facts)):
        assert isinstance(cgroups, NoTaskCgroups)
        assert await cgroups.prepare(spec()) is None
        assert all(reading.note for reading in await cgroups.readings(AttemptId("task", 1)))
        assert cgroups.describe()
        assert await cgroups.usage(AttemptId("task", 1)) == Usage()
        await cgroups.remove(AttemptId("task", 1))
