"""A master and a node with pretended GPUs, as processes: what the node tells, what the master places and refuses.

No container with a GPU is started: the tasks name an image that is not there.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import docker
import pytest

from nodeservice.testing.false_driver import FalseDriver, Machine
from tests.integration.node_process import NodeProcess
from tests.integration.scripted_node import eventually
from tests.integration.test_master_cli import Done, MasterProcess, run

pytestmark = pytest.mark.engine

NO_IMAGE = ("--pull", "never", "nodeservice/no-such-image:1")


class Cluster:
    def __init__(self, master: MasterProcess, node: NodeProcess, driver: FalseDriver) -> None:
        self.node, self.driver = node, driver
        self._at = ("--master", master.address, "--insecure")

    async def command(self, name: str, *arguments: str) -> Done:
        return await run(name, *self._at, *arguments)

    async def nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.command("nodes", "--json")).json
        return found

    async def gpus(self) -> dict[str, dict[str, Any]]:
        return {gpu["name"]: gpu for node in await self.nodes() for gpu in node["gpus"]}

    async def shown(self, task_id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.command("show", "--json", task_id)).json
        return found

    async def ended(self, task_id: str) -> dict[str, Any]:
        await self.command("wait", "--timeout", "30s", task_id)
        return await self.shown(task_id)


@pytest.fixture
async def start(
    tmp_path: Path,
    engine: str,
    docker_client: docker.APIClient,
    node_id: str,
    false_driver: Callable[[str | Machine], FalseDriver],
) -> AsyncIterator[Callable[[str], Any]]:
    """Starts both on a machine of the false driver."""
    running: list[Any] = []

    async def start_on(machine: str) -> Cluster:
        driver = false_driver(machine)
        master = await MasterProcess(tmp_path).start()
        running.append(master.end)
        env = {"DOCKER_HOST": engine, "NODESERVICE_GPU_QUARANTINE_SECONDS": "0.1", **driver.environment}
        node = NodeProcess(tmp_path / "node", node_id, ("--master", master.address), env)
        running.append(node.stop)
        await node.start()
        cluster = Cluster(master, node, driver)

        async def there() -> bool:
            return [one["state"] for one in await cluster.nodes()] == ["ACTIVE"]

        await eventually(there, seconds=60)
        return cluster

    yield start_on
    for end in reversed(running):
        await end()


async def test_a_master_knows_the_gpus_of_its_node_and_places_by_what_is_asked_of_them(
    start: Callable[[str], Any],
) -> None:
    cluster: Cluster = await start("mixed")
    gpus = await cluster.gpus()
    assert {name: (gpu["state"], gpu["compute_capability"], gpu["held_milli"]) for name, gpu in gpus.items()} == {
        "NVIDIA H200 NVL": ("WELL", "9.0", 0),
        "NVIDIA A100 80GB PCIe": ("WELL", "8.0", 0),
        "Tesla T4": ("WELL", "7.5", 0),
    }
    (node,) = await cluster.nodes()
    assert (node["gpu_driver_version"], node["cuda_version"], node["warnings"]) == ("580.95.05", "13.0", [])
    table = (await cluster.command("nodes")).out
    assert all(gpu["uuid"] in table for gpu in gpus.values())

    placed = {
        "model": ("--gpu-model", "t4"),
        "memory": ("--gpu-min-memory", "90g"),
        "capability": ("--gpus", "2", "--gpu-capability", "8.0"),
        "uuid": ("--gpu-uuid", gpus["NVIDIA A100 80GB PCIe"]["uuid"]),
    }
    for name, options in placed.items():
        assert (await cluster.command("submit", "--task-id", name, *options, *NO_IMAGE)).code == 0
    held = {name: (await cluster.ended(name))["gpu_uuids"] for name in placed}
    assert held["model"] == [gpus["Tesla T4"]["uuid"]]
    assert held["memory"] == [gpus["NVIDIA H200 NVL"]["uuid"]]
    assert set(held["capability"]) == {gpus["NVIDIA H200 NVL"]["uuid"], gpus["NVIDIA A100 80GB PCIe"]["uuid"]}
    assert held["uuid"] == [gpus["NVIDIA A100 80GB PCIe"]["uuid"]]
    assert (await cluster.shown("memory"))["request"]["gpu"]["min_memory_bytes"] == 90 * 1024**3

    for options, words in {
        ("--gpu-model", "B200"): "1 GPU (model B200) asked",
        ("--gpus", "4"): "has 3 that will do, of 3",
        ("--gpu-mig", "1g.18gb"): "MIG profile 1g.18gb",
        ("--gpus", "0.5"): "can keep no task to such a part",
    }.items():
        refused = await cluster.command("submit", "--json", *options, *NO_IMAGE)
        assert (refused.code, refused.json["reason"]) == (75, "INSUFFICIENT_GPU"), options
        assert words in refused.json["message"]


async def test_a_gpu_that_is_lost_makes_its_tasks_wait_and_one_that_came_back_takes_them(
    start: Callable[[str], Any],
) -> None:
    cluster: Cluster = await start("mixed")
    t4 = (await cluster.gpus())["Tesla T4"]["uuid"]
    cluster.driver.lose(t4)

    async def out_of_service() -> bool:
        (node,) = await cluster.nodes()
        return bool(node["allocatable"]["gpu_count"] == 2 and (await cluster.gpus())["Tesla T4"]["state"] == "FAULTY")

    await eventually(out_of_service, seconds=60)
    assert (await cluster.command("submit", "--task-id", "t", "--gpu-model", "T4", *NO_IMAGE)).code == 0

    async def waits() -> bool:
        return "out of service" in ((await cluster.shown("t"))["message"] or "")

    await eventually(waits, seconds=30)
    task = await cluster.shown("t")
    assert (task["state"], task["reason"]) == ("QUEUED", "INSUFFICIENT_GPU")
    assert t4 in task["message"]
    cluster.driver.restore(t4)
    assert (await cluster.ended("t"))["gpu_uuids"] == [t4]


async def test_a_broken_driver_is_shown_with_its_remedy_and_gpu_tasks_wait_for_it(start: Callable[[str], Any]) -> None:
    cluster: Cluster = await start("version-mismatch")
    (node,) = await cluster.nodes()
    assert any(words.startswith("GPU_DRIVER: ") and "restart the machine" in words for words in node["warnings"])
    assert "GPU_DRIVER: " in (await cluster.command("nodes")).out
    task_id = f"t-{uuid.uuid4().hex[:6]}"
    assert (await cluster.command("submit", "--task-id", task_id, "--gpus", "1", *NO_IMAGE)).code == 0

    async def waits() -> bool:
        return "GPU_DRIVER" in ((await cluster.shown(task_id))["message"] or "")

    await eventually(waits, seconds=30)
    assert (await cluster.command("submit", "--task-id", "plain", *NO_IMAGE)).code == 0
    assert (await cluster.ended("plain"))["reason"] == "IMAGE_NOT_FOUND", "tasks without GPUs are not held back"


async def test_a_part_of_a_gpu_is_given_where_the_operator_allows_parts_that_are_watched(
    start: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODESERVICE_GPU_SHARING", "watched")
    cluster: Cluster = await start("t4x4")
    for number in range(2):
        assert (await cluster.command("submit", "--task-id", f"p{number}", "--gpus", "0.5", *NO_IMAGE)).code == 0
    for number in range(2):
        task = await cluster.ended(f"p{number}")
        assert len(task["gpu_uuids"]) == 1
        assert task["gpu_part"]["method"] == "watched"
        assert task["request"]["gpu"]["share"] == {"milli": 500, "memory_bytes": None, "sm_percent": None}
