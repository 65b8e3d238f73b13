"""What an engine can do, read from its own answers; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodeservice.core.model import DEFAULT_OPEN_FILES
from nodeservice.ports import EngineFacts
from nodeservice.runtime.cdi_specs import CdiDevices
from nodeservice.runtime.engine_process import EngineProcess
from nodeservice.runtime.gpu_access import GpuFacts, GpuWay, choose_gpu_access, read_gpu_facts

RAISE_OPEN_FILES = "raise the engine's own limit (LimitNOFILE of its service, and sysctl fs.nr_open) and restart it"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """`degraded` tells in sentences what tasks do without on this engine."""

    facts: EngineFacts
    log_driver: str
    network: str
    has_init: bool
    init_binary: str
    gpus: GpuFacts
    is_podman: bool = False
    live_restore: bool = False
    """Whether containers live on while the engine itself is away."""
    makes_mount_sources: bool
    """Whether a mount's source that is missing is made, as an empty directory of root's, instead of refused."""
    processes_ulimit: int | None = None
    """To be given with each container where the engine's own default would be refused by the kernel."""
    degraded: tuple[str, ...] = ()


def read_profile(
    info: Mapping[str, Any],
    version: Mapping[str, Any],
    networks: Sequence[Mapping[str, Any]],
    *,
    lacks_init: bool = False,
    process: EngineProcess = EngineProcess(),  # noqa: B008  (frozen)
    specs: CdiDevices = CdiDevices(),  # noqa: B008  (frozen)
) -> EngineProfile:
    """From the answers to /info, /version and /networks. `lacks_init` is what a create has found out."""
    components = {str(entry.get("Name", "")): entry for entry in version.get("Components") or []}
    is_podman = "Podman Engine" in components
    log_drivers = set((info.get("Plugins") or {}).get("Log") or [])
    degraded: list[str] = []

    # `local` and Podman's k8s-file keep bytes as they are; json-file replaces what is not UTF-8.
    log_driver = next((name for name in ("local", "k8s-file", "json-file") if name in log_drivers), "json-file")
    if log_driver == "json-file":
        degraded.append(f"the log driver is {log_driver}: bytes that are not UTF-8 may be changed in logs")

    # A daemon started with `bridge: none` has no network of that name; Podman maps the word to its default network.
    network = "bridge" if is_podman or any(entry.get("Name") == "bridge" for entry in networks) else "none"
    if network == "none":
        degraded.append("the engine has no default network: containers run without one")

    # The engine runs `docker-init --version` to fill this component in, and leaves it out or says N/A when that fails.
    # Podman tells nothing of its own, catatonit, which may be missing as well: that shows at the first create.
    init_binary = "catatonit" if is_podman else str(info.get("InitBinary") or "docker-init")
    init_version = str(components.get("docker-init", {}).get("Version") or "")
    has_init = not lacks_init if is_podman else init_version not in {"", "N/A"}
    if not has_init:
        degraded.append(
            f"the engine's init program {init_binary} is missing: zombies are not reaped, PID 1 ignores SIGTERM"
        )

    if process.open_files_max is not None and process.open_files_max < DEFAULT_OPEN_FILES:
        degraded.append(
            f"the engine can give a process {process.open_files_max} open files, less than the default of "
            f"{DEFAULT_OPEN_FILES}: {RAISE_OPEN_FILES}"
        )

    gpus = read_gpu_facts(info, version, is_podman=is_podman, process=process, specs=specs)
    access = choose_gpu_access(gpus, ())
    if gpus.has_driver and access.way is GpuWay.NONE:
        degraded.append(f"the engine can hand no GPU to a task ({'; '.join(access.passed_over)}): {access.remedy}")

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
            open_files_max=process.open_files_max,
            has_sys_resource=process.has_sys_resource,
        ),
        log_driver=log_driver,
        network=network,
        has_init=has_init,
        init_binary=init_binary,
        gpus=gpus,
        is_podman=is_podman,
        live_restore=bool(info.get("LiveRestoreEnabled")),
        makes_mount_sources=is_podman,
        # As soon as one ulimit is given, Podman adds its default of 1,048,576 processes, which not every host allows it.
        processes_ulimit=process.processes_max if is_podman else None,
        degraded=tuple(degraded),
    )
