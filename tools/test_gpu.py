"""Checks this machine's NVIDIA GPUs against what the node relies on, and writes evidence. It changes no setting of a GPU.

    python tools/test_gpu.py [--out FOLDER] [--gpu UUID] [--provoke-xid]

Of packages it needs only nvidia-ml-py. PyTorch, CuPy and nvidia-smi are used where they are; no container engine is needed.
Exit codes: 0 no check failed, 1 a check failed, 2 nothing could be checked here.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

from gpu_check import answers, identity, isolation, load  # noqa: E402
from gpu_check.bench import Bench, describe, open_bench, settings  # noqa: E402
from gpu_check.record import FAILED, CannotRunError, Finding, run, write  # noqa: E402


def unchanged(bench: Bench, finding: Finding) -> None:
    """MIG, compute mode, persistence, accounting, power limit and ECC are as they were."""
    now = settings(bench)
    for label, before in bench.settings.items():
        finding.fact(label, now[label])
        finding.expect(now[label] == before, f"{label}: {before} became {now[label]}")


CHECKS: dict[str, Callable[[Bench, Finding], None]] = {
    "driver": identity.driver,
    "inventory": identity.inventory,
    "MIG": identity.mig,
    "PCI and NUMA": identity.pci,
    "provider": identity.provider,
    "readings": answers.readings,
    "health": answers.health,
    "topology": answers.topology,
    "events": answers.events,
    "threads": answers.threads,
    "memory of a process": load.processes,
    "energy and load": load.energy,
    "XID": load.xid,
    "isolation, cgroup v1": isolation.version_1,
    "isolation, cgroup v2": isolation.version_2,
    "time of each call": answers.timing,
    "settings": unchanged,
}


def main() -> None:
    options = arguments()
    try:
        bench = open_bench(binding(), options)
    except CannotRunError as reason:
        print(f"NOTHING WAS CHECKED: {reason}", file=sys.stderr)
        sys.exit(2)
    if bench.pretended and options.out is None:
        print(
            "The driver is pretended: name a folder with --out, so that nobody takes it for evidence.", file=sys.stderr
        )
        sys.exit(2)
    machine = describe(bench)
    if bench.pretended:
        print(f"PRETENDED: the false driver answers, machine {bench.pretended}. This is no evidence.")
    findings = []
    for name, check in CHECKS.items():
        about = " ".join((check.__doc__ or "").split())
        finding = run(name, about, lambda found, check=check: check(bench, found))
        findings.append(finding)
        print(f"{finding.outcome:8} {name}  {'; '.join(finding.reasons)}".rstrip(), flush=True)
    folder = options.out or ROOT / "docs" / "evidence" / default_folder(machine)
    write(folder, machine, findings)
    print(f"written: {folder}")
    sys.exit(1 if any(finding.outcome == FAILED for finding in findings) else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for evidence.json and report.md (docs/evidence/gpu-NAME-DATE)")
    parser.add_argument(
        "--gpu", metavar="UUID", help="the GPU or MIG device that CUDA programs use (the first idle one)"
    )
    parser.add_argument("--repeat", type=int, default=1000, help="how often each call is timed (1000)")
    parser.add_argument("--measure-seconds", type=float, default=4.0, help="how long energy and load are measured (4)")
    parser.add_argument("--provoke-xid", action="store_true", help="also let a program of ours write where it may not")
    return parser.parse_args()


def binding() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise CannotRunError("the package nvidia-ml-py is not installed") from error
    return pynvml


def default_folder(machine: dict[str, Any]) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", machine["GPUs"].lower().replace("nvidia", "").replace("×", "x")).strip("-")
    return f"gpu-{name}-{machine['date']}"


if __name__ == "__main__":
    main()
