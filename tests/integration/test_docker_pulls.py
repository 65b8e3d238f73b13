"""Image pulls from a real registry through the real engine."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import docker
import pytest

from nodeservice.core.model import PullPolicy
from nodeservice.errors import RequestError, TransientError
from nodeservice.runtime.docker import DockerRuntime
from tests.integration.engine_proxy import EngineProxy
from tests.integration.fault_proxy import FaultProxy
from tests.integration.registry import Registry, refusing_registry, running_registry

pytestmark = pytest.mark.engine
SOON_SECONDS = 30
USER, PASSWORD = "puller", "pull-me"
HTPASSWD = f"{USER}:$2b$04$vRK43dw40b.tv9s76mBbvO4uYuDQndyt0deULKBpWgzxefx35CaYy\n"


@pytest.fixture(scope="module")
def registry(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def repository(registry: Registry, docker_client: docker.APIClient) -> Iterator[str]:
    """A repository name of this test's own; images of that name are removed from the engine at the end."""
    name = f"nodeservice/it-{uuid.uuid4().hex[:8]}"
    yield name
    for image in docker_client.images():
        for tag in [*(image.get("RepoTags") or ()), *(image.get("RepoDigests") or ())]:
            if name in tag:
                with contextlib.suppress(docker.errors.ImageNotFound):
                    docker_client.remove_image(tag, force=True)


@pytest.fixture
def proxy(registry: Registry) -> Iterator[FaultProxy]:
    made = FaultProxy(registry.address)
    yield made
    made.close()


@pytest.fixture
async def runtime(engine: str, node_id: str) -> AsyncIterator[DockerRuntime]:
    made = DockerRuntime(node_id=node_id, base_url=engine, pull_inactivity_timeout_seconds=20)
    yield made
    await made.close()


def pull_count(client: docker.APIClient, repository: str, since: float) -> int:
    """How many pulls the engine itself has counted."""
    filters = {"type": "image", "event": "pull"}
    events = client.events(since=int(since), until=int(time.time()) + 1, filters=filters, decode=True)
    return sum(repository in event["Actor"]["ID"] for event in events)


async def test_a_pulled_image_is_here_with_the_digest_of_the_registry(
    runtime: DockerRuntime, registry: Registry, docker_client: docker.APIClient, demo_image: str, repository: str
) -> None:
    digest = registry.push(docker_client, demo_image, repository)
    image = f"{registry.address}/{repository}:1"
    seen: list[tuple[int, int]] = []
    pulled = await runtime.pull(
        image, policy=PullPolicy.IF_NOT_PRESENT, on_progress=lambda done, total: seen.append((done, total))
    )
    assert pulled.digest == f"{registry.address}/{repository}@{digest}"
    assert pulled.image_id == docker_client.inspect_image(image)["Id"]
    assert all(0 <= done <= total for done, total in seen)
    by_digest = await runtime.pull(pulled.digest, policy=PullPolicy.NEVER)
    assert by_digest.digest == pulled.digest


async def test_the_policy_decides_whether_a_newer_image_of_the_same_name_is_fetched(
    runtime: DockerRuntime, registry: Registry, docker_client: docker.APIClient, demo_image: str, repository: str
) -> None:
    registry.push(docker_client, demo_image, repository)
    image = f"{registry.address}/{repository}:1"
    first = await runtime.pull(image, policy=PullPolicy.ALWAYS)
    container = docker_client.create_container(demo_image, ["true"])
    changed = f"nodeservice/it-{uuid.uuid4().hex[:8]}"
    try:
        docker_client.commit(container["Id"], changed, tag="1", message="newer")
        newer = docker_client.inspect_image(f"{changed}:1")["Id"]
        docker_client.tag(first.image_id, f"{repository}-keep", "1")
        registry.push(docker_client, f"{changed}:1", repository)
        docker_client.tag(first.image_id, f"{registry.address}/{repository}", "1")
        assert (await runtime.pull(image, policy=PullPolicy.IF_NOT_PRESENT)).image_id == first.image_id
        assert (await runtime.pull(image, policy=PullPolicy.NEVER)).image_id == first.image_id
        second = await runtime.pull(image, policy=PullPolicy.ALWAYS)
        assert second.image_id == newer
        assert second.digest != first.digest
    finally:
        docker_client.remove_container(container["Id"])
        docker_client.remove_image(f"{changed}:1", force=True)


async def test_many_waiters_for_one_image_make_one_pull(
    runtime: DockerRuntime, registry: Registry, docker_client: docker.APIClient, demo_image: str, repository: str
) -> None:
    registry.push(docker_client, demo_image, repository)
    image = f"{registry.address}/{repository}:1"
    since = time.time() - 1
    pulled = await asyncio.gather(*(runtime.pull(image, policy=PullPolicy.IF_NOT_PRESENT) for _ in range(20)))
    assert len({one.digest for one in pulled}) == 1
    assert pull_count(docker_client, repository, since) == 1


async def test_a_registry_that_falls_silent_meets_the_inactivity_limit(
    engine: str, node_id: str, proxy: FaultProxy, repository: str
) -> None:
    proxy.be_silent()
    runtime = DockerRuntime(node_id=node_id, base_url=engine, pull_inactivity_timeout_seconds=0.5)
    try:
        async with asyncio.timeout(SOON_SECONDS):
            with pytest.raises(TransientError) as caught:
                await runtime.pull(f"{proxy.endpoint}/{repository}:1", policy=PullPolicy.IF_NOT_PRESENT)
        assert caught.value.reason == "IMAGE_PULL_TIMEOUT"
        assert "nothing moved" in caught.value.message
    finally:
        await runtime.close()


async def test_the_total_limit_ends_a_pull_that_is_not_silent_long_enough(
    engine: str, node_id: str, proxy: FaultProxy, repository: str
) -> None:
    proxy.be_silent()
    runtime = DockerRuntime(node_id=node_id, base_url=engine, pull_total_timeout_seconds=0.5)
    try:
        async with asyncio.timeout(SOON_SECONDS):
            with pytest.raises(TransientError) as caught:
                await runtime.pull(f"{proxy.endpoint}/{repository}:1", policy=PullPolicy.IF_NOT_PRESENT)
        assert caught.value.reason == "IMAGE_PULL_TIMEOUT"
        assert "longer than" in caught.value.message
    finally:
        await runtime.close()


async def test_only_the_last_waiter_that_leaves_ends_the_pull(
    engine: str, node_id: str, proxy: FaultProxy, repository: str, tmp_path: Path
) -> None:
    proxy.be_silent()
    engine_proxy = EngineProxy(tmp_path / "e.sock", engine)
    await engine_proxy.up()
    runtime = DockerRuntime(node_id=node_id, base_url=engine_proxy.url)
    image = f"{proxy.endpoint}/{repository}:1"
    try:
        first, second = (asyncio.create_task(runtime.pull(image, policy=PullPolicy.IF_NOT_PRESENT)) for _ in range(2))
        async with asyncio.timeout(SOON_SECONDS):
            while not engine_proxy.open_pulls_count:
                await asyncio.sleep(0.02)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            await asyncio.sleep(0.2)
            assert engine_proxy.open_pulls_count == 1
            assert not second.done()
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            while engine_proxy.open_pulls_count:
                await asyncio.sleep(0.02)
    finally:
        await runtime.close()
        await engine_proxy.down()


async def test_a_registry_that_is_down_is_not_the_tasks_fault_and_a_later_pull_succeeds(
    runtime: DockerRuntime,
    registry: Registry,
    proxy: FaultProxy,
    docker_client: docker.APIClient,
    demo_image: str,
    repository: str,
) -> None:
    registry.push(docker_client, demo_image, repository)
    image = f"{proxy.endpoint}/{repository}:1"
    proxy.down()
    with pytest.raises(TransientError) as caught:
        await runtime.pull(image, policy=PullPolicy.IF_NOT_PRESENT)
    assert caught.value.reason == "IMAGE_PULL_FAILED"
    proxy.up()
    assert (await runtime.pull(image, policy=PullPolicy.IF_NOT_PRESENT)).digest.startswith(f"{proxy.endpoint}/")


@pytest.mark.parametrize(
    ("status", "code", "kind", "reason"),
    [
        (429, "TOOMANYREQUESTS", TransientError, "IMAGE_PULL_FAILED"),
        (500, "UNKNOWN", TransientError, "IMAGE_PULL_FAILED"),
        (503, "UNAVAILABLE", TransientError, "IMAGE_PULL_FAILED"),
        (401, "UNAUTHORIZED", RequestError, "IMAGE_ACCESS_DENIED"),
        (403, "DENIED", RequestError, "IMAGE_ACCESS_DENIED"),
    ],
)
async def test_an_answer_of_the_registry_tells_whose_move_is_next(
    runtime: DockerRuntime, status: int, code: str, kind: type[Exception], reason: str
) -> None:
    with refusing_registry(status, code) as address:
        with pytest.raises((RequestError, TransientError)) as caught:
            await runtime.pull(f"{address}/nodeservice/refused:1", policy=PullPolicy.IF_NOT_PRESENT)
        assert (type(caught.value), caught.value.reason) == (kind, reason), caught.value.message


@pytest.mark.parametrize("form", ["{:.1}", "{:.3}", "{:.11}", "sha256:{:.4}"])
async def test_a_name_of_few_hexadecimal_digits_is_not_taken_for_the_beginning_of_an_id(
    runtime: DockerRuntime, docker_client: docker.APIClient, demo_image: str, form: str
) -> None:
    digits = docker_client.inspect_image(demo_image)["Id"].removeprefix("sha256:")
    with pytest.raises(RequestError) as caught:
        await runtime.pull(form.format(digits), policy=PullPolicy.NEVER)
    assert caught.value.reason == "IMAGE_NOT_FOUND"
    assert (await runtime.pull(digits[:12], policy=PullPolicy.NEVER)).image_id == f"sha256:{digits}"


@pytest.mark.parametrize(
    "name", ["nodeservice/nobody-pushed-this:1", "nodeservice/nobody-pushed-this@sha256:" + 64 * "0"]
)
async def test_an_image_that_the_registry_does_not_have_is_not_found(
    runtime: DockerRuntime, registry: Registry, name: str
) -> None:
    with pytest.raises(RequestError) as caught:
        await runtime.pull(f"{registry.address}/{name}", policy=PullPolicy.IF_NOT_PRESENT)
    assert caught.value.reason == "IMAGE_NOT_FOUND"


async def test_credentials_come_from_the_docker_configuration_as_it_is_at_the_time_of_the_pull(
    runtime: DockerRuntime,
    docker_client: docker.APIClient,
    demo_image: str,
    repository: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with running_registry(tmp_path, htpasswd=HTPASSWD) as closed:
        login = {"username": USER, "password": PASSWORD}
        closed.push(docker_client, demo_image, repository, auth_config=login)
        image = f"{closed.address}/{repository}:1"
        with pytest.raises(RequestError) as caught:
            await runtime.pull(image, policy=PullPolicy.IF_NOT_PRESENT)
        assert caught.value.reason == "IMAGE_ACCESS_DENIED"
        (tmp_path / "config.json").write_text("{ broken")
        with pytest.raises(RequestError):
            await runtime.pull(image, policy=PullPolicy.IF_NOT_PRESENT)
        (tmp_path / "config.json").write_text("[]")
        with pytest.raises(TransientError, match="could not be read: the Docker configuration"):
            await runtime.pull(image, policy=PullPolicy.IF_NOT_PRESENT)
        auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        (tmp_path / "config.json").write_text(json.dumps({"auths": {closed.address: {"auth": auth}}}))
        assert (await runtime.pull(image, policy=PullPolicy.IF_NOT_PRESENT)).digest
