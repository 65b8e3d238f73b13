"""Turns a ContainerSpec into the body of the engine's create call; pure but for one check."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nodeservice.core.model import MIB
from nodeservice.errors import NodeFaultError, RequestError
from nodeservice.limits.asked import CORE_FILE_BYTES, DROPPED_CAPABILITIES, ids_text, shm_bytes
from nodeservice.limits.plan import CPU_PERIOD_US, cpu_quota_us
from nodeservice.ports import ContainerSpec, labels
from nodeservice.runtime.gpu_access import GpuAccess, GpuWay, cdi_names
from nodeservice.runtime.profile import RAISE_OPEN_FILES, EngineProfile

_MIN_LOG_BYTES = 1 * MIB
_LOG_ROOM = 8
_LOG_FILES = 2
_MEMORY_MARGIN_BYTES = 1 * MIB
_OURS_TO_SET = ("NVIDIA_", "CUDA_MPS_")
"""NVIDIA's runtime obeys the first, also MIG_CONFIG and IMEX_CHANNELS; an MPS pipe reaches the GPU of whoever serves it."""
_CAPABILITIES_VARIABLE = "NVIDIA_DRIVER_CAPABILITIES"
_DRIVER_CAPABILITIES = ("compute", "utility", "video", "graphics", "compat32", "ngx")
"""Parts of the driver that are files only. `display`, and so `all`, would bring the host's X server."""
_STANDARD_DRIVER_CAPABILITIES = ("compute", "utility")


NO_HEALTHCHECK = {"Test": ["NONE"]}
"""An image's own would run programs beside the task, as often as it says, at the cost of the engine."""


def check_request(spec: ContainerSpec, profile: EngineProfile, access: GpuAccess | None) -> None:
    """Refuse what would not be kept. `access` is how the spec's GPUs are asked for, None for a spec without any.

    Raises RequestError for amounts that would mean "no limit" to the engine, NodeFaultError for GPUs that it can't hand and
    for more open files than it can give, if they were asked for.
    """
    for name in ("cpu_milli", "memory_bytes", "pids_limit"):
        if getattr(spec, name) < 1:
            raise RequestError(
                f"{name} is {getattr(spec, name)}: a container without this limit is not created",
                reason="CREATE_FAILED",
                field=name,
                hint="ask for at least 1",
            )
    most = profile.facts.open_files_max
    if spec.open_files_asked and most is not None and spec.open_files_limit > most:
        raise NodeFaultError(
            f"open_files_limit is {spec.open_files_limit}: {profile.facts.name} on this node can give {most}",
            reason="LIMIT_NOT_ENFORCED",
            field="open_files_limit",
            hint=f"ask for {most} at most, or {RAISE_OPEN_FILES}",
        )
    if spec.gpu_uuids and (access is None or access.way is GpuWay.NONE):
        why = f" ({'; '.join(access.passed_over)})" if access else ""
        raise NodeFaultError(
            f"{profile.facts.name} {profile.facts.version} can hand no GPU to a container{why}",
            reason="NODE_FAULT",
            hint=access.remedy if access else None,
        )


def create_body(
    spec: ContainerSpec, profile: EngineProfile, *, node_id: str, access: GpuAccess | None = None
) -> dict[str, Any]:
    """The JSON of POST /containers/create. Raises as `check_request`."""
    check_request(spec, profile, access)
    body: dict[str, Any] = {
        "Image": spec.image,
        "Env": [f"{name}={value}" for name, value in environment(spec, access)],
        "Labels": {**spec.labels, labels.NODE: node_id},
        "StopSignal": spec.stop_signal,
        "StopTimeout": max(0, math.ceil(spec.grace_seconds)),
        "AttachStdin": False,
        "AttachStdout": False,
        "AttachStderr": False,
        "Tty": False,
        "OpenStdin": False,
        "Healthcheck": NO_HEALTHCHECK,
        "HostConfig": _host_config(spec, profile, access),
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


def environment(spec: ContainerSpec, access: GpuAccess | None = None) -> list[tuple[str, str]]:
    """The task's environment with GPU access decided by us alone.

    NVIDIA's runtime grants what NVIDIA_VISIBLE_DEVICES names, and images set it to `all`: it is always set here, and last.
    With CDI it is void too, as NVIDIA's own specifications have it, so that no runtime grants anything on top.
    """
    kept = [(name, value) for name, value in spec.env if not name.upper().startswith(_OURS_TO_SET)]
    if not spec.gpu_uuids:
        return [*kept, ("NVIDIA_VISIBLE_DEVICES", "void")]
    by_environment = access is not None and access.way in (GpuWay.DEVICE_REQUEST, GpuWay.RUNTIME)
    return [
        *kept,
        *spec.gpu_env,
        (_CAPABILITIES_VARIABLE, ",".join(driver_capabilities(spec))),
        ("NVIDIA_VISIBLE_DEVICES", ",".join(spec.gpu_uuids) if by_environment else "void"),
    ]


def driver_capabilities(spec: ContainerSpec) -> list[str]:
    """Which parts of the driver a task with GPUs gets: those that it names and may have, else compute and utility."""
    asked = dict(spec.env).get(_CAPABILITIES_VARIABLE, "")
    words = [word.strip() for word in asked.split(",")]
    if "all" in words:
        return list(_DRIVER_CAPABILITIES)
    return [word for word in _DRIVER_CAPABILITIES if word in words] or list(_STANDARD_DRIVER_CAPABILITIES)


def is_same_request(spec: ContainerSpec, found: Mapping[str, str]) -> bool:
    """Whether a container with the labels `found` was made from this spec: by its fingerprint, else by all labels."""
    if labels.SPEC in spec.labels:
        return found.get(labels.SPEC) == spec.labels[labels.SPEC]
    return all(found.get(name) == value for name, value in spec.labels.items())


def _host_config(spec: ContainerSpec, profile: EngineProfile, access: GpuAccess | None) -> dict[str, Any]:
    memory_bytes = memory_limit_bytes(spec, profile)
    config: dict[str, Any] = {
        "CpuPeriod": CPU_PERIOD_US,
        "CpuQuota": cpu_quota_us(spec.cpu_milli),
        "Memory": memory_bytes,
        # Memory and swap together: equal to Memory means no swap; unset would allow as much swap again.
        "MemorySwap": memory_bytes,
        "PidsLimit": spec.pids_limit,
        # Counted in the container's memory; 64 MB, the engine's default, is too small for data loaders.
        "ShmSize": shm_bytes(spec.memory_bytes),
        "Ulimits": ulimits(spec, profile),
        "SecurityOpt": ["no-new-privileges"],
        "CapDrop": list(DROPPED_CAPABILITIES),
        "Privileged": False,
        "AutoRemove": False,
        "RestartPolicy": {"Name": "no"},
        "NetworkMode": profile.network,
        "LogConfig": log_config(spec, profile),
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
    return config | _gpu_config(spec, profile, access)


def _gpu_config(spec: ContainerSpec, profile: EngineProfile, access: GpuAccess | None) -> dict[str, Any]:
    """GPUs by UUID, never by count: to an engine, a count of N means the first N."""
    if access is not None and access.way is GpuWay.RUNTIME:
        return {"Runtime": access.name}
    config: dict[str, Any] = {}
    if profile.gpus.plain_runtime is not None:
        config["Runtime"] = profile.gpus.plain_runtime
    if access is not None and access.way is GpuWay.CDI:
        config["DeviceRequests"] = [{"Driver": "cdi", "DeviceIDs": cdi_names(spec.gpu_uuids)}]
    elif access is not None:
        request = {"Driver": access.name, "DeviceIDs": list(spec.gpu_uuids), "Capabilities": [["gpu"]]}
        config["DeviceRequests"] = [request]
    return config


def ulimits(spec: ContainerSpec, profile: EngineProfile) -> list[dict[str, Any]]:
    """As many open files as were asked; of the default as many as the engine can give: with more, nothing would start."""
    most = profile.facts.open_files_max
    files = spec.open_files_limit if most is None else min(spec.open_files_limit, most)
    wanted = {"nofile": files, "core": CORE_FILE_BYTES}
    if profile.processes_ulimit is not None:
        wanted["nproc"] = profile.processes_ulimit
    return [{"Name": name, "Soft": limit, "Hard": limit} for name, limit in wanted.items()]


def memory_limit_bytes(spec: ContainerSpec, profile: EngineProfile) -> int:
    """What is set on the container itself.

    On cgroup v2 the task's own cgroup, above it, keeps the exact limit, and has to be the one that runs out: it then ends
    all of the task at once (memory.oom.group). A limit further down that is as tight is met first, and ends one process.
    """
    has_own = spec.cgroup_parent is not None and profile.facts.cgroup_version == 2
    return spec.memory_bytes + (_MEMORY_MARGIN_BYTES if has_own else 0)


def log_config(spec: ContainerSpec, profile: EngineProfile) -> dict[str, Any]:
    """The bounds of the engine's own copy: eight times the wanted size, in two files where the engine keeps several.

    Each record has some 30 bytes of the engine's beside the line itself. So of lines of 5 bytes and more all are still there
    when `log_max_bytes` of them have been written. With two files, a follower that is behind when one is full can read it to
    its end, and a log that would not fill one file is known to be whole. Writing blocks when the engine is slow (mode
    non-blocking would drop lines).
    """
    files = 1 if profile.log_driver == "k8s-file" else _LOG_FILES
    options = {"max-size": str(max(_MIN_LOG_BYTES, _LOG_ROOM * spec.log_max_bytes // files))}
    if files > 1:
        options |= {"max-file": str(files), "compress": "false"}
    return {"Type": profile.log_driver, "Config": options}
