"""What is to be said of NVIDIA's container toolkit and of the engine's default runtime."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from nodeservice.runtime.gpu_access import numbers

OLDEST_SAFE = (1, 19, 1)
"""Before it a container can reach the host through the toolkit: CVE-2025-23266 and others (NVIDIA's security bulletins)."""
_VERSION = re.compile(r"\bversion v?(\d+(?:\.\d+)+)")
_ASK_SECONDS = 10


def toolkit_version() -> str | None:
    """As `nvidia-ctk` tells it, else the package; None where there is none, or it does not tell. Blocking."""
    if shutil.which("nvidia-ctk"):
        found = _VERSION.search(_said("nvidia-ctk", "--version"))
        if found:
            return found[1]
    if shutil.which("dpkg-query"):
        return _said("dpkg-query", "-W", "-f", "${Version}", "nvidia-container-toolkit").strip() or None
    return None


def gpu_advice(info: Mapping[str, Any], version: str | None) -> Iterator[str]:
    """`info` is the engine's answer to /info."""
    default = str(info.get("DefaultRuntime") or "")
    entry = (info.get("Runtimes") or {}).get(default)
    path = str(entry.get("path") or "") if isinstance(entry, Mapping) else ""
    if "nvidia" in f"{default} {path}":
        yield (
            f"the engine's default runtime is {default}: a container of anybody's whose image asks for GPUs gets all of"
            " them, tasks of this service excepted; set default-runtime to runc in the engine's daemon.json"
        )
    if version is not None and numbers(version) < OLDEST_SAFE:
        oldest = ".".join(map(str, OLDEST_SAFE))
        yield f"nvidia-container-toolkit {version} lets containers reach the host through known holes: use {oldest} or later"


def _said(*command: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 no outside input
            command, capture_output=True, text=True, check=False, timeout=_ASK_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
