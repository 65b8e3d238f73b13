"""Turns a ContainerSpec into the body of the engine's create call; pure but for one check."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nodeservice.core.model import MIB
from nodeservice.errors import NodeFaultError, RequestError
from nodeservice.limits.asked import CORE_FILE_BYTES, DROPPED_CAPABILITIES, ids_text, shm_bytes
from nodeservice.ports import ContainerSpec, labels
from nodeservice.runtime.profile import EngineProfile

_MIN_LOG_BYTES = 1 * MIB
_PERIOD_MICROSECONDS = 100_000
_LONG_PERIOD_MICROSECONDS = 1_000_000
_SMALLEST_QUOTA_MICROSECONDS = 1_000
_GPU_CHOICE = ("NVIDIA_VISIBLE_DEVICES", "NVIDIA_MIG_")
_GPU_SIDE_DOORS = ("CUDA_MPS_",)


def create_body(spec: ContainerSpec, profile: EngineProfile, *, node_id: str) -> dict[str, Any]:
    """The JSON of POST /containers/create.

    Raises RequestError for amounts that would mean "no limit" to the engine, NodeFaultError for GPUs that it leaves out.
    """
    for name in ("cpu_milli", "memory_bytes", "pids_limit"):
        if getattr(spec, name) < 1:
            raise RequestError(
                f"{name} is {getattr(spec, name)}: a container without this limit is not created",
                reason="CREATE_FAILED",
                field=name,
                hint="ask for at least 1",
            )
    if spec.gpu_uuids and not profile.hands_gpus:
        raise NodeFaultError(
            f"{profile.facts.name} {profile.facts.version} hands no GPUs to containers through its Docker-compatible API",
            reason="NODE_FAULT",
            hint="run this node with Docker",
        )
    body: dict[str, Any] = {
        "Image": spec.image,
        "Env": [f"{name}={value}" for name, value in environment(spec)],
        "Labels": {**spec.labels, labels.NODE: node_id},
        "StopSignal": spec.stop_signal,
        "StopTimeout": max(0, math.ceil(spec.grace_seconds)),
        "AttachStdin": False,
        "AttachStdout": False,
        "AttachStderr": False,
        "Tty": False,
        "OpenStdin": False,
        "HostConfig": _host_config(spec, profile),
    }
    if spec.shell is not None:
        body["Entrypoint"] = ["/bin/sh", "-c"]
        body["Cmd"] = [spec.shell]
    elif spec.argv:
        body["Cmd"] = list(spec.argv)
    return body


def check_mount_sources(spec: ContainerSpec) -> None:
    """Refuse what an engine that makes missing sources would not. Blocking. Raises RequestError (CREATE_FAILED)."""
    for mount in spec.mounts:
        if not mount.source.exists():
            raise RequestError(
                f"{mount.source}, to be mounted at {mount.target}, does not exist",
                reason="CREATE_FAILED",
                field="mounts",
            )


def environment(spec: ContainerSpec) -> list[tuple[str, str]]:
    """The task's environment with GPU access decided by us alone.

    NVIDIA's runtime grants what NVIDIA_VISIBLE_DEVICES names, and images set it to `all`; it is always set last here. An MPS
    pipe named by the task would reach the GPU of whoever serves it.
    """
    blocked = (*_GPU_CHOICE, *_GPU_SIDE_DOORS) if spec.gpu_uuids else ("NVIDIA_", *_GPU_SIDE_DOORS)
    kept = [(name, value) for name, value in spec.env if not name.upper().startswith(blocked)]
    return [*kept, ("NVIDIA_VISIBLE_DEVICES", ",".join(spec.gpu_uuids) or "void")]


def is_same_request(spec: ContainerSpec, found: Mapping[str, str]) -> bool:
    """Whether a container with the labels `found` was made from this spec: by its fingerprint, else by all labels."""
    if labels.SPEC in spec.labels:
        return found.get(labels.SPEC) == spec.labels[labels.SPEC]
    return all(found.get(name) == value for name, value in spec.labels.items())


def _host_config(spec: ContainerSpec, profile: EngineProfile) -> dict[str, Any]:
    period, quota = cpu_quota(spec.cpu_milli)
    config: dict[str, Any] = {
        "CpuPeriod": period,
        "CpuQuota": quota,
        "Memory": spec.memory_bytes,
        # Memory and swap together: equal to Memory means no swap; unset would allow as much swap again.
        "MemorySwap": spec.memory_bytes,
        "PidsLimit": spec.pids_limit,
        # Counted in the container's memory; 64 MB, the engine's default, is too small for data loaders.
        "ShmSize": shm_bytes(spec.memory_bytes),
        "Ulimits": _ulimits(spec, profile),
        "SecurityOpt": ["no-new-privileges"],
        "CapDrop": list(DROPPED_CAPABILITIES),
        "Privileged": False,
        "AutoRemove": False,
        "RestartPolicy": {"Name": "no"},
        "NetworkMode": profile.network,
        "LogConfig": _log_config(spec, profile),
        "Mounts": [
            # As a mount, not a bind: a source that is missing is refused, not made as an empty directory of root's.
            {"Type": "bind", "Source": str(mount.source), "Target": mount.target, "ReadOnly": mount.read_only}
            for mount in spec.mounts
        ],
    }
    for name, rate in (("Read", spec.read_bytes_per_second), ("Write", spec.write_bytes_per_second)):
        if rate is not None and spec.rate_devices:
            config[f"BlkioDevice{name}Bps"] = [{"Path": str(device), "Rate": rate} for device in spec.rate_devices]
    if spec.cpu_ids:
        config["CpusetCpus"] = ids_text(frozenset(spec.cpu_ids))
    if profile.has_init:
        config["Init"] = True
    if spec.cgroup_parent is not None:
        config["CgroupParent"] = spec.cgroup_parent
    if spec.gpu_uuids:
        config["DeviceRequests"] = [
            {"Driver": "nvidia", "DeviceIDs": list(spec.gpu_uuids), "Capabilities": [["gpu"]]},
        ]
    return config


def _ulimits(spec: ContainerSpec, profile: EngineProfile) -> list[dict[str, Any]]:
    """As many open files as were asked, or as the engine may give: with more, no container would start."""
    most = profile.facts.open_files_max
    files = spec.open_files_limit if most is None else min(spec.open_files_limit, most)
    wanted = {"nofile": files, "core": CORE_FILE_BYTES}
    if profile.processes_ulimit is not None:
        wanted["nproc"] = profile.processes_ulimit
    return [{"Name": name, "Soft": limit, "Hard": limit} for name, limit in wanted.items()]


def cpu_quota(cpu_milli: int) -> tuple[int, int]:
    """Period and quota in microseconds. The kernel takes quotas from 1 ms up, so small shares need the long period."""
    quota = cpu_milli * _PERIOD_MICROSECONDS // 1000
    if quota >= _SMALLEST_QUOTA_MICROSECONDS:
        return _PERIOD_MICROSECONDS, quota
    return _LONG_PERIOD_MICROSECONDS, cpu_milli * _LONG_PERIOD_MICROSECONDS // 1000


def _log_config(spec: ContainerSpec, profile: EngineProfile) -> dict[str, Any]:
    """One file of twice the wanted size: each record has some 30 bytes of the engine's beside the line itself.

    So lines of 30 bytes and more are all still there when `log_max_bytes` of them have been written, and no follower has to
    get across a rotation before. Writing blocks when the engine is slow (mode non-blocking would drop lines).
    """
    size = max(_MIN_LOG_BYTES, 2 * spec.log_max_bytes)
    options = {"max-size": str(size)}
    if profile.log_driver != "k8s-file":
        options |= {"max-file": "1", "compress": "false"}
    return {"Type": profile.log_driver, "Config": options}
