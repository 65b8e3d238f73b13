"""Compares the devices that a container has, and the GPUs that the driver shows it, with those of its lease; pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from nodeservice.limits import device_rules
from nodeservice.limits.device_nodes import (
    FIRST_CONTROL_MINOR,
    NVIDIA_MAJOR,
    STANDARD_NODES,
    FoundNode,
    GpuNodes,
    of_words,
    owner,
)

GPU_UUIDS = "gpu_uuids"
_GPU_NAME = re.compile(r"nvidia\d+")
_SUPPORT_NAME = re.compile(r"nvidia(ctl|-uvm|-uvm-tools|-modeset|-nvswitchctl|-caps/nvidia-cap\d+)")
_MIG_CONFIG_NAMES = frozenset({"nvidia-caps/nvidia-cap1", "nvidia-caps/nvidia-cap2"})
"""To change and to watch the MIG layout of all GPUs (NVIDIA's MIG user guide, device nodes and capabilities)."""
_LISTED = re.compile(r"(?P<indent>\s*)(?:GPU|MIG)\b.*\(UUID: (?P<uuid>(?:GPU|MIG)-[^)\s]{1,100})\)\s*\Z")


def foreign_nodes(held: str, gpus: Sequence[GpuNodes], granted: Sequence[str]) -> str:
    """In words, which nodes of /dev a container should not have, or lacks; empty where all is as granted.

    `gpus` are those of this host; the nodes of a GPU that is not among them are told by name and count alone.
    """
    nodes = list(of_words(held))
    known = [gpu for gpu in gpus if gpu.uuid in granted]
    foreign = [said for node in nodes if (said := _foreign(node, gpus, known, granted))]
    if foreign:
        return f"sees {', '.join(foreign)}, which it was not granted"
    if len(known) < len(granted):
        count = sum(_GPU_NAME.fullmatch(node.name) is not None for node in nodes)
        return f"sees {count} GPUs, was granted {len(granted)}" if count > len(granted) else ""
    present = {node.number for node in nodes}
    missing = [gpu.uuid for gpu in known if gpu.node not in present]
    return f"does not see {', '.join(missing)}, which it was granted" if missing else ""


def foreign_uuids(held: str, gpus: Sequence[GpuNodes], granted: Sequence[str]) -> str:
    """`held` as `seen_uuids` gives it. The GPU that a granted MIG device is a part of shows too."""
    parents = {gpu.parent_uuid for gpu in gpus if gpu.uuid in granted}
    foreign = [uuid for uuid in held.split() if uuid not in granted and uuid not in parents]
    return f"the driver shows {', '.join(foreign)}, which it was not granted" if foreign else ""


GPU_LIMITS: Mapping[str, Callable[[str, Sequence[GpuNodes], Sequence[str]], str]] = {
    "devices": foreign_nodes,
    device_rules.DEVICE_RULES: device_rules.forbidden,
    GPU_UUIDS: foreign_uuids,
}


def seen_uuids(listing: str) -> list[str]:
    """From the output of `nvidia-smi -L`, which a task may have forged: MIG devices, and GPUs that show none.

    A GPU that shows MIG devices cannot be used but through them.
    """
    return [uuid for uuid, is_parent in _listed(listing) if not is_parent]


def _listed(listing: str) -> Iterator[tuple[str, bool]]:
    """Each UUID in order, and whether MIG devices follow below it."""
    found = [match for line in listing.splitlines() if (match := _LISTED.fullmatch(line))]
    for match, following in zip(found, [*found[1:], None], strict=False):
        yield match["uuid"], not match["indent"] and following is not None and bool(following["indent"])


def _foreign(node: FoundNode, gpus: Sequence[GpuNodes], known: Sequence[GpuNodes], granted: Sequence[str]) -> str:
    """What a node is called that should not be there; empty for one that may."""
    if node.number is None:
        return "" if node.name in STANDARD_NODES else node.name
    shown = f"{node.name} ({node.number[0]}:{node.number[1]})"
    if node.is_block:
        return shown
    other = owner(node.number, gpus, granted)
    if other is not None:
        return f"{shown} of {other}"
    if any(node.number in gpu.numbers for gpu in known):
        return ""
    is_a_gpu = node.number[0] == NVIDIA_MAJOR and node.number[1] < FIRST_CONTROL_MINOR
    if is_a_gpu or _GPU_NAME.fullmatch(node.name):
        # Another's, or one that nobody told of: then the count decides.
        return shown if len(known) == len(granted) else ""
    if not granted or node.name in _MIG_CONFIG_NAMES or not _SUPPORT_NAME.fullmatch(node.name):
        return shown
    return ""
