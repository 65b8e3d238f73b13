"""What the state file can say of a device: a machine written as sections, and facts checked before they are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from nodeservice.testing.false_driver.machines import MIB, MIG_PROFILES, FalseMig, Machine
from nodeservice.testing.false_driver.state import Sections

Given = int | str | tuple[int, int, int, int] | None

_REMAPPED = ("remapped_corrected", "remapped_uncorrected", "remapped_pending", "remapped_failure")
_HEADER = Path(__file__).parent / "native" / "state.h"
_GPU_TEXTS = frozenset({"name", "serial", "cpus", "pcie_switch", "bus_id"})


@cache
def known_facts(kind: str) -> frozenset[str]:
    """The names that the library knows: those of the macro GPU_FACTS or MIG_FACTS in its header."""
    macro = re.search(rf"#define {kind}_FACTS\(X\)((?:.*\\\n)*.*)", _HEADER.read_text())
    return frozenset(re.findall(r"X\((\w+)\)", macro[1])) if macro else frozenset()


def gpu_facts(given: Mapping[str, Given]) -> dict[str, str]:
    """As the state file has them. ValueError for one that the library does not know."""
    spread = dict(given)
    if (rows := spread.pop("remapped_rows", None)) is not None:
        if not isinstance(rows, tuple):
            raise ValueError("remapped_rows is (corrected, uncorrected, pending, failure)")
        spread.update(zip(_REMAPPED, rows, strict=True))
    elif "remapped_rows" in given:
        spread.update(dict.fromkeys(_REMAPPED))
    return _checked(spread, known_facts("GPU") | _GPU_TEXTS)


def mig_facts(given: Mapping[str, Given]) -> dict[str, str]:
    """The same for a MIG device."""
    return _checked(given, known_facts("MIG"))


def _checked(given: Mapping[str, Given], known: frozenset[str]) -> dict[str, str]:
    if unknown := sorted(set(given) - known):
        raise ValueError(f"no such facts: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return {name: "" if value is None else str(value) for name, value in given.items()}


def layout(mig: FalseMig, gpu: str) -> dict[str, str]:
    """The section of a MIG device."""
    profile = MIG_PROFILES[mig.profile]
    return {
        "gpu": gpu,
        "profile": mig.profile,
        "index": str(mig.index),
        "gpu_instance": str(mig.gpu_instance),
        "compute_instance": str(mig.compute_instance),
        "memory_total_bytes": str(profile.memory_mib * MIB),
        "multiprocessors": str(profile.multiprocessors),
        "copy_engines": str(profile.slices),
        "decoders": str(profile.decoders),
        "encoders": "0",
        "jpegs": str(profile.jpegs),
        "ofas": str(profile.ofas),
        "gpu_slices": str(profile.slices),
        "compute_slices": str(profile.slices),
    }


def sections_of(machine: Machine) -> Sections:
    """A machine at its start. The PIDs of its processes will be those of our own PID namespace."""
    sections: Sections = {
        "driver": {
            "machine": machine.name,
            "version": machine.driver_version,
            "nvml_version": machine.nvml_version,
            "cuda_version": str(machine.cuda_version),
            "init_error": str(machine.init_error),
            "pid_namespace": str(os.stat("/proc/self/ns/pid").st_ino),
        }
    }
    for gpu in machine.gpus:
        facts = {key: str(value) for key, value in gpu.facts.items()}
        sections[f"gpu {gpu.uuid}"] = {"name": gpu.name, "bus_id": gpu.bus_id, **facts}
        sections |= {f"mig {mig.uuid}": layout(mig, gpu.uuid) for mig in gpu.migs}
    return sections
