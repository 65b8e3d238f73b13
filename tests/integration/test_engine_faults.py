"""An engine that loses answers and events, that others meddle with, and whose disk is full."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import docker
import psutil
import pytest

from nodeservice.core.model import Phase
from nodeservice.fault_points import VARIABLE
from nodeservice.journal.sqlite import JOURNAL_NAME, SqliteJournal
from nodeservice.limits.tree import NO_LIMIT
from tests.conftest import remove_cgroup
from tests.integration.docker_daemon import IMAGE
from tests.integration.engine_proxy import EngineProxy
from tests.integration.node_process import NodeProcess
from tests.integration.old_peer import OldClient, OldMaster
from tests.integration.test_engine_restarts import QUICK, bench

pytestmark = [pytest.mark.engine, pytest.mark.crash, pytest.mark.timeout(120)]


@pytest.fixture
def task() -> str:
    """An id that no other test on this engine has: its container is called by it."""
    return f"t-{uuid.uuid4().hex[:8]}"


@pytest.fixture
async def node(tmp_path: Path, node_id: str, demo_image: str, master: OldMaster) -> AsyncIterator[NodeProcess]:
    """Not started yet."""
    made = NodeProcess(tmp_path / "node", node_id, ("--master", f"127.0.0.1:{master.port}"), dict(QUICK))
    yield made
    if made.process is not None and made.process.returncode is None:
        await made.stop()


async def reason_of(node: NodeProcess, task_id: str) -> str:
    async with asyncio.timeout(30):
        while True:
            for event in node.events():
                if event.get("event") == "task.finished" and event["task_id"] == task_id:
                    return str(event["reason"])
            await asyncio.sleep(0.02)


async def test_a_create_whose_answer_was_lost_makes_one_container_that_runs_once(
    task: str, node: NodeProcess, proxy: EngineProxy, master: OldMaster, tmp_path: Path
) -> None:
    node.env["NODESERVICE_DOCKER_HOST"] = proxy.url
    await node.start()
    proxy.loses_next_create = True
    async with OldClient(node.address) as client:
        assert (await client.assign(task_id=task, command="echo ran >> /results/ran")).success
        assert (await master.report_of(task)).status == "success"
    assert not proxy.loses_next_create
    assert (tmp_path / f"node/results/{task}/1/ran").read_text() == "ran\n"
    assert master.count(task) == 1


async def test_an_exit_that_no_event_tells_is_found_by_the_look_at_the_list(
    task: str, node: NodeProcess, proxy: EngineProxy, master: OldMaster
) -> None:
    proxy.hides_events = True
    node.env["NODESERVICE_DOCKER_HOST"] = proxy.url
    await node.start()
    async with OldClient(node.address) as client:
        assert (await client.assign(task_id=task, command="sleep 0.5; exit 3")).success
        assert (await master.report_of(task, 20)).status == "failed"
    assert await reason_of(node, task) == "EXIT_NONZERO"


async def test_an_engine_that_cannot_be_reached_for_a_while_is_not_the_end_of_a_task_that_exits_137_by_itself(
    task: str, node: NodeProcess, proxy: EngineProxy, master: OldMaster, docker_client: docker.APIClient
) -> None:
    node.env["NODESERVICE_DOCKER_HOST"] = proxy.url
    await node.start()
    async with OldClient(node.address) as client:
        assert (await client.assign(task_id=task, command="sleep 1.5; exit 137")).success
        async with asyncio.timeout(20):
            while not docker_client.containers(filters={"name": f"nodeservice.{task}.1"}):
                await asyncio.sleep(0.02)
        await proxy.down()
        await asyncio.sleep(2)
        await proxy.up()
        assert (await master.report_of(task, 20)).status == "failed"
    assert await reason_of(node, task) == "EXIT_NONZERO"


V1 = Path("/sys/fs/cgroup")


@pytest.mark.skipif(not (V1 / "memory").is_dir() or os.geteuid() != 0, reason="needs cgroup v1 and root")
async def test_a_task_that_was_not_started_yet_when_its_host_went_down_has_its_limits_and_the_node_its_share(
    task: str, node: NodeProcess, node_id: str, proxy: EngineProxy, master: OldMaster, docker_client: docker.APIClient
) -> None:
    """A container outlives a boot, its cgroups do not; an engine makes those that are missing, without limits."""
    node.env["NODESERVICE_DOCKER_HOST"] = proxy.url
    proxy.refuses_starts = True
    await node.start()
    async with OldClient(node.address) as client:
        assert (await client.assign(task_id=task, command="sleep 600")).success
        async with asyncio.timeout(30):
            while await journalled_phase(node, task) is not Phase.STARTING:
                await asyncio.sleep(0.02)
    await node.kill()
    places = [*V1.glob(f"*/nodeservice/{node_id}.node")]
    assert places
    for place in places:
        remove_cgroup(place)
    proxy.refuses_starts = False
    await node.start()
    async with OldClient(node.address) as client:
        async with asyncio.timeout(30):
            while await journalled_phase(node, task) is not Phase.RUNNING:
                await asyncio.sleep(0.02)
        [container] = docker_client.containers(filters={"name": f"nodeservice.{task}.1"})
        of_node = V1 / f"memory/nodeservice/{node_id}.node"
        assert (of_node / f"{task}.1" / container["Id"]).is_dir()
        held = [int((place / "memory.limit_in_bytes").read_text()) for place in (of_node / f"{task}.1", of_node)]
        assert held[0] == 32 * 1024**2
        assert held[0] < held[1] < NO_LIMIT
        await client.cancel(task)
        await master.report_of(task)


async def journalled_phase(node: NodeProcess, task_id: str) -> Phase | None:
    journal = SqliteJournal(node.path / "state" / JOURNAL_NAME)
    try:
        return next((record.phase for record in await journal.load() if record.id.task_id == task_id), None)
    finally:
        await journal.close()


PHASES = {
    "runtime.start.before": ("failed", "CONTAINER_LOST"),
    "runtime.wait_exited.before": ("failed", "CONTAINER_LOST"),
    "bundles.collect.before": ("success", "COMPLETED"),
    "uplink.report.before": ("success", "COMPLETED"),
}


@pytest.mark.parametrize("point", PHASES)
async def test_a_container_that_somebody_removes_is_told_as_lost_where_its_end_is_not_known_yet(
    task: str, point: str, node: NodeProcess, master: OldMaster, docker_client: docker.APIClient
) -> None:
    node.env[VARIABLE] = f"{point}:stop"
    await node.start()
    async with OldClient(node.address) as client:
        assert (await client.assign(task_id=task, command="sleep 0.2")).success
        await frozen(node)
        docker_client.remove_container(f"nodeservice.{task}.1", force=True)
        node.thaw()
        report = await master.report_of(task, 30)
        assert (report.status, await reason_of(node, task)) == PHASES[point]
        assert (await client.assign(task_id=f"{task}-next", command="true")).success
        assert (await master.report_of(f"{task}-next", 30)).status == "success"
    assert master.count(task) == 1


async def frozen(node: NodeProcess) -> None:
    assert node.process is not None
    process = psutil.Process(node.process.pid)
    async with asyncio.timeout(20):
        while process.status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.01)


# ---- a full disk under the engine -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 96 MB, mounted for an engine's folder to lie on."""
    if os.geteuid() != 0:
        pytest.skip("a file system of the test's own needs root")
    place = Path(tempfile.mkdtemp(prefix="small-", dir="/tmp"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96m", "none", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        place.rmdir()
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)
    place.rmdir()


def fill(place: Path, *, leave_bytes: int) -> Path:
    status = os.statvfs(place)
    filler = place / "filler"
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, status.f_bavail * status.f_frsize - leave_bytes)
    return filler


async def test_a_full_disk_under_the_engine_is_a_condition_of_the_node_and_work_goes_on_once_there_is_room(
    tmp_path: Path, small_disk: Path
) -> None:
    env = {"NODESERVICE_KEEP_FREE_DISK_BYTES": str(16 * 1024**2), "NODESERVICE_RESERVE_DISK_BYTES": "0"}
    async with bench(tmp_path, home=small_disk, env=env) as on, OldClient(on.node.address) as client:
        await on.begin(holds="exec sleep 600")
        filler = fill(small_disk, leave_bytes=1024**2)
        assert (await on.ended("holds"))["holds"][:2] == ("failed", "NODE_DISK_LOW")
        refused = await client.assign(task_id="early", docker_image=IMAGE, command="true")
        assert not refused.success
        assert "keep_free_disk_bytes" in refused.message
        filler.unlink()
        async with asyncio.timeout(30):
            while not (await client.assign(task_id="later", docker_image=IMAGE, command="echo later")).success:
                await asyncio.sleep(0.2)
        assert await on.ended("later") == {"later": ("success", "COMPLETED", 0)}


async def test_a_container_that_cannot_be_made_for_lack_of_disk_is_the_nodes_fault(
    tmp_path: Path, small_disk: Path
) -> None:
    env = {"NODESERVICE_KEEP_FREE_DISK_BYTES": "0", "NODESERVICE_RESERVE_DISK_BYTES": "0"}
    async with bench(tmp_path, home=small_disk, env=env) as on, OldClient(on.node.address) as client:
        filler = fill(small_disk, leave_bytes=0)
        assert (await client.assign(task_id="early", docker_image=IMAGE, command="true", req_storage=0.0)).success
        ended = await on.ended("early")
        filler.unlink()
        await on.begin(later="sleep 0.5")
        assert await on.ended("later") == {"later": ("success", "COMPLETED", 0)}
    assert ended["early"][:2] == ("failed", "NODE_FAULT")
