"""GPUs through real Docker daemons of the tests' own, with stand-ins for NVIDIA's hook and runtime, and stand-in devices.

What is proved: every task's hook gets exactly the UUIDs of its lease, a task without GPUs reaches neither hook nor runtime
whatever its image asks for, and with CDI the kernel refuses every device but the task's own.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nodeservice.errors import NodeFaultError
from nodeservice.runtime.docker import DockerRuntime
from nodeservice.runtime.gpu_access import GpuWay
from tests.integration.docker_daemon import (
    GREEDY_IMAGE,
    IMAGE,
    DockerDaemon,
    docker_daemon,
    newer_docker,
    require_docker_daemon,
)
from tests.integration.gpu_tasks import (
    MIG,
    NO_GPU,
    NO_OTHER,
    REFUSED_MKNOD,
    REFUSED_OPEN,
    A,
    B,
    C,
    log_of,
    number_of,
    opening,
    receipt_of,
    settled,
    stand_ins,
    started,
    task,
    write_cdi,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

# Called as a prestart hook: the state of the container comes on its input, with the folder of its specification.
HOOK = """#!/bin/sh
state=$(cat)
bundle=$(printf %s "$state" | sed -n 's/.*"bundle":"\\([^"]*\\)".*/\\1/p')
cp "$bundle/config.json" HOME/seen/hook.$(basename "$bundle")
"""
# Stands where NVIDIA's runtime would: it notes each container that it is asked to make, and makes it.
RUNTIME = """#!/bin/sh
bundle= last=
for word; do [ "$last" = --bundle ] && bundle=$word; last=$word; done
case " $* " in *" create "*) cp "$bundle/config.json" "HOME/seen/runtime.$(basename "$bundle")" ;; esac
exec runc "$@"
"""
WITH_RUNTIME = {"runtimes": {"nvidia": {"path": "HOME/bin/nvidia-container-runtime"}}}


@asynccontextmanager
async def runtime_of(daemon: DockerDaemon) -> AsyncIterator[DockerRuntime]:
    made = DockerRuntime(node_id=f"gpu-{uuid.uuid4().hex[:8]}", base_url=daemon.url)
    try:
        yield made
    finally:
        await made.close()


def seen(daemon: DockerDaemon, who: str) -> dict[str, str]:
    """What hook or runtime found in NVIDIA_VISIBLE_DEVICES, by container. Of several the last counts, as for NVIDIA's."""
    found = {}
    for path in (daemon.home / "seen").glob(f"{who}.*"):
        env = dict(entry.split("=", 1) for entry in json.loads(path.read_text())["process"]["env"])
        found[path.name.removeprefix(f"{who}.")] = env["NVIDIA_VISIBLE_DEVICES"]
    return found


# ---- the hook ----


@pytest.fixture(scope="module")
def with_hook() -> Iterator[DockerDaemon]:
    require_docker_daemon()
    with docker_daemon(programs={"nvidia-container-runtime-hook": HOOK}) as daemon:
        yield daemon


async def test_each_task_is_handed_exactly_the_gpus_of_its_lease_and_without_one_the_hook_is_not_called(
    with_hook: DockerDaemon,
) -> None:
    leases = [(A,), (B, C), (MIG,), (), ()]
    specs = [
        task(*lease, image=image, NVIDIA_VISIBLE_DEVICES="all", NVIDIA_MIG_CONFIG_DEVICES="all")
        for lease in leases
        for image in (IMAGE, GREEDY_IMAGE)
    ]
    async with runtime_of(with_hook) as runtime:
        assert (await runtime.gpu_access([A])).way is GpuWay.DEVICE_REQUEST
        states = await asyncio.gather(*(started(runtime, spec) for spec in specs))
    expected = {state.id: ",".join(spec.gpu_uuids) for state, spec in zip(states, specs, strict=True) if spec.gpu_uuids}
    assert seen(with_hook, "hook") == expected


# ---- the runtime ----


@pytest.fixture(scope="module")
def with_default_runtime() -> Iterator[DockerDaemon]:
    require_docker_daemon()
    config = {**WITH_RUNTIME, "default-runtime": "nvidia"}
    with docker_daemon(programs={"nvidia-container-runtime": RUNTIME}, config=config) as daemon:
        yield daemon


async def test_under_a_default_runtime_that_hands_gpus_a_task_without_any_does_not_reach_it(
    with_default_runtime: DockerDaemon,
) -> None:
    daemon = with_default_runtime
    async with runtime_of(daemon) as runtime:
        plain, greedy = await asyncio.gather(*(started(runtime, task(image=image)) for image in (IMAGE, GREEDY_IMAGE)))
        with_gpus = await started(runtime, task(A, B, image=GREEDY_IMAGE, NVIDIA_VISIBLE_DEVICES="all"))
        env = await runtime.run_inside(greedy.id, ("env",), timeout_seconds=30)
    assert "NVIDIA_VISIBLE_DEVICES=void" in env.splitlines()
    assert seen(daemon, "runtime") == {with_gpus.id: f"{A},{B}"}
    with daemon.client() as client:
        found = {id_: client.inspect_container(id_)["HostConfig"]["Runtime"] for id_ in (plain.id, greedy.id)}
        assert set(found.values()) == {"runc"}
        # That the stand-in works: without us, an image that asks for all GPUs reaches it with just that.
        raw = client.create_container(GREEDY_IMAGE, "true", host_config=client.create_host_config(network_mode="none"))
        client.start(raw)
        assert seen(daemon, "runtime")[raw["Id"]] == "all"


async def test_doctor_proves_it_and_warns_of_the_default_runtime(
    with_default_runtime: DockerDaemon, tmp_path: Path
) -> None:
    before = seen(with_default_runtime, "runtime")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nodeservice", "doctor", "--json", "--patience", "5", "--state-dir", str(tmp_path),
        env={**os.environ, "DOCKER_HOST": with_default_runtime.url}, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    told = json.loads(out)
    (check,) = [check for check in told["checks"] if check["limit"] == "GPUs not asked for"]
    assert check["state"] == "hard", check
    assert "NVIDIA_VISIBLE_DEVICES is void" in check["evidence"]
    assert told["facts"]["default runtime"] == "nvidia"
    assert told["facts"]["GPUs are handed"].startswith("by the runtime nvidia")
    assert any("default-runtime to runc" in sentence for sentence in told["advice"])
    assert seen(with_default_runtime, "runtime") == before


async def test_an_engine_that_can_hand_none_is_a_fault_of_the_node_with_a_remedy() -> None:
    require_docker_daemon()
    with docker_daemon() as daemon:
        async with runtime_of(daemon) as runtime:
            with pytest.raises(NodeFaultError, match=r"can hand no GPU .*nvidia-container-toolkit"):
                await runtime.create(task(A))
        with daemon.client() as client:
            assert client.containers(all=True) == []


# ---- CDI ----


@pytest.fixture(scope="module")
def with_cdi() -> Iterator[DockerDaemon]:
    require_docker_daemon()
    config = {"features": {"cdi": True}, "cdi-spec-dirs": ["HOME/cdi"], **WITH_RUNTIME, "default-runtime": "nvidia"}
    programs = {"nvidia-container-runtime-hook": HOOK, "nvidia-container-runtime": RUNTIME}
    with docker_daemon(programs=programs, config=config, engine=newer_docker()) as daemon:
        yield daemon


async def test_with_cdi_a_task_opens_its_own_device_and_the_kernel_refuses_every_other(with_cdi: DockerDaemon) -> None:
    first, second = stand_ins()
    gpus = write_cdi(with_cdi.home / "cdi", **{A: first, B: second})
    async with runtime_of(with_cdi) as runtime:
        assert (await runtime.gpu_access([A, B])).way is GpuWay.CDI
        own, none, both = await asyncio.gather(
            started(runtime, task(A, image=GREEDY_IMAGE, shell=opening(second))),
            started(runtime, task(image=GREEDY_IMAGE, shell=opening(second))),
            started(runtime, task(A, B)),
        )
        # Raw containers of the engine's own may make nodes; that does not help them.
        with with_cdi.client() as client:
            raw = client.create_container(
                IMAGE, ["/bin/sh", "-c", opening(second)],
                host_config=client.create_host_config(
                    network_mode="none", runtime="runc",
                    device_requests=[{"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={A}"]}],
                ),
            )  # fmt: skip
            client.start(raw)
        receipts = [receipt_of(own, gpus, A), receipt_of(none, gpus), receipt_of(both, gpus, A, B)]
        wrong = receipt_of(both, gpus, A)
        await asyncio.gather(*(settled(runtime, state.id) for state in (own, none)), settled(runtime, raw["Id"]))
        logs = [await log_of(runtime, id_) for id_ in (own.id, none.id, raw["Id"])]
    assert logs == [
        ["own opened", REFUSED_MKNOD, NO_OTHER],
        [NO_GPU, REFUSED_MKNOD, NO_OTHER],
        ["own opened", "other made", REFUSED_OPEN],
    ]
    assert [made.mismatches for made in receipts] == [(), (), ()]
    major, minor = number_of(second)
    assert [sentence.partition(" (/proc")[0].partition(" (/sys")[0] for sentence in wrong.mismatches] == [
        f"devices: sees nvidia1 ({major}:{minor}) of {B}, which it was not granted",
        f"device_rules: may open {major}:{minor} of {B}, which it was not granted",
    ]
    assert seen(with_cdi, "hook") == seen(with_cdi, "runtime") == {}


async def test_with_a_specification_that_lacks_a_gpu_the_next_way_is_taken(with_cdi: DockerDaemon) -> None:
    write_cdi(with_cdi.home / "cdi", **{A: stand_ins()[0]})
    async with runtime_of(with_cdi) as runtime:
        for _ in range(100):  # the engine watches the folder
            access = await runtime.gpu_access([B])
            if access.way is not GpuWay.CDI:
                break
            await asyncio.sleep(0.05)
        state = await started(runtime, task(A, MIG))
    assert access.way is GpuWay.DEVICE_REQUEST
    assert B in access.passed_over[0]
    assert seen(with_cdi, "hook") == {state.id: f"{A},{MIG}"}
