"""Runs the benchmarks, writes JSON, Markdown and plots, and compares two result files.

python -m benchmarks run [--quick] [--only NAME …] [--out FILE] [--large-file-mib N] [--home DIR]
python -m benchmarks report FILE [--into DIR]
python -m benchmarks compare A.json B.json
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.output.compare import compare
from benchmarks.output.markdown import markdown
from benchmarks.output.plots import plots
from benchmarks.rig import machine
from benchmarks.rig.scale import Scale
from benchmarks.rig.service import Unavailable
from nodeservice.telemetry.logs import configure_logging

VERSION = 1
ALL = ("throughput", "latency", "footprint", "upload", "logs", "recovery", "journal", "master", "mix")
MIB = 1024**2


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure and write JSON, Markdown and plots")
    run.add_argument("--quick", action="store_true", help="smaller and shorter: minutes")
    run.add_argument("--only", nargs="+", choices=ALL, default=list(ALL), metavar="NAME", help=", ".join(ALL))
    run.add_argument("--out", type=Path, default=Path("build/bench.json"), help="the JSON; the rest lies beside it")
    run.add_argument("--home", type=Path, help="a directory on the disk to be measured (default: the temporary one)")
    run.add_argument("--large-file-mib", type=int, help="size of the one large file (default 4096, quick 128)")
    run.set_defaults(work=_run)
    report = commands.add_parser("report", help="Markdown and plots of a result file")
    report.add_argument("file", type=Path)
    report.add_argument("--into", type=Path, help="default: beside the file")
    report.set_defaults(work=lambda options: _write_report(_read(options.file), options.into or options.file.parent,
                                                           options.file.stem))  # fmt: skip
    against = commands.add_parser("compare", help="what changed from A to B")
    against.add_argument("before", type=Path, metavar="A.json")
    against.add_argument("after", type=Path, metavar="B.json")
    against.set_defaults(work=lambda options: print(compare(_read(options.before), _read(options.after)), end=""))
    options = parser.parse_args()
    sys.exit(options.work(options))


def _run(options: argparse.Namespace) -> int:
    configure_logging("error", "json")
    large = options.large_file_mib or (128 if options.quick else 4096)
    with tempfile.TemporaryDirectory(prefix="nodeservice-bench-", dir=options.home) as home:
        scale = Scale(quick=options.quick, home=Path(home), large_file_bytes=large * MIB)
        told = asyncio.run(_measure(scale, options.only, options.out))
    _write_report(told, options.out.parent, options.out.stem)
    print(f"\n{options.out}, and {options.out.with_suffix('.md').name} beside it")
    for name, why in told["failed"].items():
        print(f"FAILED {name}: {why}", file=sys.stderr)
    return 1 if told["failed"] else 0


async def _measure(scale: Scale, names: list[str], out: Path) -> dict[str, Any]:
    """`out` has what was measured so far, so that a run that is broken off is not lost."""
    out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    told: dict[str, Any] = {
        "version": VERSION,
        "quick": scale.quick,
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(scale.home),
        "load_before": machine.load(),
        "runs": {},
        "ratios": {},
        "targets": [],
        "skipped": {},
        "failed": {},
    }
    for name in names:
        print(f"{name} …", flush=True)
        await _measure_one(name, scale, told)
        told |= {"load_after": machine.load(), "seconds": round(time.monotonic() - began, 1)}
        out.write_text(json.dumps(told, indent=1) + "\n")
    return told


async def _measure_one(name: str, scale: Scale, told: dict[str, Any]) -> None:
    began = time.monotonic()
    try:
        found = await importlib.import_module(f"benchmarks.{name}").measure(scale)
    except Unavailable as why:
        told["skipped"][name] = str(why)
        print(f"  skipped: {why}", flush=True)
    except Exception as error:
        traceback.print_exc()
        told["failed"][name] = repr(error)
    else:
        entry = found.as_dict() | {"seconds": round(time.monotonic() - began, 1)}
        told["runs"][name] = entry
        told["ratios"] |= entry["ratios"]
        told["targets"] += entry["targets"]
        print(f"  {entry['seconds']} s", flush=True)


def _write_report(told: dict[str, Any], directory: Path, stem: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    drawn = plots(told)
    for name, svg in drawn.items():
        (directory / f"{stem}-{name}.svg").write_text(svg)
    (directory / f"{stem}.md").write_text(markdown(told, [f"{stem}-{name}.svg" for name in drawn]))


def _read(path: Path) -> dict[str, Any]:
    told = json.loads(path.read_text())
    if told.get("version") != VERSION:
        sys.exit(f"{path} is no result of this version of the benchmarks")
    return dict(told)


if __name__ == "__main__":
    main()
