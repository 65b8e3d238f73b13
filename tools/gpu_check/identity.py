"""Checks: the library that answers, and the GPUs that it lists, against nvidia-smi, PCI and this project's own provider."""

from __future__ import annotations

import asyncio
import csv
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_check.bench import MIB, Bench, Gpu
from gpu_check.record import CannotRunError, Finding

_SMI_TIMEOUT_SECONDS = 60


def driver(bench: Bench, finding: Finding) -> None:
    """NVML, the kernel module and their versions agree."""
    version = finding.fact("driver version", bench.nvml.nvmlSystemGetDriverVersion())
    finding.fact("library", "FALSE: " + bench.pretended if bench.pretended else "NVIDIA's")
    bench.real_only()
    module = Path("/proc/driver/nvidia/version").read_text()
    finding.fact("kernel module", "open" if "Open Kernel Module" in module else "proprietary")
    finding.expect(version in module, f"the kernel module is not of version {version}")


def inventory(bench: Bench, finding: Finding) -> None:
    """Each GPU is what nvidia-smi says it is."""
    nvml = bench.nvml
    columns: dict[str, Callable[[Gpu], Any]] = {
        "uuid": lambda gpu: gpu.uuid,
        "index": lambda gpu: str(gpu.index),
        "name": lambda gpu: gpu.name,
        "pci.bus_id": lambda gpu: gpu.bus_id,
        "driver_version": lambda _: nvml.nvmlSystemGetDriverVersion(),
        "memory.total": lambda gpu: str(nvml.nvmlDeviceGetMemoryInfo(gpu.handle).total // MIB),
        "compute_cap": lambda gpu: ".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(gpu.handle))),
        "compute_mode": lambda gpu: str(nvml.nvmlDeviceGetComputeMode(gpu.handle)),
    }
    rows = {row["uuid"]: row for row in _smi(list(columns))}
    modes = {"Default": "0", "Exclusive_Thread": "1", "Prohibited": "2", "Exclusive_Process": "3"}
    finding.expect({gpu.uuid for gpu in bench.gpus} == set(rows), "nvidia-smi lists other GPUs than NVML opens")
    for gpu in bench.gpus:
        row = rows.get(gpu.uuid, {})
        row["compute_mode"] = modes.get(row.get("compute_mode", ""), row.get("compute_mode", ""))
        for column, ours in columns.items():
            theirs = row.get(column, "")
            finding.expect(ours(gpu) == theirs, f"{gpu.label}: {column} is {ours(gpu)}, and {theirs} in nvidia-smi")
        finding.fact(gpu.label, {key: value for key, value in row.items() if key not in ("uuid", "index")})


def mig(bench: Bench, finding: Finding) -> None:
    """MIG devices are those of `nvidia-smi -L`; each knows its GPU, and its handle is found by its UUID."""
    nvml = bench.nvml
    split = [gpu for gpu in bench.gpus if bench.has_mig(gpu)]
    if not split:
        raise CannotRunError("MIG is off on each GPU, and not ours to turn on")
    found = {}
    for gpu in split:
        for uuid, handle in bench.mig_devices(gpu).items():
            parent = nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle))
            finding.expect(parent == gpu.uuid, f"{uuid[:12]} says that its GPU is {parent}")
            same = nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByUUID(uuid))
            finding.expect(same == uuid, f"{uuid[:12]} is not found by its UUID")
            attributes = nvml.nvmlDeviceGetAttributes_v2(handle)
            found[uuid] = {
                "GPU": gpu.label,
                "index": nvml.nvmlDeviceGetIndex(handle),
                "name": nvml.nvmlDeviceGetName(handle),
                "GPU instance": nvml.nvmlDeviceGetGpuInstanceId(handle),
                "multiprocessors": attributes.multiprocessorCount,
                "memory MiB": attributes.memorySizeMB,
            }
            finding.fact(uuid[:12], found[uuid])
    listed = set(re.findall(r"MIG-[0-9a-f-]{36}", _smi_output("-L")))
    finding.expect(set(found) == listed, "nvidia-smi -L lists other MIG devices")


def pci(bench: Bench, finding: Finding) -> None:
    """Each GPU stands in sysfs at its address, from NVIDIA, with its NUMA node and processors."""
    words = 1 + max(_cpus(Path("/sys/devices/system/cpu/possible").read_text())) // 64
    for gpu in bench.gpus:
        device = Path("/sys/bus/pci/devices") / gpu.bus_id.lower().removeprefix("0000")
        mask = bench.attempt(lambda gpu=gpu: list(bench.nvml.nvmlDeviceGetCpuAffinity(gpu.handle, words)))
        facts: dict[str, Any] = finding.fact(gpu.label, {"address": gpu.bus_id, "minor": gpu.minor})
        facts["NUMA node by NVML"] = bench.attempt(lambda gpu=gpu: bench.nvml.nvmlDeviceGetNumaNodeId(gpu.handle))
        if bench.pretended:
            continue
        if not finding.expect(device.is_dir(), f"{gpu.label}: sysfs has no device at {gpu.bus_id}"):
            continue
        finding.expect((device / "vendor").read_text().strip() == "0x10de", f"{gpu.label}: not of NVIDIA in sysfs")
        facts["NUMA node by sysfs"] = int((device / "numa_node").read_text())
        near = _cpus((device / "local_cpulist").read_text())
        facts["CPUs near it by sysfs"] = len(near)
        if not isinstance(mask, list):
            facts["CPUs near it by NVML"] = mask
            continue
        ours = {cpu for cpu in range(words * 64) if mask[cpu // 64] >> cpu % 64 & 1}
        facts["CPUs near it by NVML"] = len(ours)
        # Without a NUMA node there is no near and far.
        if facts["NUMA node by sysfs"] >= 0:
            finding.expect(ours == near, f"{gpu.label}: NVML names other CPUs than sysfs' local_cpulist")
    bench.real_only()


def provider(bench: Bench, finding: Finding) -> None:
    """The node's own provider lists the same GPUs."""
    try:
        from nodeservice.gpu.nvml import NvmlGpuProvider
    except ImportError as error:
        raise CannotRunError(f"nodeservice.gpu cannot be imported here: {error}") from error

    async def look() -> Any:
        provider = NvmlGpuProvider()
        try:
            return await provider.inventory()
        finally:
            await provider.close()

    found = asyncio.run(look())
    finding.fact("error", found.error)
    finding.expect(found.error is None, f"the provider reports: {found.error}")
    listed = {gpu.uuid: gpu for gpu in found.gpus}
    finding.expect(set(listed) >= {gpu.uuid for gpu in bench.gpus if not bench.has_mig(gpu)}, "it lists other GPUs")
    for gpu in bench.gpus:
        if gpu.uuid in listed:
            total_bytes = bench.nvml.nvmlDeviceGetMemoryInfo(gpu.handle).total
            finding.expect(listed[gpu.uuid].name == gpu.name, f"{gpu.label}: it has another name")
            finding.expect(listed[gpu.uuid].memory_total_bytes == total_bytes, f"{gpu.label}: it has other memory")
    finding.fact("GPUs", len(listed))


def _smi(columns: list[str]) -> list[dict[str, str]]:
    output = _smi_output(f"--query-gpu={','.join(columns)}", "--format=csv,noheader,nounits")
    return [dict(zip(columns, map(str.strip, row), strict=True)) for row in csv.reader(output.splitlines())]


def _smi_output(*arguments: str) -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        raise CannotRunError("nvidia-smi is not on PATH")
    done = subprocess.run(
        [command, *arguments], capture_output=True, text=True, timeout=_SMI_TIMEOUT_SECONDS, check=False
    )
    if done.returncode != 0:
        raise CannotRunError(f"nvidia-smi fails with {done.returncode}: {done.stdout.strip()[:200]}")
    return done.stdout


def _cpus(text: str) -> set[int]:
    """ "0-3,8" as numbers."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers
