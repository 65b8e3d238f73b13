"""Creates containers through Podman's own API, which its Docker-compatible one can't do with CDI names or without volumes.

Source: Podman's API reference (POST /libpod/containers/create, SpecGenerator), tried with Podman 4.3.1. The container is one
like any other afterwards: it is started, watched and removed through the compatible API.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nodeservice.limits.asked import DROPPED_CAPABILITIES, ids_text, shm_bytes
from nodeservice.ports import ContainerSpec, labels
from nodeservice.runtime.docker_spec import (
    NO_HEALTHCHECK,
    check_request,
    cpu_share,
    environment,
    log_config,
    memory_limit_bytes,
    ulimits,
)
from nodeservice.runtime.gpu_access import GpuAccess, cdi_names
from nodeservice.runtime.profile import EngineProfile

if TYPE_CHECKING:
    from docker import APIClient

_API = "v4.0.0"
"""Podman serves every older minor version of its own API too."""


_FIRST = (4,)


def needs_native(profile: EngineProfile, access: GpuAccess | None, volumes: Sequence[str]) -> bool:
    """Also an image that declares volumes: where they meet the results by way of a link, Podman does not tell."""
    is_asked = access is not None or (bool(volumes) and profile.gpus.engine_version >= _FIRST)
    return profile.is_podman and is_asked


def libpod_body(
    spec: ContainerSpec, profile: EngineProfile, *, node_id: str, access: GpuAccess | None
) -> dict[str, Any]:
    """The SpecGenerator with the same limits as `docker_spec.create_body`. Raises as `docker_spec.check_request`."""
    check_request(spec, profile, access)
    logging = log_config(spec, profile)
    body: dict[str, Any] = {
        "name": spec.name,
        "image": spec.image,
        "image_volume_mode": "ignore",
        "env": dict(environment(spec, access)),
        "labels": {**spec.labels, labels.NODE: node_id},
        "stop_signal": int(signal.Signals[spec.stop_signal]),
        "stop_timeout": max(0, math.ceil(spec.grace_seconds)),
        "terminal": False,
        "stdin": False,
        "healthconfig": NO_HEALTHCHECK,
        "init": profile.has_init,
        "privileged": False,
        "restart_policy": "no",
        "netns": {"nsmode": profile.network},
        "no_new_privileges": True,
        "cap_drop": list(DROPPED_CAPABILITIES),
        "shm_size": shm_bytes(spec.memory_bytes),
        "r_limits": [
            {"type": limit["Name"], "soft": limit["Soft"], "hard": limit["Hard"]} for limit in ulimits(spec, profile)
        ],
        "resource_limits": _resource_limits(spec, profile),
        "log_configuration": {
            "driver": logging["Type"],
            "size": int(logging["Config"]["max-size"]),
            "options": logging["Config"],
        },
        "mounts": [
            {
                "type": "bind",
                "source": str(mount.source),
                "destination": mount.target,
                "options": ["ro" if mount.read_only else "rw", "rbind", "rprivate"],
            }
            for mount in spec.mounts
        ],
        "devices": [{"path": name} for name in cdi_names(spec.gpu_uuids)],
    }
    for name, rate in (("Read", spec.read_bytes_per_second), ("Write", spec.write_bytes_per_second)):
        if rate is not None and spec.rate_devices:
            body[f"throttle{name}BpsDevice"] = {str(device): {"rate": rate} for device in spec.rate_devices}
    if spec.cgroup_parent is not None:
        body["cgroup_parent"] = spec.cgroup_parent
    if spec.shell is not None:
        body["entrypoint"] = ["/bin/sh", "-c"]
        body["command"] = [spec.shell]
    elif spec.argv:
        body["command"] = list(spec.argv)
    return body


def create_natively(client: APIClient, body: dict[str, Any]) -> dict[str, Any]:
    """Blocking. The answer has `Id` and `Warnings`, as that of the compatible API. Raises docker.errors.APIError."""
    import requests
    from docker.errors import create_api_error_from_http_exception

    response = client.post(f"{client.base_url}/{_API}/libpod/containers/create", json=body, timeout=client.timeout)
    try:
        response.raise_for_status()
    except requests.exceptions.HTTPError as error:
        create_api_error_from_http_exception(error)
    answer: dict[str, Any] = response.json()
    return answer


def _resource_limits(spec: ContainerSpec, profile: EngineProfile) -> dict[str, Any]:
    """As in the runtime specification (LinuxResources)."""
    quota_us, period_us = cpu_share(spec)
    cpu: dict[str, Any] = {"period": period_us, "quota": quota_us}
    if spec.cpu_ids:
        cpu["cpus"] = ids_text(frozenset(spec.cpu_ids))
    memory_bytes = memory_limit_bytes(spec, profile)
    return {
        "cpu": cpu,
        # Memory and swap together, as Docker counts: equal means no swap.
        "memory": {"limit": memory_bytes, "swap": memory_bytes},
        "pids": {"limit": spec.pids_limit},
    }
