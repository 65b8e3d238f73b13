"""Describes the machine that was measured, and how busy it was with other things."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import docker
import psutil

from nodeservice.runtime.endpoint import resolve_endpoint


def describe(home: Path) -> dict[str, Any]:
    """`home` is where the measured files lie."""
    return {
        "cpu_model": _cpu_model(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "system": _system(),
        "python": _python(),
        "file_system": _file_system(home),
        "engine": _engine(),
        "virtual": _output("systemd-detect-virt") or "unknown",
    }


def load() -> dict[str, float]:
    """Running and waiting processes on average (getloadavg(3)), and CPU time that the hypervisor gave to others."""
    one, five, fifteen = os.getloadavg()
    return {"1_minute": one, "5_minutes": five, "15_minutes": fifteen, "steal_seconds": psutil.cpu_times().steal}


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _python() -> str:
    """Whose build it is counts: one made without profiles, as pyenv does by default, needs a seventh more CPU time."""
    whose = "the system's own" if Path(sys.base_prefix) == Path("/usr") else "another build"
    return f"{platform.python_version()} ({whose})"


def _file_system(home: Path) -> str:
    mounts = [part for part in psutil.disk_partitions(all=True) if home.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def _engine() -> str:
    try:
        client = docker.APIClient(resolve_endpoint(None).url, version="auto", timeout=10)
    except (docker.errors.DockerException, OSError):
        return "none"
    try:
        facts = client.info()
        return (
            f"{facts['ServerVersion']}, {facts['Driver']}, cgroup v{facts.get('CgroupVersion', '?')} "
            f"{facts['CgroupDriver']}"
        )
    finally:
        client.close()


def _output(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except OSError:
        return ""
