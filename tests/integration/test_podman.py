"""Tasks on a real Podman behind its Docker-compatible socket: success, limits, deadline, cancel."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import pytest

from nodeservice.core.model import MIB
from nodeservice.ports import ContainerSpec, Mount
from nodeservice.runtime.docker import DockerRuntime
from tests.conftest import ROOT
from tests.integration.podman_service import PodmanService, podman_service, require_podman
from tests.integration.test_image_settings import packed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180), pytest.mark.usefixtures("podman_alone")]
NO_INIT = "/nonexistent/init"


@pytest.fixture(scope="module")
def podman(podman_alone: None) -> Iterator[PodmanService]:
    require_podman()
    found = [path for name in ("catatonit", "docker-init", "tini") if (path := shutil.which(name))]
    with podman_service(init=found[0] if found else NO_INIT) as service:
        build_images(service)
        yield service
        assert containers(service) == [], "a task leaves no container behind"


def build_images(service: PodmanService) -> None:
    command = [sys.executable, ROOT / "tools" / "build_image.py"]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"DOCKER_HOST": service.url})


def containers(service: PodmanService) -> list[Any]:
    client = docker.APIClient(service.url, version="auto", timeout=60)
    try:
        return list(client.containers(all=True))
    finally:
        client.close()


async def nodeservice(service: PodmanService, home: Path, *arguments: str) -> asyncio.subprocess.Process:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NODESERVICE_")}
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nodeservice", *arguments,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=kept | {"DOCKER_HOST": service.url, "XDG_STATE_HOME": str(home)},
    )  # fmt: skip


async def run(service: PodmanService, home: Path, *arguments: str) -> tuple[int | None, dict[str, Any], str]:
    """Exit code, the object on stdout, and what was said on stderr."""
    limits = ("--cpus", "0.5", "--memory", "64m")
    process = await nodeservice(service, home, "run", "--json", *limits, *arguments)
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert out, err.decode()
    return process.returncode, json.loads(out), err.decode(errors="replace")


async def test_a_task_succeeds_with_its_limits_its_whole_log_and_its_results(
    podman: PodmanService, tmp_path: Path
) -> None:
    shell = "seq 1 100000; printf '\\377\\0end'; echo hi > /results/a.txt"
    code, said, _ = await run(podman, tmp_path, "--timeout", "60s", "nodeservice/demo", "--", "sh", "-c", shell)

    assert (code, said["outcome"], said["reason"], said["exit_code"]) == (0, "SUCCEEDED", "COMPLETED", 0)
    log = b"".join(b"%d\n" % number for number in range(1, 100_001)) + b"\xff\0end"
    stored = {entry["path"]: entry["sha256"] for entry in said["manifest"]["files"]}
    assert stored == {"a.txt": hashlib.sha256(b"hi\n").hexdigest(), "stdout.log": hashlib.sha256(log).hexdigest()}
    assert said["limits"]["mismatches"] == []
    assert said["limits"]["effective"]["memory_bytes"] == 64 * 2**20
    assert said["limits"]["effective"]["cpu_milli"] == 500


async def test_a_task_past_its_memory_is_told_so(podman: PodmanService, tmp_path: Path) -> None:
    code, said, _ = await run(podman, tmp_path, "--memory", "24m", "nodeservice/demo", "--", "tail", "/dev/zero")

    assert (code, said["outcome"], said["reason"]) == (137, "FAILED", "MEMORY_LIMIT")


async def test_a_task_past_its_time_is_stopped_and_keeps_its_log(podman: PodmanService, tmp_path: Path) -> None:
    shell = "echo begun; trap '' TERM; while :; do sleep 0.1; done"
    options = ("--timeout", "1s", "--grace", "1s")
    code, said, err = await run(podman, tmp_path, *options, "nodeservice/demo", "--", "sh", "-c", shell)

    assert (code, said["outcome"], said["reason"]) == (124, "FAILED", "DEADLINE")
    assert [entry["path"] for entry in said["manifest"]["files"]] == ["stdout.log"]
    assert "begun" in err.splitlines()


async def test_a_task_is_cancelled_from_the_keyboard(podman: PodmanService, tmp_path: Path) -> None:
    command = ("nodeservice/demo", "--", "sh", "-c", "echo begun; exec sleep 300")
    process = await nodeservice(podman, tmp_path, "run", "--json", "--memory", "64m", *command)
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(60):
        while await process.stderr.readline() != b"begun\n":
            assert not process.stderr.at_eof()
        process.send_signal(signal.SIGINT)
        out, _ = await process.communicate()
    said = json.loads(out)
    assert (process.returncode, said["outcome"], said["reason"]) == (130, "CANCELLED", "CANCELLED")


async def test_a_command_that_is_not_there_and_an_image_that_is_not_there_have_their_reasons(
    podman: PodmanService, tmp_path: Path
) -> None:
    code, said, _ = await run(podman, tmp_path, "nodeservice/demo", "--", "/no/such/program")
    assert (code, said["reason"]) == (127, "COMMAND_NOT_FOUND")
    code, said, _ = await run(podman, tmp_path, "--pull", "never", "nodeservice/nowhere", "--", "true")
    assert (code, said["reason"]) == (65, "IMAGE_NOT_FOUND")


async def test_images_are_listed_and_removed_by_name_and_one_in_use_stays(podman: PodmanService) -> None:
    runtime = DockerRuntime(node_id="images", base_url=podman.url)
    client = docker.APIClient(podman.url, version="auto", timeout=60)
    try:
        made = client.create_container("nodeservice/demo", ["true"])
        client.commit(made["Id"], "localhost/nodeservice/own", tag="1")
        client.remove_container(made["Id"])
        user = client.create_container("localhost/nodeservice/own:1", ["true"])
        [image] = [image for image in await runtime.list_images() if "localhost/nodeservice/own:1" in image.tags]
        assert (image.is_used, image.size_bytes > 0) == (True, True)
        assert not await runtime.remove_image(image.tags[0])
        client.remove_container(user["Id"])
        assert await runtime.remove_image(image.tags[0])
        assert image.image_id not in {left.image_id for left in await runtime.list_images()}
        assert await runtime.remove_image(image.tags[0])
    finally:
        client.close()
        await runtime.close()


async def test_a_volume_that_meets_the_results_by_way_of_a_link_hides_none(
    podman: PodmanService, tmp_path: Path
) -> None:
    """Podman does not tell of a link that a mount lies over. The image was pulled by another process."""
    runtime = DockerRuntime(node_id="links", base_url=podman.url)
    client = docker.APIClient(podman.url, version="auto", timeout=60)
    try:
        made = client.create_container("nodeservice/demo", ["true"])
        client.put_archive(made["Id"], "/", packed("results", b"", link_to="/data"))
        client.commit(made["Id"], "localhost/nodeservice/links", tag="1", changes=["VOLUME /data/sub"])
        client.remove_container(made["Id"])
        task = replace(
            spec(), name="nodeservice.links.1", image="localhost/nodeservice/links:1",
            argv=("sh", "-c", "mkdir -p /results/sub; echo it ran > /results/sub/a.txt"),
            mounts=(Mount(source=tmp_path, target="/results"),),
        )  # fmt: skip
        container_id = await runtime.create(task)
        await runtime.start(container_id)
        await runtime.wait_exited(container_id)
        await runtime.remove(container_id)
        client.remove_image(task.image)
    finally:
        client.close()
        await runtime.close()
    assert (tmp_path / "sub/a.txt").read_text() == "it ran\n"


async def test_inspect_names_the_engine(podman: PodmanService, tmp_path: Path) -> None:
    process = await nodeservice(podman, tmp_path, "inspect", "--json", "--state-dir", str(tmp_path))
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    engine = json.loads(out)["engine"]
    assert engine["name"] == "podman"


async def test_without_an_init_program_tasks_run_without_one_and_that_is_told(tmp_path: Path) -> None:
    require_podman()
    with podman_service(init=NO_INIT) as service:
        build_images(service)
        runtime = DockerRuntime(node_id="no-init", base_url=service.url)
        try:
            container_id = await runtime.create(spec())
            assert "catatonit is missing" in " ".join(runtime.degraded)
            await runtime.start(container_id)
            async with asyncio.timeout(60):
                assert [piece async for piece in runtime.read_log(container_id, follow=True)] == [b"hello\n"]
            await runtime.facts()
            assert "catatonit is missing" in " ".join(runtime.degraded), "asking the engine again is no news of it"
        finally:
            await runtime.close()


def spec() -> ContainerSpec:
    return ContainerSpec(
        name="nodeservice.no-init.1", image="nodeservice/demo", argv=("echo", "hello"), shell=None, env=(), labels={},
        cpu_milli=500, memory_bytes=64 * MIB, pids_limit=64, mounts=(), gpu_uuids=(), log_max_bytes=MIB, grace_seconds=1,
    )  # fmt: skip
