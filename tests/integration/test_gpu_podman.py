"""GPUs through a real Podman: asked for natively by CDI name, with the limits that every other container gets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import docker
import pytest

from nodeservice.core.model import MIB
from nodeservice.errors import NodeFaultError, RequestError
from nodeservice.limits.process import read_process
from nodeservice.ports import ContainerSpec, ContainerState, Mount
from nodeservice.runtime.docker import DockerRuntime
from nodeservice.runtime.gpu_access import GpuWay
from nodeservice.runtime.libpod import create_natively
from tests.conftest import ROOT, remove_cgroup
from tests.integration.gpu_tasks import (
    NO_GPU,
    NO_OTHER,
    REFUSED_MKNOD,
    REFUSED_OPEN,
    A,
    B,
    C,
    log_of,
    opening,
    receipt_of,
    settled,
    stand_ins,
    started,
    task,
    write_cdi,
)
from tests.integration.podman_service import PodmanService, podman_service, require_podman

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180), pytest.mark.usefixtures("podman_alone")]

TOLD_BY_PODMAN = {
    "Config": ("StopSignal", "StopTimeout", "Labels", "Entrypoint", "Cmd", "Tty", "OpenStdin", "User"),
    "HostConfig": (
        "CpuPeriod", "CpuQuota", "CpusetCpus", "Memory", "MemorySwap", "PidsLimit", "ShmSize", "Ulimits", "SecurityOpt",
        "CapAdd", "CapDrop", "Privileged", "AutoRemove", "RestartPolicy", "NetworkMode", "LogConfig", "CgroupParent",
        "Init", "BlkioDeviceReadBps", "BlkioDeviceWriteBps", "IpcMode", "PidMode", "UTSMode", "UsernsMode", "CgroupMode",
        "ReadonlyRootfs", "ExtraHosts", "Dns", "Tmpfs", "OomScoreAdj", "OomKillDisable",
    ),
}  # fmt: skip
CGROUP_FILES = {
    "memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    "cpu": ("cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares"),
    "pids": ("pids.max",),
    "cpuset": ("cpuset.cpus",),
    "blkio": ("blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"),
    "": ("memory.max", "memory.swap.max", "cpu.max", "pids.max", "cpuset.cpus", "io.max"),
}


@pytest.fixture(scope="module")
def podman(podman_alone: None) -> Iterator[PodmanService]:
    require_podman()
    found = [path for name in ("catatonit", "docker-init", "tini") if (path := shutil.which(name))]
    with podman_service(init=found[0] if found else "/nonexistent/init") as service:
        subprocess.run(
            [sys.executable, ROOT / "tools/build_image.py"], check=True, timeout=120,
            env=os.environ | {"DOCKER_HOST": service.url},
        )  # fmt: skip
        yield service


@pytest.fixture
async def runtime(podman: PodmanService) -> AsyncIterator[DockerRuntime]:
    made = DockerRuntime(node_id="gpu-podman", base_url=podman.url)
    yield made
    for state in await made.list_owned("gpu-podman"):
        await made.remove(state.id)
    await made.close()


@pytest.fixture
def client(podman: PodmanService) -> Iterator[docker.APIClient]:
    client = docker.APIClient(podman.url, version="auto", timeout=60)
    yield client
    client.close()


# ---- both ways ----


def disk() -> tuple[Path, ...]:
    """A block device for the limits on its rates; none where the host has none."""
    return tuple(path for path in map(Path, ("/dev/vda", "/dev/sda", "/dev/nvme0n1")) if path.is_block_device())[:1]


def variants(results: Path) -> dict[str, ContainerSpec]:
    plain = task()
    return {
        "plain": plain,
        "argv": replace(plain, shell=None, argv=("sleep", "60")),
        "all": replace(
            plain, cpu_milli=250, memory_bytes=200 * MIB, pids_limit=17, open_files_limit=1000, cpu_ids=(0,),
            stop_signal="SIGUSR1", grace_seconds=7.2, cgroup_parent="/nodeservice/gpu-podman.node/t.1",
            mounts=(Mount(source=results, target="/results"), Mount(source=results, target="/seen", read_only=True)),
            read_bytes_per_second=MIB, write_bytes_per_second=2 * MIB, rate_devices=disk(), env=(("A", "b=c d"),),
        ),
    }  # fmt: skip


def enforced(client: docker.APIClient, state: ContainerState) -> dict[str, Any]:
    """All that Podman and the kernel tell of the limits of a container."""
    told = client.get(f"{client.base_url}/v4.0.0/libpod/containers/{state.id}/json").json()
    compatible = client.inspect_container(state.id)
    found: dict[str, Any] = {
        f"{part} {name}": told[part].get(name) for part, names in TOLD_BY_PODMAN.items() for name in names
    }
    found["log"] = {name: value for name, value in found.pop("HostConfig LogConfig").items() if name != "Path"}
    found["log options"] = compatible["HostConfig"]["LogConfig"]["Config"]
    found["mounts"] = [
        {name: mount[name] for name in ("Type", "Source", "Destination", "RW", "Propagation")}
        | {"o": sorted(mount["Options"])}
        for mount in sorted(told["Mounts"], key=lambda mount: str(mount["Destination"]))
    ]
    found["capabilities"] = (sorted(told["EffectiveCaps"]), sorted(told["BoundingCaps"]))
    assert state.pid is not None
    for reading in read_process(state.pid):
        if reading.limit not in ("devices", "device_rules"):
            found[f"kernel {reading.limit} {reading.source.rpartition(' ')[2][-6:]}"] = (reading.value, reading.note)
    found["limits"] = Path(f"/proc/{state.pid}/limits").read_text()
    found["namespaces"] = {
        name: os.readlink(f"/proc/{state.pid}/ns/{name}") == os.readlink(f"/proc/self/ns/{name}")
        for name in ("pid", "net", "ipc", "mnt", "uts", "user", "cgroup")
    }
    return found | {f"cgroup {name}": text for name, text in cgroup_files(state.pid)}


def cgroup_files(pid: int) -> Iterator[tuple[str, str]]:
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        for controller in controllers.split(","):
            folder = Path("/sys/fs/cgroup") / controller / place.lstrip("/")
            yield f"parent of {controller}", str(Path(place).parent)
            for name in CGROUP_FILES.get(controller, ()):
                if (folder / name).exists():
                    yield f"{controller} {name}", (folder / name).read_text()


async def remove_cgroups() -> None:
    """Podman's monitors are in them too, and end a moment after their containers."""
    async with asyncio.timeout(30):
        while found := [*Path("/sys/fs/cgroup").glob("*/nodeservice/gpu-podman.node")]:
            for parent in found:
                with contextlib.suppress(OSError):
                    remove_cgroup(parent)
            await asyncio.sleep(0.02)


def without_identity(spec: ContainerSpec, found: dict[str, Any]) -> dict[str, Any]:
    """The task's name is in its label of itself, and what a lease of GPUs adds is not a limit."""
    labels = {name: value for name, value in found["Config Labels"].items() if name != "nodeservice.spec"}
    assert found["Config Labels"]["nodeservice.spec"] == spec.labels["nodeservice.spec"]
    return found | {"Config Labels": labels}


@pytest.mark.parametrize("variant", ["plain", "argv", "all"])
async def test_a_task_with_gpus_has_the_very_limits_of_one_without(
    podman: PodmanService, runtime: DockerRuntime, client: docker.APIClient, tmp_path: Path, variant: str
) -> None:
    write_cdi(podman.cdi, **{A: stand_ins()[0]})
    compatible = variants(tmp_path)[variant]
    native = replace(variants(tmp_path)[variant], gpu_uuids=(A,))
    try:
        states = [await started(runtime, spec) for spec in (compatible, native)]
        one, other = (
            without_identity(spec, enforced(client, state))
            for spec, state in zip((compatible, native), states, strict=True)
        )
        env = [(await runtime.run_inside(state.id, ("env",), timeout_seconds=30)).splitlines() for state in states]
    finally:
        for state in await runtime.list_owned("gpu-podman"):
            await runtime.remove(state.id)
        await remove_cgroups()
    assert {name: (one[name], other[name]) for name in one if one[name] != other[name]} == {}
    assert one.keys() == other.keys()
    assert set(env[1]) - set(env[0]) == {"NVIDIA_DRIVER_CAPABILITIES=compute,utility"}
    assert other["HostConfig Memory"] == other["HostConfig MemorySwap"] == native.memory_bytes
    assert other["HostConfig PidsLimit"] == native.pids_limit
    assert other["log"]["Size"] != "0B", "Podman must bound the log"


# ---- devices ----


async def test_a_task_opens_its_own_device_and_the_kernel_refuses_every_other(
    podman: PodmanService, runtime: DockerRuntime, client: docker.APIClient
) -> None:
    first, second = stand_ins()
    gpus = write_cdi(podman.cdi, **{A: first, B: second})
    assert (await runtime.gpu_access([A, B])).way is GpuWay.CDI
    own, none, both = await asyncio.gather(
        started(runtime, task(A, shell=opening(second), NVIDIA_VISIBLE_DEVICES="all")),
        started(runtime, task(shell=opening(second), NVIDIA_VISIBLE_DEVICES="all")),
        started(runtime, task(A, B)),
    )
    # Containers that may make nodes are no task's; making one does not help them.
    raw = create_natively(
        client,
        {
            "image": "nodeservice/demo", "command": ["/bin/sh", "-c", opening(second)], "cap_add": ["MKNOD"],
            "devices": [{"path": f"nvidia.com/gpu={A}"}], "netns": {"nsmode": "none"}, "stop_timeout": 0,
            "labels": {"nodeservice.node": "gpu-podman"},
        },
    )["Id"]  # fmt: skip
    client.start(raw)
    await asyncio.gather(*(settled(runtime, id_) for id_ in (own.id, none.id, raw)))
    assert [await log_of(runtime, id_) for id_ in (own.id, none.id, raw)] == [
        ["own opened", REFUSED_MKNOD, NO_OTHER],
        [NO_GPU, REFUSED_MKNOD, NO_OTHER],
        ["own opened", "other made", REFUSED_OPEN],
    ]
    assert receipt_of(own, gpus, A).mismatches == ()
    assert receipt_of(none, gpus).mismatches == ()
    assert receipt_of(both, gpus, A, B).mismatches == ()
    assert len(receipt_of(both, gpus, A).mismatches) == 2


async def test_a_gpu_that_no_specification_lists_is_a_fault_of_the_node_and_nothing_is_made(
    podman: PodmanService, runtime: DockerRuntime
) -> None:
    write_cdi(podman.cdi, **{A: stand_ins()[0]})
    with pytest.raises(NodeFaultError, match=f"no CDI specification lists nvidia.com/gpu={C}.*nvidia-cdi-refresh"):
        await runtime.create(task(A, C))
    assert await runtime.list_owned("gpu-podman") == []


async def test_a_native_create_is_repeated_and_refused_as_every_other(
    podman: PodmanService, runtime: DockerRuntime, tmp_path: Path
) -> None:
    write_cdi(podman.cdi, **{A: stand_ins()[0]})
    spec = task(A)
    first = await runtime.create(spec)
    assert await runtime.create(spec) == first
    for changed, reason in (
        (replace(spec, labels={"nodeservice.spec": "another"}), "CREATE_FAILED"),
        (replace(task(A), image="nodeservice/nowhere:1"), "IMAGE_NOT_FOUND"),
        (replace(task(A), mounts=(Mount(source=tmp_path / "gone", target="/results"),)), "CREATE_FAILED"),
    ):
        with pytest.raises(RequestError) as caught:
            await runtime.create(changed)
        assert caught.value.reason == reason
    assert [state.id for state in await runtime.list_owned("gpu-podman")] == [first]
