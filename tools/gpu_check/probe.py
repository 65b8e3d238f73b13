"""What a process can do with a GPU's device nodes where it stands. Started by isolation.py; JSON, a line each.

{"nodes": [PATH, …], "copies": [[PATH, MAJOR, MINOR], …], "nvml": true, "cuda": true, "hold": UUID}
"""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

held: dict[str, int] = {}
"""Nodes that stay open between two questions."""
handles: dict[str, Any] = {}
"""GPUs that NVML opened, and that stay open, by UUID."""


def opened(path: str) -> str:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    if path in held:
        os.close(descriptor)
    else:
        held[path] = descriptor
    return "open"


def made_and_opened(major: int, minor: int) -> str:
    """A node of our own with the same numbers: where making it is allowed, opening it must not be."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "node"
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(major, minor))
        except OSError as error:
            return f"mknod {errno.errorcode.get(error.errno or 0, '?')}"
        try:
            os.close(os.open(path, os.O_RDWR))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error.errno))
        return "open"


def nvml() -> dict[str, Any]:
    """How far NVML gets: the code of each step."""
    import pynvml

    answers: dict[str, Any] = {}

    def step(name: str, call: Any) -> Any:
        try:
            value = call()
        except pynvml.NVMLError as error:
            answers[name] = int(error.value)
            return None
        answers[name] = 0
        return value

    step("init", pynvml.nvmlInit)
    count = step("count", pynvml.nvmlDeviceGetCount)
    answers["counted"] = count
    for index in range(count or 0):
        handle = step(f"handle {index}", lambda index=index: pynvml.nvmlDeviceGetHandleByIndex(index))
        if handle is not None:
            step(f"memory {index}", lambda handle=handle: pynvml.nvmlDeviceGetMemoryInfo(handle))
    if answers["init"] == 0:
        step("shutdown", pynvml.nvmlShutdown)
    return answers


def held_answers(uuid: str) -> int:
    """Whether NVML, opened at the first question and kept, still reads this GPU's memory: its code."""
    import pynvml

    try:
        if uuid not in handles:
            pynvml.nvmlInit()
            handles[uuid] = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetMemoryInfo(handles[uuid])
    except pynvml.NVMLError as error:
        return int(error.value)
    return 0


def cuda() -> str:
    sys.path.insert(0, str(Path(__file__).parent))
    from cuda_program import Driver

    try:
        Driver().allocate(64 * 1024 * 1024)
    except (OSError, RuntimeError) as error:
        return str(error)
    return "works"


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {
            "nodes": {path: opened(path) for path in asked["nodes"]},
            "copies": {path: made_and_opened(major, minor) for path, major, minor in asked["copies"]},
            "held": held_answers(asked["hold"]) if "hold" in asked else None,
            "nvml": nvml() if asked.get("nvml") else None,
            "cuda": cuda() if asked.get("cuda") else None,
        }
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
