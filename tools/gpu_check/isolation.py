"""Checks: device rules of a cgroup bar a GPU from whoever was not given it, without a container engine."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_check.bench import MIB, Bench, Gpu
from gpu_check.cuda import CudaProgram
from gpu_check.device_rules import BASE_RULES, CgroupV1, CgroupV2, DeviceCgroup, Rule
from gpu_check.record import CannotRunError, Finding

_PROBE = Path(__file__).with_name("probe.py")
_ANSWER_SECONDS = 120


class Probe:
    """A process in the cgroup that tries the nodes when asked. Use it with `with`."""

    def __init__(self, cgroup: DeviceCgroup) -> None:
        self._process = subprocess.Popen(
            [sys.executable, _PROBE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=cgroup.enter,  # noqa: PLW1509 no other thread runs in this program then
        )

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"nodes": [], "copies": [], **question}) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], _ANSWER_SECONDS)[0]:
            raise RuntimeError(f"the probe has not answered for {_ANSWER_SECONDS} s")
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def version_1(bench: Bench, finding: Finding) -> None:
    """With cgroup v1's devices controller."""
    _needs(bench)
    with CgroupV1() as cgroup:
        _check(bench, finding, cgroup)


def version_2(bench: Bench, finding: Finding) -> None:
    """With a BPF device filter on cgroup v2."""
    _needs(bench)
    with CgroupV2() as cgroup:
        _check(bench, finding, cgroup)


def _needs(bench: Bench) -> None:
    bench.real_only()
    if os.geteuid() != 0:
        raise CannotRunError("not root: a cgroup and its device rules need it")
    if not _gpu(bench).node.exists():
        raise CannotRunError(f"no {_gpu(bench).node} here")


def _gpu(bench: Bench) -> Gpu:
    """The first that is not split: MIG devices have nodes of their own besides."""
    whole = [gpu for gpu in bench.gpus if not bench.has_mig(gpu)]
    if not whole:
        raise CannotRunError("MIG is on at each GPU: its devices need nodes of their own")
    return whole[0]


def _numbers(path: Path) -> tuple[int, int]:
    device = path.stat().st_rdev
    return os.major(device), os.minor(device)


def _check(bench: Bench, finding: Finding, cgroup: DeviceCgroup) -> None:
    gpu = _gpu(bench)
    control, compute = Path("/dev/nvidiactl"), [Path("/dev/nvidia-uvm"), Path("/dev/nvidia-uvm-tools")]
    nodes = [path for path in [gpu.node, control, *compute] if path.exists()]
    names = [str(path) for path in nodes]
    given: list[Rule] = [*BASE_RULES, *map(_numbers, nodes)]
    copies = [[str(path), *_numbers(path)] for path in nodes]

    def ask(rules: list[Rule] | tuple[Rule, ...], **question: Any) -> dict[str, Any]:
        cgroup.allow(rules)
        with Probe(cgroup) as probe:
            return probe.ask(nodes=["/dev/null", *names], copies=copies, nvml=True, **question)

    without = finding.fact("without any node", ask(BASE_RULES, cuda=True))
    finding.expect(without["nodes"]["/dev/null"] == "open", "/dev/null cannot be opened")
    barred = {name: without["nodes"][name] for name in names}
    finding.expect(set(barred.values()) == {"EPERM"}, f"nodes that were not given: {barred}")
    finding.expect("open" not in without["copies"].values(), f"nodes made by mknod can be opened: {without['copies']}")
    finding.expect(without["nvml"]["init"] != 0 or without["nvml"]["counted"] == 0, "NVML works without its nodes")
    finding.expect(without["cuda"] != "works", "CUDA works without its nodes")

    with_nodes = finding.fact("with its nodes", ask(given, cuda=True))
    finding.expect(set(with_nodes["nodes"].values()) == {"open"}, f"nodes that were given: {with_nodes['nodes']}")
    finding.expect(with_nodes["nvml"].get(f"memory {gpu.index}") == 0, f"NVML with its nodes: {with_nodes['nvml']}")
    finding.expect(with_nodes["cuda"] == "works", f"CUDA with its nodes: {with_nodes['cuda']}")

    # What a process sees that may talk to the driver but to no GPU: a fact to know, with no right or wrong.
    finding.fact("with /dev/nvidiactl alone", ask([*BASE_RULES, _numbers(control)])["nvml"])

    _swap(finding, cgroup, gpu, given, names)
    _attribute(bench, finding, cgroup, gpu, given)


def _swap(finding: Finding, cgroup: DeviceCgroup, gpu: Gpu, given: list[Rule], names: list[str]) -> None:
    """Rules that change while a process runs: what it holds stays open, and it opens nothing again.

    That is how a container's "Failed to initialize NVML: Unknown Error" comes about.
    """
    cgroup.allow(given)
    with Probe(cgroup) as probe:
        before = probe.ask(nodes=names, hold=gpu.uuid)
        cgroup.allow(BASE_RULES)
        after = probe.ask(nodes=names, hold=gpu.uuid, nvml=True)
    finding.expect(before["held"] == 0, f"NVML with its nodes: code {before['held']}")
    finding.fact("after its nodes were taken away", after)
    finding.expect(set(after["nodes"].values()) == {"EPERM"}, f"nodes taken away are opened again: {after['nodes']}")


def _attribute(bench: Bench, finding: Finding, cgroup: DeviceCgroup, gpu: Gpu, given: list[Rule]) -> None:
    """From outside, a PID that NVML lists leads to the cgroup."""
    cgroup.allow(given)
    with CudaProgram(gpu.uuid, "driver", enter=cgroup.enter) as program:
        program.order("allocate", 256 * MIB)
        listed = bench.processes(gpu.handle)
        if finding.expect(program.pid in listed, f"NVML lists PIDs {sorted(listed)} and not {program.pid}"):
            finding.expect(cgroup.holds(program.pid), "the listed PID is not in the cgroup")
            finding.fact("attribution", f"{(listed[program.pid] or 0) // MIB} MiB told for a process in the cgroup")
