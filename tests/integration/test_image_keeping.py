"""Images on a real engine and registry: what a node pulled goes when the disk is full, and what vanishes is pulled again."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import docker
import pytest

from nodeservice.core.model import PullPolicy
from nodeservice.runtime.docker import DockerRuntime
from tests.integration.engine_proxy import EngineProxy
from tests.integration.node_process import NodeProcess
from tests.integration.old_peer import OldClient, OldMaster
from tests.integration.registry import Registry, running_registry

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
BELOW_EVERY_DISK = {"NODESERVICE_IMAGE_HIGH_PERCENT": "0.001", "NODESERVICE_IMAGE_LOW_PERCENT": "0.001"}


@pytest.fixture(scope="module")
def registry(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def images(registry: Registry, docker_client: docker.APIClient, demo_image: str) -> Iterator[list[str]]:
    """Three images of this test's own, of different content, in the registry alone. Gone from the engine at the end."""
    stem = f"nodeservice/it-{uuid.uuid4().hex[:8]}"
    names = []
    for number in range(3):
        container = docker_client.create_container(demo_image, ["true"])["Id"]
        local = f"{stem}-local-{number}"
        docker_client.commit(container, local, tag="1", message=f"{stem} {number}")
        docker_client.remove_container(container)
        registry.push(docker_client, f"{local}:1", f"{stem}-{number}")
        docker_client.remove_image(f"{local}:1")
        names.append(f"{registry.address}/{stem}-{number}:1")
    yield names
    for name in [name for name in all_names(docker_client) if stem in name]:
        with contextlib.suppress(docker.errors.ImageNotFound):
            docker_client.remove_image(name, force=True)


@pytest.fixture
async def runtime(engine: str, node_id: str) -> AsyncIterator[DockerRuntime]:
    made = DockerRuntime(node_id=node_id, base_url=engine)
    yield made
    await made.close()


def all_names(client: docker.APIClient) -> set[str]:
    return {name for image in client.images() for key in ("RepoTags", "RepoDigests") for name in image[key] or ()}


def is_here(client: docker.APIClient, name: str) -> bool:
    return name in all_names(client)


async def test_only_a_pull_that_brought_an_image_says_so_and_its_removal_leaves_nothing(
    runtime: DockerRuntime, images: list[str], docker_client: docker.APIClient
) -> None:
    for policy, is_new in (
        (PullPolicy.IF_NOT_PRESENT, True),
        (PullPolicy.IF_NOT_PRESENT, False),
        (PullPolicy.ALWAYS, False),
    ):
        pulled = await runtime.pull(images[0], policy=policy)
        assert pulled.is_new == is_new
    [listed] = [image for image in await runtime.list_images() if image.image_id == pulled.image_id]
    assert (listed.tags, listed.is_used) == ((images[0],), False)
    assert listed.digests == (pulled.digest,)
    assert await runtime.remove_image(images[0])
    assert not [name for name in all_names(docker_client) if images[0].rpartition(":")[0] in name]


async def test_an_image_that_a_container_needs_is_not_removed(
    runtime: DockerRuntime, images: list[str], docker_client: docker.APIClient
) -> None:
    await runtime.pull(images[0], policy=PullPolicy.IF_NOT_PRESENT)
    container = docker_client.create_container(images[0], ["true"])["Id"]
    try:
        [listed] = [image for image in await runtime.list_images() if images[0] in image.tags]
        assert listed.is_used
        assert not await runtime.remove_image(images[0])
        assert is_here(docker_client, images[0])
    finally:
        docker_client.remove_container(container)


async def test_an_image_pulled_by_its_digest_is_listed_and_removed_by_it(
    runtime: DockerRuntime, images: list[str]
) -> None:
    digest = (await runtime.pull(images[0], policy=PullPolicy.IF_NOT_PRESENT)).digest
    await runtime.remove_image(images[0])
    pulled = await runtime.pull(digest, policy=PullPolicy.IF_NOT_PRESENT)
    assert (pulled.is_new, pulled.name) == (True, digest)
    [listed] = [image for image in await runtime.list_images() if image.image_id == pulled.image_id]
    assert (listed.tags, listed.digests) == ((), (digest,))
    assert await runtime.remove_image(digest)
    assert pulled.image_id not in {image.image_id for image in await runtime.list_images()}


async def test_a_node_frees_a_full_disk_of_the_images_that_it_pulled_and_of_no_others(
    tmp_path: Path, node_id: str, images: list[str], docker_client: docker.APIClient, master: OldMaster
) -> None:
    docker_client.pull(images[1])
    node = await NodeProcess(tmp_path / "node", node_id, ("--master", f"127.0.0.1:{master.port}")).start()
    async with OldClient(node.address) as client:
        for number, image in enumerate(images):
            task_id = f"uses-{number}-{uuid.uuid4().hex[:6]}"
            assert (await client.assign(task_id=task_id, docker_image=image, command="true")).success
            assert (await master.report_of(task_id)).status == "success"
        docker_client.tag(images[2], f"{images[2].rpartition(':')[0]}-mine", "1")
        await node.stop()
    node.env |= BELOW_EVERY_DISK
    await node.start()
    async with asyncio.timeout(30):
        while not (removed := [event for event in node.events() if event["event"] == "image.removed"]):
            await asyncio.sleep(0.05)
    await node.stop()
    assert [is_here(docker_client, image) for image in images] == [False, True, True]
    assert [event["image"] for event in removed] == [[images[0]]]


async def test_an_image_that_somebody_removes_between_pull_and_create_is_pulled_again(
    tmp_path: Path, engine: str, node_id: str, images: list[str], docker_client: docker.APIClient, master: OldMaster
) -> None:
    if not engine.startswith("unix://"):
        pytest.skip(f"the engine at {engine} has no Unix socket to put a proxy before")
    proxy = EngineProxy(tmp_path / "e.sock", engine)
    await proxy.up()
    node = NodeProcess(tmp_path / "node", node_id, ("--master", f"127.0.0.1:{master.port}"))
    node.env["NODESERVICE_DOCKER_HOST"] = proxy.url
    await node.start()
    try:
        proxy.before_next_create = lambda: docker_client.remove_image(images[0])
        async with OldClient(node.address) as client:
            task_id = f"t-{uuid.uuid4().hex[:8]}"
            assert (await client.assign(task_id=task_id, docker_image=images[0], command="echo it ran")).success
            report = await master.report_of(task_id)
    finally:
        await node.stop()
        await proxy.down()
    assert (report.status, report.logs.strip()) == ("success", "it ran")
    assert [event for event in node.events() if event["event"] == "image.vanished"]
