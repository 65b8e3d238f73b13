"""One examination from beginning to end: an image, a node of its own, all probes, the findings."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from nodeservice.config import NodeConfig
from nodeservice.daemon.look import why_no_cgroups
from nodeservice.doctor.bench import Bench, run_probes
from nodeservice.doctor.checks import all_probes
from nodeservice.doctor.checks.gpu import judge_access
from nodeservice.doctor.finding import Diagnosis, Finding
from nodeservice.doctor.host import has_swap, judge_share
from nodeservice.doctor.image import LentImage, engine_says, lent_image
from nodeservice.doctor.probe import Probe
from nodeservice.doctor.toolkit import gpu_advice, toolkit_version
from nodeservice.errors import NodeFaultError
from nodeservice.ports import EngineFacts
from nodeservice.runtime.docker import DockerRuntime
from nodeservice.runtime.gpu_access import GpuAccess, GpuWay
from nodeservice.single import sweep_dead_runs

_ALL_SECONDS = 90.0
"""For all probes together; on an idle machine they take a tenth of it."""


async def examine(config: NodeConfig, *, image: str | None = None, patience: float = 1.0) -> Diagnosis:
    """Try every limit in small containers, under a node of its own beside whatever runs here.

    The state directory is that of `config`, since what its file system offers decides how the disk is bound. Nothing is left
    behind. `patience` lengthens what the probes may take, for a busy or emulated machine. Raises ConfigError, TransientError
    (ENGINE_UNAVAILABLE) and NodeFaultError where nothing could be tried.
    """
    began = time.monotonic()
    token = secrets.token_hex(5)
    own = _own_config(config, token)
    await sweep_dead_runs(own.state_dir.parent, docker_host=config.docker_host)
    runtime = DockerRuntime(base_url=config.docker_host, node_id=own.worker_id)
    try:
        facts, url = await runtime.facts(), runtime.endpoint_url
        info = await engine_says(url)
        degraded = runtime.degraded
        probes = all_probes(cpu_count=len(os.sched_getaffinity(0)), has_swap=has_swap(), patience=patience)
        async with lent_image(url, image, token=token) as lent:
            bench = await run_probes(own, probes, lent, facts, all_seconds=_ALL_SECONDS * patience)
            described = _facts(facts, info, lent)
        access = await runtime.gpu_access(bench.gpu_uuids)
    finally:
        _remove_empty(own)
        await runtime.close()
    why = await why_no_cgroups(own.worker_id, facts)
    toolkit = await asyncio.to_thread(toolkit_version)
    return Diagnosis(
        findings=_findings(probes, bench, why, access),
        facts=described
        | {
            "GPUs are handed": access.words,
            "GPU toolkit": toolkit or "none found",
            "cgroups of tasks": why or "made before each container, with its limits",
        },
        advice=[*_advice(info, degraded), *gpu_advice(info, toolkit)],
        seconds=time.monotonic() - began,
    )


def _own_config(config: NodeConfig, token: str) -> NodeConfig:
    name = f"doctor-{token}"
    directory = config.state_dir / "doctor" / name
    return config.model_copy(
        update={
            "worker_id": name,
            "state_dir": directory,
            "results_dir": directory / "results",
            "result_store": "file",
            "otlp_endpoint": None,
        }
    )


def _findings(probes: Sequence[Probe], bench: Bench, why_no_cgroups: str | None, access: GpuAccess) -> list[Finding]:
    """Raises NodeFaultError where no probe ran at all: then nothing is known of any limit."""
    if not any(seen.has_run for seen in bench.seen.values()):
        said = {seen.message for seen in bench.seen.values() if seen.message}
        raise NodeFaultError(
            f"no probe could be run: {'; '.join(sorted(said)) or 'none ended in time'}",
            reason="NODE_FAULT",
            hint="name an image with /bin/sh by --image, and see that the engine can run it",
        )
    found = [finding for probe in probes for finding in probe.judge(bench.seen[probe.name])]
    found += judge_access(
        len(bench.gpu_uuids),
        trouble=bench.gpu_trouble,
        words=access.words,
        is_possible=access.way is not GpuWay.NONE,
        passed_over=access.passed_over,
        remedy=access.remedy,
    )
    return [*found, judge_share(bench.share, bench.allocatable, why_no_cgroups)]


def _facts(facts: EngineFacts, info: Mapping[str, Any], image: LentImage) -> dict[str, str]:
    return {
        "kernel": os.uname().release,
        "engine": f"{facts.name} {facts.version}, API {facts.api_version}",
        "cgroup version": str(facts.cgroup_version),
        "cgroup driver": facts.cgroup_driver,
        "default runtime": str(info.get("DefaultRuntime") or "not told"),
        "storage": f"{facts.storage_driver} at {facts.root_dir}",
        "live restore": "on" if info.get("LiveRestoreEnabled") else "off",
        "swap": "on" if has_swap() else "off",
        "image": f"{image.name}, {image.origin}",
    }


def _advice(info: Mapping[str, Any], degraded: Sequence[str]) -> list[str]:
    advice = list(degraded)
    if "LiveRestoreEnabled" in info and not info["LiveRestoreEnabled"]:
        advice.append('set "live-restore": true in the engine\'s daemon.json: tasks then survive its restart')
    return [*advice, *(str(warning) for warning in info.get("Warnings") or [])]


def _remove_empty(own: NodeConfig) -> None:
    """The directories above the own one, where they are empty: they were made for it."""
    for directory in own.state_dir.parents[:2]:
        try:
            directory.rmdir()
        except OSError:
            return
