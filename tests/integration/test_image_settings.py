"""What an image says of itself neither adds to a task nor takes from it."""

from __future__ import annotations

import contextlib
import io
import tarfile
import uuid
from collections.abc import Callable, Iterator

import docker
import pytest

from nodeservice.core.model import AttemptId
from nodeservice.ports import labels
from nodeservice.runtime.docker import DockerRuntime
from tests.integration.attack_bench import PATIENCE_SECONDS, Bench, nothing_left

pytestmark = [pytest.mark.engine, pytest.mark.timeout(5 * PATIENCE_SECONDS), pytest.mark.unseen]
Make = Callable[..., str]


@pytest.fixture
def make(docker_client: docker.APIClient, demo_image: str) -> Iterator[Make]:
    """Makes an image from the demo's with lines as in a Dockerfile; gone at the end."""
    made = []

    def image(*lines: str, shell: bytes = b"", link: tuple[str, str] | None = None) -> str:
        container = docker_client.create_container(demo_image, ["true"])["Id"]
        if shell:
            assert docker_client.put_archive(container, "/bin", packed("sh", shell))
        if link:
            assert docker_client.put_archive(container, "/", packed(link[0], b"", link_to=link[1]))
        name = f"nodeservice/it-{uuid.uuid4().hex[:8]}"
        docker_client.commit(container, name, tag="1", changes=list(lines))
        docker_client.remove_container(container)
        made.append(f"{name}:1")
        return made[-1]

    yield image
    for name in made:
        with contextlib.suppress(docker.errors.ImageNotFound):
            docker_client.remove_image(name, force=True)


def packed(name: str, program: bytes, *, link_to: str = "") -> bytes:
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(program), 0o755
            if link_to:
                entry.type, entry.linkname = tarfile.SYMTYPE, link_to
            archive.addfile(entry, io.BytesIO(program))
        return buffer.getvalue()


@pytest.mark.parametrize("place", ["/results/data", "/output/", "/output/a/b"])
async def test_a_volume_that_an_image_declares_hides_no_results(
    bench: Bench, docker_client: docker.APIClient, make: Make, place: str
) -> None:
    result = await bench.run(
        f"sleep 1; mkdir -p {place}; echo it ran > {place}/a.txt", docker_image=make(f"VOLUME {place}")
    )
    if place == "/output/":
        assert result.reason == "COMPLETED"
        assert "a.txt" in [path.name for path in bench.node.path.glob(f"results/{result.task_id}/1/*")]
    else:
        assert (result.reason, result.retryable) == ("CREATE_FAILED", False)
        assert place in result.message
    await nothing_left(docker_client, bench.node)


@pytest.mark.parametrize(
    ("link", "volume", "is_refused"),
    [
        (("results", "/data"), "/data", True),
        (("results", "/data"), "/data/sub", True),
        (("output", "../data/sub"), "/data", True),
        (("data", "/results"), "/data/sub", True),
        (("results", "/data"), "/database", False),
        (("results", "/data"), "/results", False),
    ],
)
async def test_a_volume_that_meets_the_results_by_way_of_a_link_hides_none(
    bench: Bench,
    docker_client: docker.APIClient,
    make: Make,
    link: tuple[str, str],
    volume: str,
    is_refused: bool,
) -> None:
    """However short the task is."""
    image = make(f"VOLUME {volume}", link=link)
    result = await bench.run("mkdir -p /results/sub; echo it ran > /results/sub/a.txt", docker_image=image)
    if is_refused:
        assert (result.reason, result.retryable) == ("CREATE_FAILED", False)
        assert volume in result.message
    else:
        assert (result.reason, set(result.output_files)) == ("COMPLETED", {"stdout.log", "sub/a.txt"})
    await nothing_left(docker_client, bench.node)


async def test_what_somebody_runs_from_an_image_of_a_tasks_container_is_not_taken_for_ours(
    engine: str, node_id: str, docker_client: docker.APIClient, make: Make
) -> None:
    """Such an image has the container's labels (docker commit)."""
    image = make(f"LABEL {labels.NODE}={node_id} {labels.TASK_ID}=gone {labels.ATTEMPT}=1")
    ours = docker_client.create_container(image, ["true"], name=labels.container_name(AttemptId(node_id)))["Id"]
    theirs = docker_client.create_container(image, ["true"])["Id"]
    runtime = DockerRuntime(node_id=node_id, base_url=engine)
    try:
        assert [state.id for state in await runtime.list_owned(node_id)] == [ours]
    finally:
        await runtime.close()
        for container in (ours, theirs):
            docker_client.remove_container(container)


async def test_a_program_that_the_machine_cannot_execute_has_not_run(
    bench: Bench, docker_client: docker.APIClient, make: Make
) -> None:
    result = await bench.run("true", docker_image=make(shell=b"\x7fELF for another processor"))
    assert (result.reason, result.retryable) == ("COMMAND_NOT_FOUND", False)
    assert "Exec format error" in result.message
    await nothing_left(docker_client, bench.node)


async def test_the_health_check_of_an_image_does_not_run_beside_the_task(
    bench: Bench, docker_client: docker.APIClient, make: Make
) -> None:
    image = make("HEALTHCHECK --interval=1ms CMD echo checked >> /results/checked")
    task_id = await bench.assign("sleep 1; test ! -e /results/checked", docker_image=image)
    result = await bench.end_of(task_id)
    assert (result.reason, result.exit_code) == ("COMPLETED", 0)
    await nothing_left(docker_client, bench.node)
