"""What eight GPUs cost the service, on a false driver: the time of `inspect`, and the CPU of an idle node; JSON on stdout.

    .venv/bin/python -m benchmarks.gpu [SECONDS]

`inspect` runs ten times with eight pretended H200 and ten times without, in turn, from the start of the process to its end.
Then an idle node is measured for SECONDS (30) without and with them. It needs a C compiler and a container engine.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.idle import COMMAND, idle_node
from nodeservice.testing.false_driver import FalseDriver

RUNS = 10


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    with tempfile.TemporaryDirectory(prefix="nodeservice-gpu-") as directory:
        gpus = FalseDriver.build(Path(directory) / "driver", "h200x8").environment
        print(json.dumps({"inspect": inspect(Path(directory), gpus), "idle": idle(seconds, gpus)}, indent=2))


def inspect(home: Path, gpus: Mapping[str, str]) -> dict[str, object]:
    """Wall clock and CPU time of the whole process, and how many GPUs it told."""
    runs: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    counts = {}
    for _ in range(RUNS):
        for kind, env in (("without", {}), ("with", gpus)):
            began, before = time.monotonic(), _cpu_seconds()
            done = subprocess.run(
                [*COMMAND, "inspect", "--json", "--state-dir", str(home / "state")],
                stdout=subprocess.PIPE, env=os.environ | env, check=True,
            )  # fmt: skip
            runs[kind].append((time.monotonic() - began, _cpu_seconds() - before))
            counts[kind] = len(json.loads(done.stdout)["gpus"])
    return {
        kind: {
            "gpu_count": counts[kind],
            "wall_seconds_least": round(min(wall for wall, _ in measured), 3),
            "wall_seconds_median": round(statistics.median(wall for wall, _ in measured), 3),
            "wall_seconds_max": round(max(wall for wall, _ in measured), 3),
            "cpu_seconds_median": round(statistics.median(cpu for _, cpu in measured), 3),
        }
        for kind, measured in runs.items()
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def idle(seconds: float, gpus: Mapping[str, str]) -> dict[str, object]:
    """The node alone, not its master."""
    return {"without": idle_node(seconds), "with": idle_node(seconds, gpus)}


if __name__ == "__main__":
    main()
