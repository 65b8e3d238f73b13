"""A cluster under fire, seed by seed: what happened and what it came to, as a Markdown table and JSON lines.

make soak [SOAK="--seeds 1 10 --tasks 300 --out FILE"]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.integration.soak import Story, soak


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell ignores the first for what runs in the background
        signal.signal(number, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs=2, default=(1, 10), metavar=("FIRST", "LAST"))
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--gone-after", default="10m", help="the master's; short, and slow nodes lose their tasks")
    parser.add_argument("--patience", type=float, default=1800.0, metavar="SECONDS", help="for one seed")
    parser.add_argument("--out", type=Path, default=Path("build/soak.jsonl"), help="a line for each seed is added")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    are_well = True
    for seed in range(options.seeds[0], options.seeds[1] + 1):
        story = asyncio.run(
            soak(
                Path(os.environ["MINIO_BIN"]),
                seed=seed,
                task_count=options.tasks,
                node_count=options.nodes,
                patience_seconds=options.patience,
                gone_after=options.gone_after,
            )
        )
        are_well &= not story.broken
        print(describe(story), flush=True)
        with options.out.open("a") as out:
            told = vars(story) | {"at": datetime.now(UTC).isoformat(timespec="seconds"), "kernel": platform.release()}
            told |= {"nodes": options.nodes, "gone_after": options.gone_after, "cpus": os.cpu_count()}
            out.write(json.dumps(told) + "\n")
    return 0 if are_well else 1


def describe(story: Story) -> str:
    faults = ", ".join(f"{count} {what}" for what, count in sorted(story.faults.items()))
    lines = [f"seed {story.seed}: {story.tasks} tasks in {story.seconds:g} s; {dict(story.ends)}; {faults}"]
    return "\n".join([*lines, *(f"  BROKEN {what}" for what in story.broken)])


if __name__ == "__main__":
    sys.exit(main())
