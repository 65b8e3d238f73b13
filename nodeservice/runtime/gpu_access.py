"""Chooses how an engine is asked for GPUs, and which runtime keeps them from tasks that asked for none; pure.

Sources: Docker Engine API (DeviceRequest, /info), moby's device drivers (`cdi`, `nvidia`, from 29.2 `nvidia.runtime-hook`),
NVIDIA's Container Toolkit documentation (CDI, the environment variables of its runtime).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import Any

from nodeservice.runtime.cdi_specs import CdiDevices
from nodeservice.runtime.engine_process import GPU_HOOK, EngineProcess

CDI_KIND = "nvidia.com/gpu"

_RUNTIME_PROGRAM = "nvidia-container-runtime"
_PLAIN_RUNTIMES = ("runc", "crun", "youki", "io.containerd.runc.v2")
_SANDBOX_WORDS = ("kata", "runsc", "gvisor", "sysbox")
"""Runtimes that someone chose for a stronger wall around containers; none of them hands a GPU by environment."""
_DISCOVERY_API = (1, 50)
"""From here on /info names the devices of all CDI specifications."""
_HOOK_DRIVER_ENGINE = (29, 2)
"""From here on the driver `nvidia` tries CDI itself, and the hook has a name of its own."""
_PODMAN_CDI = (4, 1)
_SPEC_CEILINGS = {
    True: (((4, 4), (0, 5, 0)), ((5, 1), (0, 6, 0))),
    False: (((26, 1), (0, 6, 0)), ((27,), (0, 7, 0))),
}
"""By whether it is Podman: before the first version, an engine reads specifications up to the second. Tried with Podman
4.3.1 and Docker 26.1.5; NVIDIA's release notes of the toolkit 1.19.1 tell the rest."""
_REFRESH = "systemctl restart nvidia-cdi-refresh, or nvidia-ctk cdi generate --output=/var/run/cdi/nvidia.yaml"
_TOOLKIT = f"install nvidia-container-toolkit 1.19.1 or later, let it write a CDI specification ({_REFRESH})"
_REMEDY_DOCKER = (
    f"{_TOOLKIT}, use Docker 25 or later (28.1 and before:"
    ' with "features": {"cdi": true} in daemon.json), and restart the engine'
)
_REMEDY_PODMAN = f"{_TOOLKIT}, and use Podman 4.1 or later"


class GpuWay(StrEnum):
    CDI = "CDI"
    DEVICE_REQUEST = "device request"
    RUNTIME = "runtime"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What decides how this engine hands GPUs."""

    is_podman: bool
    engine_version: tuple[int, ...]
    cdi_devices: frozenset[str] | None
    """Qualified names in the engine's CDI specifications; None where it takes no CDI names, or they can't be seen."""
    cdi_problem: str = ""
    """Why `cdi_devices` is None or may lack something."""
    has_hook: bool | None = None
    """Whether NVIDIA's hook is on the engine's own PATH; None where that can't be seen."""
    gpu_runtime: str | None = None
    """The name under which NVIDIA's runtime is registered."""
    plain_runtime: str | None = None
    """What containers without GPUs are to name, where the engine's default runtime might hand them some."""
    has_driver: bool = False
    """Whether this host runs NVIDIA's kernel driver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuAccess:
    """One way to ask for GPUs. `name` is the driver of a device request, or the runtime.

    `passed_over` says of each better way why it was not taken. `remedy` is for GpuWay.NONE.
    """

    way: GpuWay
    name: str = ""
    passed_over: tuple[str, ...] = ()
    remedy: str = ""

    @property
    def words(self) -> str:
        """For people."""
        match self.way:
            case GpuWay.CDI:
                return f"by CDI, as {CDI_KIND}=UUID"
            case GpuWay.DEVICE_REQUEST:
                return f"by a device request with UUIDs to the driver {self.name}"
            case GpuWay.RUNTIME:
                return f"by the runtime {self.name}, with UUIDs in NVIDIA_VISIBLE_DEVICES"
            case GpuWay.NONE:
                return f"not at all: {'; '.join(self.passed_over)}"


def choose_gpu_access(facts: GpuFacts, gpu_uuids: Sequence[str]) -> GpuAccess:
    """The first of CDI, device request and runtime that can hand all of these; with none named, the best for any.

    CDI is taken only where it lists every one of them: a specification older than the last change of the MIG layout must
    not break a task that another way can serve.
    """
    passed_over: list[str] = []
    why_not = _why_not_cdi(facts, gpu_uuids)
    if not why_not:
        return GpuAccess(way=GpuWay.CDI)
    passed_over.append(why_not)
    if facts.is_podman:
        return GpuAccess(way=GpuWay.NONE, passed_over=tuple(passed_over), remedy=_REMEDY_PODMAN)
    driver = "nvidia.runtime-hook" if facts.engine_version >= _HOOK_DRIVER_ENGINE else "nvidia"
    if facts.has_hook:
        return GpuAccess(way=GpuWay.DEVICE_REQUEST, name=driver, passed_over=tuple(passed_over))
    if facts.gpu_runtime is not None:
        passed_over.append(
            f"{GPU_HOOK} is not on the engine's PATH" if facts.has_hook is False else "the engine's PATH can't be seen"
        )
        return GpuAccess(way=GpuWay.RUNTIME, name=facts.gpu_runtime, passed_over=tuple(passed_over))
    if facts.has_hook is None:  # it may be there: the engine's own answer tells, at the start
        return GpuAccess(way=GpuWay.DEVICE_REQUEST, name=driver, passed_over=tuple(passed_over))
    passed_over += [f"{GPU_HOOK} is not on the engine's PATH", "no runtime of NVIDIA's is registered"]
    return GpuAccess(way=GpuWay.NONE, passed_over=tuple(passed_over), remedy=_REMEDY_DOCKER)


def cdi_names(gpu_uuids: Sequence[str]) -> list[str]:
    return [f"{CDI_KIND}={uuid}" for uuid in gpu_uuids]


def read_gpu_facts(
    info: Mapping[str, Any],
    version: Mapping[str, Any],
    *,
    is_podman: bool,
    process: EngineProcess,
    specs: CdiDevices,
) -> GpuFacts:
    """From the answers to /info and /version, what was seen of the engine's process, and its CDI specifications."""
    engine_version = numbers(str(version.get("Version", "")))
    runtimes: Mapping[str, Any] = info.get("Runtimes") or {}
    default = str(info.get("DefaultRuntime") or "")
    devices: frozenset[str] | None
    if is_podman and engine_version < _PODMAN_CDI:
        devices, problem = None, "Podman takes CDI names from 4.1 on"
    elif not is_podman and not info.get("CDISpecDirs"):
        devices, problem = None, "the engine takes no CDI names"
    elif not is_podman and numbers(str(version.get("ApiVersion", ""))) >= _DISCOVERY_API:
        entries = info.get("DiscoveredDevices") or []
        devices, problem = frozenset(str(entry.get("ID", "")) for entry in entries), ""
    else:
        devices, problem = _read_by_engine(specs, engine_version, is_podman=is_podman)
    return GpuFacts(
        is_podman=is_podman,
        engine_version=engine_version,
        cdi_devices=devices,
        cdi_problem=problem,
        has_hook=process.has_gpu_hook,
        gpu_runtime=_gpu_runtime(runtimes),
        plain_runtime=None if is_podman else _plain_runtime(default, runtimes),
        has_driver=process.has_gpu_driver,
    )


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `28.5.2+dfsg4` is (28, 5, 2)."""
    found: list[int] = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
        if digits != part:
            break
    return tuple(found)


def _why_not_cdi(facts: GpuFacts, gpu_uuids: Sequence[str]) -> str:
    """Empty where CDI can hand them all."""
    if facts.cdi_devices is None:
        return facts.cdi_problem
    known = [name for name in facts.cdi_devices if name.startswith(f"{CDI_KIND}=")]
    missing = [name for name in cdi_names(gpu_uuids) if name not in facts.cdi_devices]
    if known and not missing:
        return ""
    said = (
        f"no CDI specification lists {', '.join(missing)}: is it older than the last change? ({_REFRESH})"
        if known
        else "no CDI specification lists a GPU"
    )
    return f"{said}; {facts.cdi_problem}" if facts.cdi_problem else said


def _read_by_engine(
    specs: CdiDevices, engine_version: tuple[int, ...], *, is_podman: bool
) -> tuple[frozenset[str], str]:
    """The names in specifications that are not too new for this engine, and what is to be said against the others."""
    ceiling = next((most for before, most in _SPEC_CEILINGS[is_podman] if engine_version < before), None)
    read = frozenset(name for name, version in specs.versions.items() if ceiling is None or version <= ceiling)
    problems = list(specs.problems)
    if ceiling is not None and len(read) < len(specs.versions):
        problems.append(
            f"this engine reads CDI specifications up to {'.'.join(map(str, ceiling))}, and some are newer: update it, or"
            " generate them with --feature-flag=no-additional-gids-for-device-nodes"
        )
    return read, "; ".join(problems)


def _gpu_runtime(runtimes: Mapping[str, Any]) -> str | None:
    if "nvidia" in runtimes:
        return "nvidia"
    return next((name for name, entry in runtimes.items() if _program(entry) == _RUNTIME_PROGRAM), None)


def _plain_runtime(default: str, runtimes: Mapping[str, Any]) -> str | None:
    """None where the default is plain itself, is a sandbox, or where there is no plain one to name."""
    told = f"{default} {_program(runtimes.get(default))}".lower()
    if "nvidia" not in told and (default in ("", *_PLAIN_RUNTIMES) or any(word in told for word in _SANDBOX_WORDS)):
        return None
    return next((name for name in _PLAIN_RUNTIMES if name in runtimes and name != default), None)


def _program(entry: object) -> str:
    path = entry.get("path") if isinstance(entry, Mapping) else None
    return PurePosixPath(str(path or "")).name
