"""What an engine can do, read from its own answers; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodeservice.ports import EngineFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """`degraded` tells in sentences what tasks do without on this engine."""

    facts: EngineFacts
    log_driver: str
    network: str
    has_init: bool
    init_binary: str
    degraded: tuple[str, ...] = field(default=())


def read_profile(
    info: Mapping[str, Any], version: Mapping[str, Any], networks: Sequence[Mapping[str, Any]]
) -> EngineProfile:
    """From the answers to /info, /version and /networks."""
    components = {str(entry.get("Name", "")): entry for entry in version.get("Components") or []}
    is_podman = "Podman Engine" in components
    log_drivers = set((info.get("Plugins") or {}).get("Log") or [])
    degraded: list[str] = []

    # `local` keeps bytes as they are; json-file replaces what is not UTF-8.
    log_driver = next((name for name in ("local", "json-file", "k8s-file") if name in log_drivers), "json-file")
    if log_driver != "local":
        degraded.append(f"the log driver is {log_driver}: bytes that are not UTF-8 may be changed in logs")

    # A daemon started with `bridge: none` has no network of that name; Podman maps the word to its default network.
    network = "bridge" if is_podman or any(entry.get("Name") == "bridge" for entry in networks) else "none"
    if network == "none":
        degraded.append("the engine has no default network: containers run without one")

    # The engine runs `docker-init --version` to fill this component in, and leaves it out or says N/A when that fails.
    # Podman brings its own and tells nothing.
    init_binary = str(info.get("InitBinary") or "docker-init")
    init_version = str(components.get("docker-init", {}).get("Version") or "")
    has_init = is_podman or init_version not in {"", "N/A"}
    if not has_init:
        degraded.append(
            f"the engine's init program {init_binary} is missing: zombies are not reaped, PID 1 ignores SIGTERM"
        )

    return EngineProfile(
        facts=EngineFacts(
            name="podman" if is_podman else "docker",
            version=str(version.get("Version", "")),
            api_version=str(version.get("ApiVersion", "")),
            root_dir=Path(str(info.get("DockerRootDir") or "/")),
            storage_driver=str(info.get("Driver", "")),
            cgroup_driver=str(info.get("CgroupDriver", "")),
            cgroup_version=int(str(info.get("CgroupVersion") or 1)),
            cpu_count=int(info.get("NCPU") or 0),
            memory_bytes=int(info.get("MemTotal") or 0),
        ),
        log_driver=log_driver,
        network=network,
        has_init=has_init,
        init_binary=init_binary,
        degraded=tuple(degraded),
    )
