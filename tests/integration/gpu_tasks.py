"""Tasks with GPUs on real engines, where other character devices of this host stand in for GPUs."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import uuid
from pathlib import Path

import pytest

from nodeservice.core.model import MIB, AttemptId, Lease, Resources, TaskSpec
from nodeservice.limits.device_nodes import GpuNodes
from nodeservice.limits.process import read_process
from nodeservice.limits.receipt import Receipt, receipt
from nodeservice.ports import ContainerSpec, ContainerState
from nodeservice.runtime.docker import DockerRuntime

A, B, C = (f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "abc")
MIG = "MIG-dddddddd-0000-0000-0000-000000000000"
CANDIDATES = ("/dev/fuse", "/dev/hwrng", "/dev/loop-control", "/dev/cpu_dma_latency", "/dev/autofs")


def task(*gpu_uuids: str, image: str = "nodeservice/demo", shell: str = "exec sleep 60", **env: str) -> ContainerSpec:
    return ContainerSpec(
        name=f"nodeservice.gpu-{uuid.uuid4().hex[:8]}.1", image=image, argv=None, shell=shell, env=tuple(env.items()),
        labels={"nodeservice.spec": uuid.uuid4().hex}, cpu_milli=500, memory_bytes=64 * MIB, pids_limit=32, mounts=(),
        gpu_uuids=gpu_uuids, log_max_bytes=MIB, grace_seconds=1,
    )  # fmt: skip


async def started(runtime: DockerRuntime, spec: ContainerSpec) -> ContainerState:
    return await runtime.start(await runtime.create(spec))


async def log_of(runtime: DockerRuntime, container_id: str) -> list[str]:
    log = b"".join([piece async for piece in runtime.read_log(container_id, follow=False)])
    return log.decode().splitlines()


async def settled(runtime: DockerRuntime, container_id: str) -> None:
    """Until its script has come to its last command."""
    async with asyncio.timeout(30):
        while True:
            processes = (await runtime.run_inside(container_id, ("ps",), timeout_seconds=30)).splitlines()
            if any(line.endswith(" sleep 60") and "sh -c" not in line for line in processes):
                return
            await asyncio.sleep(0.02)


def stand_ins() -> list[Path]:
    """Character devices of this host that no container may open by itself; root may open two of them."""
    found = []
    for path in map(Path, CANDIDATES):
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        except OSError:
            continue
        if stat.S_ISCHR(path.stat().st_mode):
            found.append(path)
    if len(found) < 2:
        pytest.skip("this host has no two character devices that can stand in for GPUs")
    return found[:2]


def write_cdi(folder: Path, **gpus: Path) -> tuple[GpuNodes, ...]:
    """A specification in which /dev/nvidiaN of each GPU is a stand-in; the nodes as a receipt wants to know them."""
    devices = [
        {"name": name, "containerEdits": {"deviceNodes": [{"path": f"/dev/nvidia{index}", "hostPath": str(device)}]}}
        for index, (name, device) in enumerate(gpus.items())
    ]
    common = {"env": ["NVIDIA_VISIBLE_DEVICES=void"]}
    spec = {"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": devices, "containerEdits": common}
    new = folder / "nvidia.json.new"
    new.write_text(json.dumps(spec))
    new.rename(folder / "nvidia.json")
    return tuple(GpuNodes(uuid=name, node=number_of(device)) for name, device in gpus.items())


def number_of(device: Path) -> tuple[int, int]:
    status = device.stat()
    return os.major(status.st_rdev), os.minor(status.st_rdev)


def receipt_of(state: ContainerState, gpus: tuple[GpuNodes, ...], *granted: str) -> Receipt:
    spec = TaskSpec(id=AttemptId("t"), image="i", request=Resources(), pids_limit=32, fingerprint="")
    lease = Lease(granted=Resources(gpu_count=len(granted)), gpu_uuids=granted)
    assert state.pid is not None
    readings = [one for one in read_process(state.pid) if one.limit in ("devices", "device_rules")]
    return receipt(spec, lease, readings=readings, disk=None, engine={}, gpus=gpus)


def opening(device: Path) -> str:
    """A script that opens /dev/nvidia0, then tries to make and to open another GPU's node; the log tells how it went."""
    major, minor = number_of(device)
    return (
        "exec 2>&1; (: </dev/nvidia0) && echo own opened; [ -e /dev/nvidia1 ] && echo other is there;"
        f" mknod /tmp/other c {major} {minor} && echo other made; (: </tmp/other) && echo other opened; exec sleep 60"
    )


REFUSED_MKNOD = "mknod: /tmp/other: Operation not permitted"
REFUSED_OPEN = "/bin/sh: can't open /tmp/other: Operation not permitted"
NO_GPU = "/bin/sh: can't open /dev/nvidia0: no such file"
NO_OTHER = "/bin/sh: can't open /tmp/other: no such file"
