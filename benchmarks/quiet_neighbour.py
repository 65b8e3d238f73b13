"""What a quiet task still gets beside attackers, of what it gets alone: work units in the same time, by turns in one run.

    .venv/bin/python -m benchmarks.quiet_neighbour [ROUNDS] [--json FILE] [--markdown FILE]

Needs root, an engine (DOCKER_HOST) and the image nodeservice/demo. The quiet task has half a core. Beside it run eight busy
loops on half a core, a fork bomb, a memory hog, a filler of the disk, a flood of tiny files and a flood of log lines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import secrets
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import docker
import grpc

from nodeservice.wire import master_worker_pb2_grpc as pb_grpc
from tests.integration.attack_bench import MIB, Bench
from tests.integration.node_process import NodeProcess
from tests.integration.old_peer import OldMaster

SECONDS = 6
WORK = f"""
now() {{ read up _ </proc/uptime; at=${{up%.*}}${{up#*.}}; }}
now; end=$((at + {SECONDS * 100})); units=0
while [ $at -lt $end ]; do
  n=0; while [ $n -lt 500 ]; do n=$((n+1)); done
  units=$((units+1)); now
done
echo $units
"""
ATTACKS = {
    "busy loops": ("for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait", 500),
    "fork bomb": ("b() { b | b & }; b & exec sleep 600", 150),
    "memory hog": ("while :; do dd if=/dev/zero of=/dev/null bs=300M count=1; done", 150),
    "disk filler": ("while :; do dd if=/dev/zero of=/results/f bs=1M count=100; done", 150),
    "tiny files": ("i=0; while :; do : > /results/$((i % 20000)); i=$((i+1)); done", 150),
    "log flood": ("yes 0123456789012345678901234567890123456789", 150),
}


async def measure(rounds: int) -> dict[str, Any]:
    engine = docker.APIClient(os.environ.get("DOCKER_HOST"), version="auto", timeout=120)
    master = await OldMaster().start()
    with tempfile.TemporaryDirectory(prefix="nodeservice-bench-") as home:
        node = NodeProcess(
            path=Path(home), worker_id=f"bench-{secrets.token_hex(4)}", options=("--master", f"127.0.0.1:{master.port}")
        )
        await node.start()
        try:
            async with grpc.aio.insecure_channel(node.address) as channel:
                bench = Bench(node, master, pb_grpc.MasterWorkerStub(channel), engine)
                rows = [await one_round(bench) for _ in range(rounds)]
        finally:
            await node.stop()
            await master.stop()
            for entry in engine.containers(all=True, filters={"label": [f"nodeservice.node={node.worker_id}"]}):
                engine.remove_container(entry["Id"], force=True, v=True)
            engine.close()
    ratios = [beside / alone for alone, beside, _ in rows]
    return {
        "machine": {
            "cpu_count": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(),
            "load_before": os.getloadavg()[2],
        },
        "seconds": SECONDS,
        "rounds": [{"alone": alone, "beside": beside, "reasons": reasons} for alone, beside, reasons in rows],
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "bound": 0.9,
    }  # fmt: skip


async def one_round(bench: Bench) -> tuple[int, int, dict[str, str]]:
    alone = await units(bench)
    share = {"memory_bytes": 64 * MIB, "disk_bytes": 1024 * MIB, "timeout_seconds": SECONDS + 4.0, "pids_limit": 256}
    attackers = {name: await bench.assign(command, cpu_milli=cpu, **share) for name, (command, cpu) in ATTACKS.items()}
    await bench.running(list(attackers.values())[-1])
    beside = await units(bench)
    return alone, beside, {name: (await bench.end_of(task_id)).reason for name, task_id in attackers.items()}


async def units(bench: Bench) -> int:
    result = await bench.run(WORK, cpu_milli=500)
    assert result.reason == "COMPLETED", result.message
    return int(result.logs)


def markdown(told: dict[str, Any]) -> str:
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in told["machine"].items())
    lines = [f"{machine}.", "", "| round | units alone | units beside | ratio |", "|---|---|---|---|"]
    for number, row in enumerate(told["rounds"], 1):
        lines.append(f"| {number} | {row['alone']} | {row['beside']} | {row['beside'] / row['alone']:.3f} |")
    ratio = told["ratio"]
    lines += ["", f"Median {ratio['median']:.3f}, least {ratio['least']:.3f}; bound {told['bound']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the node and its tasks end with it
    told = asyncio.run(measure(options.rounds))
    print(json.dumps(told, indent=2))
    if options.json:
        options.json.write_text(json.dumps(told, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(told))


if __name__ == "__main__":
    main()
