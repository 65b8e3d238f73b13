"""The task's own cgroup under a container of the real engine: limits in force, counts that outlive it, nothing left."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import pytest

from nodeservice.core.model import MIB, AttemptId, Lease, Resources, TaskSpec
from nodeservice.limits.asked import ids_of
from nodeservice.limits.cgroup import KernelTaskCgroups, NoTaskCgroups, task_cgroups
from nodeservice.limits.hierarchy import host_cgroup_version, read_mounts
from nodeservice.limits.places import DirectoryPlaces
from nodeservice.limits.plan import HOST_WORK_WEIGHT
from nodeservice.limits.receipt import receipt
from nodeservice.limits.tree import online_cpus
from nodeservice.limits.v1 import V1CgroupTree
from nodeservice.ports import EngineFacts, TaskCgroups

pytestmark = pytest.mark.engine

TASK = AttemptId("cgroup-test", 1)
UNIFIED = host_cgroup_version() == 2


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    try:
        client = docker.from_env(timeout=60)
        client.ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"no container engine answers: {error}")
    yield client
    client.close()


@pytest.fixture(scope="module")
def image(engine: docker.DockerClient) -> Iterator[str]:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox-static is not installed: no image can be built")
    tag = f"nodeservice/cgroup-test:{uuid.uuid4().hex[:8]}"
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(os.path.realpath(busybox), arcname="bin/busybox")
        for name in ("sh", "head", "tail", "sleep"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    engine.api.import_image_from_data(
        archive.getvalue(), repository=tag.split(":", maxsplit=1)[0], tag=tag.split(":")[1]
    )
    yield tag
    engine.images.remove(tag, force=True)


@pytest.fixture
async def cgroups(engine: docker.DockerClient) -> AsyncIterator[TaskCgroups]:
    info = engine.info()
    facts = EngineFacts(
        name="docker",
        version=info["ServerVersion"],
        api_version=engine.api.api_version,
        root_dir=Path(info["DockerRootDir"]),
        storage_driver=info["Driver"],
        cgroup_driver=info["CgroupDriver"],
        cgroup_version=int(info.get("CgroupVersion", "1")),
        cpu_count=info["NCPU"],
        memory_bytes=info["MemTotal"],
    )
    cgroups = task_cgroups(node_id=f"test-{uuid.uuid4().hex[:12]}", facts=facts)
    if isinstance(cgroups, NoTaskCgroups):
        pytest.skip(f"a cgroup of the task's own can't be had with the cgroup driver {facts.cgroup_driver}")
    assert isinstance(cgroups, KernelTaskCgroups)
    yield cgroups
    await cgroups.remove(TASK)
    await cgroups.close()


def spec(*, memory_bytes: int = 64 * MIB, cpu_milli: int = 500) -> TaskSpec:
    return TaskSpec(
        id=TASK,
        image="nodeservice/cgroup-test",
        request=Resources(cpu_milli=cpu_milli, memory_bytes=memory_bytes),
        pids_limit=32,
        fingerprint="",
    )


class Container:
    """A container of the engine under a given cgroup, with the limits of the spec, removed at the end."""

    def __init__(
        self,
        engine: docker.DockerClient,
        image: str,
        parent: str | None,
        task: TaskSpec,
        script: str,
        **rates: list[dict[str, object]],
    ) -> None:
        self._inner: Any = engine.containers.create(
            image,
            ["/bin/sh", "-c", script],
            cgroup_parent=parent,
            mem_limit=task.request.memory_bytes,
            memswap_limit=task.request.memory_bytes,
            nano_cpus=task.request.cpu_milli * 1_000_000,
            pids_limit=task.pids_limit,
            network_mode="none",
            init=True,
            **rates,
        )

    def __enter__(self) -> Container:
        self._inner.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._inner.remove(force=True)

    def wait(self) -> int:
        return int(self._inner.wait(timeout=60)["StatusCode"])

    def wait_for_line(self, line: bytes) -> None:
        assert any(line in piece for piece in self._inner.logs(stream=True, follow=True))

    def own_cgroups(self) -> str:
        return self._told("cgroup")

    def cpu_ids(self) -> tuple[int, ...]:
        status = dict(line.split(":", 1) for line in self._told("status").splitlines())
        return tuple(sorted(ids_of(status["Cpus_allowed_list"])))

    def _told(self, file: str) -> str:
        self._inner.reload()
        return Path(f"/proc/{self._inner.attrs['State']['Pid']}/{file}").read_text()


def places_of(parent: str) -> list[Path]:
    """The task's cgroup in each hierarchy. The engine is told a path, or the name of a slice, which lies in others."""
    tops = {Path(mount.point) for mount in read_mounts() if mount.filesystem in ("cgroup", "cgroup2")}
    if parent.startswith("/"):
        return [place for top in tops if (place := top / parent.lstrip("/")).exists()]
    return [place for top in tops for place in top.glob(f"**/{parent}")]


def places_left(parent: str) -> list[Path]:
    """The task's and the node's."""
    above = str(Path(parent).parent) if parent.startswith("/") else f"{parent.rpartition('-')[0]}.slice"
    return [*places_of(parent), *places_of(above)]


async def test_the_container_sits_in_the_tasks_cgroup_with_the_limits_that_were_asked(
    engine: docker.DockerClient, image: str, cgroups: TaskCgroups
) -> None:
    task = spec()
    parent = await cgroups.prepare(task)
    assert parent is not None

    with Container(engine, image, parent, task, "sleep 60") as container:
        memberships = container.own_cgroups().splitlines()
        assert all(line.split(":", 2)[2].startswith(f"{parent}/") or f"/{parent}/" in line for line in memberships), (
            memberships
        )
        readings = await cgroups.readings(TASK)

    written = receipt(task, Lease(granted=task.request), readings=readings, disk=None, engine={})
    assert written.mismatches == ()
    held = ("cpu_milli", "memory_bytes", "memory_swap_bytes", "pids_limit")
    assert {name: written.effective[name] for name in held} == {name: written.asked[name] for name in held}
    assert all(written.read_from[name].startswith("/sys/fs/cgroup") for name in held)


@pytest.mark.parametrize("given", [True, False])
async def test_a_rate_that_the_engine_left_out_is_read_back_as_broken(
    engine: docker.DockerClient, image: str, cgroups: TaskCgroups, given: bool
) -> None:
    devices = cgroups.rate_devices()
    if not devices:
        pytest.skip("block I/O is limited by the engine only on cgroup v1")
    task = replace(spec(), read_bytes_per_second=5 * MIB, write_bytes_per_second=6 * MIB)
    parent = await cgroups.prepare(task)
    rates: dict[str, list[dict[str, object]]] = {
        f"device_{name}_bps": [{"Path": str(device), "Rate": rate} for device in devices]
        for name, rate in (("read", 5 * MIB), ("write", 6 * MIB))
        if given
    }

    with Container(engine, image, parent, task, "sleep 60", **rates):
        readings = await cgroups.readings(TASK)

    written = receipt(task, Lease(granted=task.request), readings=readings, disk=None, engine={})
    broken = [] if given else ["read_bytes_per_second", "write_bytes_per_second"]
    assert [words.partition(":")[0] for words in written.mismatches] == broken


async def test_the_peak_stays_readable_after_the_container_and_nothing_is_left_after_removal(
    engine: docker.DockerClient, image: str, cgroups: TaskCgroups
) -> None:
    task = spec()
    parent = await cgroups.prepare(task)
    assert parent is not None
    with Container(
        engine, image, parent, task, "head -c 20000000 /dev/zero | tail -c 20000000 >/dev/null"
    ) as container:
        assert container.wait() == 0

    assert await cgroups.was_used(TASK)
    usage = await cgroups.usage(TASK)
    await cgroups.remove(TASK)

    assert usage.memory_peak_bytes is not None
    assert 19 * MIB <= usage.memory_peak_bytes <= 64 * MIB
    assert usage.cpu_seconds is not None
    assert 0 < usage.cpu_seconds < 60
    assert usage.oom_kill_count == 0
    assert usage.pids_peak_count is None or 3 <= usage.pids_peak_count <= 40
    assert places_left(parent) == []


async def test_cpu_is_shared_in_proportion_to_what_was_promised(cgroups: TaskCgroups) -> None:
    """Else eight loops on a tenth of a core weigh as much as a neighbour with a whole one, wherever the host is busy."""
    await cgroups.share(Resources(cpu_milli=1800, memory_bytes=512 * MIB))
    parent = await cgroups.prepare(spec(cpu_milli=500))
    assert parent is not None
    (task,) = [place for place in places_of(parent) if weights_of(place)]
    core = {"cpu.shares": 1024, "cpu.weight": 100}
    ((name, weight),) = weights_of(task).items()
    assert weight == core[name] // 2
    assert weights_of(task.parent) == {name: int(core[name] * 1.8)}
    assert weights_of(task.parent.parent) == {name: core[name] * (os.cpu_count() or 1) * HOST_WORK_WEIGHT}


async def test_containers_keep_off_exclusive_cpus_whether_they_came_before_or_after(
    engine: docker.DockerClient, image: str, cgroups: TaskCgroups
) -> None:
    first, *others = online_cpus()
    if not others:
        pytest.skip("needs two CPUs")
    share, late = Resources(cpu_milli=1800, memory_bytes=512 * MIB), replace(spec(), id=AttemptId("cgroup-test", 2))
    await cgroups.share(share)
    try:
        with Container(engine, image, await cgroups.prepare(spec()), spec(), "sleep 60") as before:
            assert before.cpu_ids() == online_cpus()
            await cgroups.share(share, others, {AttemptId("exclusive"): (first,)})
            with Container(engine, image, await cgroups.prepare(late), late, "sleep 60") as after:
                assert [before.cpu_ids(), after.cpu_ids()] == [tuple(others)] * 2
                await cgroups.share(share, (first,), {AttemptId("exclusive"): others})
                assert [before.cpu_ids(), after.cpu_ids()] == [(first,)] * 2
                await cgroups.share(share)
                assert [before.cpu_ids(), after.cpu_ids()] == [online_cpus()] * 2
    finally:
        await cgroups.remove(late.id)


def weights_of(place: Path) -> dict[str, int]:
    files = (place / "cpu.shares", place / "cpu.weight")
    return {file.name: int(file.read_text()) for file in files if file.exists()}


async def test_a_busy_task_is_seen_to_be_throttled(
    engine: docker.DockerClient, image: str, cgroups: TaskCgroups
) -> None:
    task = spec(cpu_milli=100)
    parent = await cgroups.prepare(task)
    with Container(engine, image, parent, task, "i=0; while [ $i -lt 40000 ]; do i=$((i+1)); done") as container:
        assert await cgroups.usage(TASK) is None  # not while it still counts
        assert container.wait() == 0

    usage = await cgroups.usage(TASK)

    assert usage.cpu_throttled_seconds is not None
    assert usage.cpu_throttled_seconds > 0


@pytest.mark.skipif(UNIFIED, reason="cgroup v1 alone loses what was counted below")
async def test_what_was_moved_is_told_as_last_seen_and_never_as_nothing(
    engine: docker.DockerClient, image: str, cgroups: TaskCgroups
) -> None:
    parent = await cgroups.prepare(spec())
    write = "/bin/busybox dd if=/dev/zero of=/file bs=1048576 count=4 conv=fsync && echo written && sleep 600"
    with Container(engine, image, parent, spec(), write) as container:
        await cgroups.look_after(TASK)
        container.wait_for_line(b"written")
        await cgroups.look_after(TASK)
    seen = await cgroups.usage(TASK)
    assert seen is not None
    assert seen.written_bytes is not None
    assert seen.written_bytes >= 4 * MIB

    await cgroups.remove(TASK)
    parent = await cgroups.prepare(spec())
    with Container(engine, image, parent, spec(), write) as container:
        container.wait_for_line(b"written")
        await cgroups.look_after(TASK)
    unseen = await cgroups.usage(TASK)
    assert unseen is not None
    assert (unseen.read_bytes, unseen.written_bytes) == (None, None)


async def test_a_child_killed_for_memory_is_counted_though_the_container_exits_0(
    engine: docker.DockerClient, image: str, cgroups: TaskCgroups
) -> None:
    task = spec(memory_bytes=16 * MIB)
    parent = await cgroups.prepare(task)
    hog = "(echo 1000 >/proc/self/oom_score_adj; head -c 100000000 /dev/zero | tail -c 100000000 >/dev/null); exit 0"
    with Container(engine, image, parent, task, hog) as container:
        assert container.wait() == 0

    usage = await cgroups.usage(TASK)

    assert usage.oom_kill_count is not None
    assert usage.oom_kill_count >= 1
    assert usage.memory_peak_bytes is not None
    assert 15 * MIB <= usage.memory_peak_bytes <= 16 * MIB


@pytest.mark.skipif(UNIFIED, reason="cgroup v1 alone does not count by itself")
@pytest.mark.skipif(not os.access("/dev/kmsg", os.R_OK), reason="the kernel's log can't be read")
async def test_a_kill_that_nobody_watched_is_counted_all_the_same(
    engine: docker.DockerClient, image: str, cgroups: TaskCgroups
) -> None:
    task = spec(memory_bytes=16 * MIB)
    parent = await cgroups.prepare(task)
    assert parent is not None
    hog = "head -c 100000000 /dev/zero | tail -c 100000000 >/dev/null; exit 0"
    with Container(engine, image, parent, task, hog) as container:
        container.wait()  # with 0, or 137 where the kernel chose the shell
    places = DirectoryPlaces(Path(parent).parent.name.removesuffix(".node"))
    later = KernelTaskCgroups(places=places, tree=V1CgroupTree(read_mounts()))

    usage = await later.usage(TASK)

    await later.close()
    assert usage is not None
    assert usage.oom_kill_count is not None
    assert usage.oom_kill_count >= 1


async def test_what_the_engine_left_below_goes_too(
    engine: docker.DockerClient, image: str, cgroups: TaskCgroups
) -> None:
    parent = await cgroups.prepare(spec())
    assert parent is not None
    places = places_of(parent)
    assert places
    for place in places:
        (place / "left/behind").mkdir(parents=True, exist_ok=True)

    await cgroups.remove(TASK)

    assert places_left(parent) == []
