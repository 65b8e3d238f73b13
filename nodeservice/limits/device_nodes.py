"""The device nodes by which GPUs are opened, by their numbers, and the words in which a container's nodes are read back.

Sources: Documentation/admin-guide/devices.txt (major 195 and the standard nodes), NVIDIA's driver README (device nodes, the
`nvidia-caps` of MIG in /proc/driver/nvidia/capabilities), sysfs (drm below a PCI device).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nodeservice.ports import GpuInventory

DeviceNumber = tuple[int, int]
"""Major and minor of a character device."""

NVIDIA_MAJOR = 195
FIRST_CONTROL_MINOR = 254
"""nvidia-modeset; nvidiactl is 255. All below are GPUs."""
STANDARD_NODES: dict[str, frozenset[DeviceNumber]] = {
    "console": frozenset({(5, 1)}),
    "full": frozenset({(1, 7)}),
    "null": frozenset({(1, 3)}),
    "ptmx": frozenset({(5, 2)}),
    "random": frozenset({(1, 8)}),
    "tty": frozenset({(5, 0)}),
    "urandom": frozenset({(1, 9)}),
    "zero": frozenset({(1, 5)}),
}
PTS_MAJORS = range(136, 144)
_WORD = re.compile(r"(?P<name>.*?)(?:=(?P<block>b?)(?P<major>\d+):(?P<minor>\d+))?\Z", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuNodes:
    """The nodes of one GPU or MIG device of this host.

    `node` is that of /dev/nvidiaN, for a MIG device of the GPU that it is a part of. `also` are others that belong to it
    alone and that a container may or may not have: its DRM nodes, for a MIG device its two capabilities. `parent_uuid` names
    the GPU that a MIG device is a part of.
    """

    uuid: str
    node: DeviceNumber
    also: frozenset[DeviceNumber] = frozenset()
    parent_uuid: str | None = None

    @property
    def numbers(self) -> frozenset[DeviceNumber]:
        return self.also | {self.node}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundNode:
    """A node in a container's /dev. `number` is None for a standard one."""

    name: str
    number: DeviceNumber | None = None
    is_block: bool = False


def gpu_nodes(
    uuid: str,
    minor: int,
    *,
    pci_address: str | None = None,
    mig_instance: tuple[int, int] | None = None,
    parent_uuid: str | None = None,
    root: Path = Path("/"),
) -> GpuNodes:
    """Look them up on this host. `minor` is N of /dev/nvidiaN; `mig_instance` the GPU instance and compute instance ids.

    Blocking, and quick. What can't be read is left out of `also`.
    """
    also = set(_drm_numbers(pci_address, root) if pci_address else ())
    if mig_instance is not None:
        also |= set(_mig_numbers(minor, *mig_instance, root))
    return GpuNodes(uuid=uuid, node=(NVIDIA_MAJOR, minor), also=frozenset(also), parent_uuid=parent_uuid)


def gpu_nodes_of(inventory: GpuInventory) -> tuple[GpuNodes, ...]:
    """Of all GPUs and MIG devices of this host. One whose minor is not known is left out."""
    found: list[GpuNodes] = []
    for gpu in inventory.gpus:
        if gpu.minor is None:
            continue
        found.append(gpu_nodes(gpu.uuid, gpu.minor, pci_address=gpu.pci_address))
        for instance in gpu.mig_instances:
            ids = (instance.gpu_instance_id, instance.compute_instance_id)
            found.append(gpu_nodes(instance.uuid, gpu.minor, mig_instance=ids, parent_uuid=gpu.uuid))
    return tuple(found)


def to_word(name: str, number: DeviceNumber, *, is_block: bool) -> str:
    """`null`, `nvidia0=195:0`, `sda=b8:0`: only what has a standard node's name and number stands without the number."""
    major, minor = number
    plain = name.replace(" ", "?").replace("=", "?")
    is_console = name == "console" and major in PTS_MAJORS
    if not is_block and (number in STANDARD_NODES.get(name, ()) or is_console):
        return plain
    return f"{plain}={'b' if is_block else ''}{major}:{minor}"


def of_words(text: str) -> Iterator[FoundNode]:
    """What `to_word` wrote, blank between each."""
    for word in text.split():
        match = _WORD.fullmatch(word)
        if match is None or match["major"] is None:
            yield FoundNode(name=word)
        else:
            yield FoundNode(
                name=match["name"], number=(int(match["major"]), int(match["minor"])), is_block=bool(match["block"])
            )


def owner(number: DeviceNumber, gpus: Sequence[GpuNodes], granted: Sequence[str]) -> str | None:
    """The UUID of a GPU that was not granted and to which that number belongs; None where nobody's or one's own.

    MIG devices share their GPU's node, so a number of one's own is one's own whoever else has it too.
    """
    if any(number in gpu.numbers for gpu in gpus if gpu.uuid in granted):
        return None
    return next((gpu.uuid for gpu in gpus if number in gpu.numbers), None)


def _drm_numbers(pci_address: str, root: Path) -> Iterator[DeviceNumber]:
    domain, _, rest = pci_address.lower().partition(":")
    with suppress(OSError, ValueError):  # NVML writes domains with eight digits, sysfs with four
        for file in (root / f"sys/bus/pci/devices/{int(domain, 16):04x}:{rest}/drm").glob("*/dev"):
            major, _, minor = file.read_text(encoding="ascii").strip().partition(":")
            yield int(major), int(minor)


def _mig_numbers(minor: int, gpu_instance: int, compute_instance: int, root: Path) -> Iterator[DeviceNumber]:
    instance = root / f"proc/driver/nvidia/capabilities/gpu{minor}/mig/gi{gpu_instance}"
    major = _major("nvidia-caps", root)
    for file in (instance / "access", instance / f"ci{compute_instance}/access"):
        with suppress(OSError, ValueError):
            fields = dict(line.split(":", 1) for line in file.read_text(encoding="ascii").splitlines() if ":" in line)
            if major is not None:
                yield major, int(fields.get("DeviceFileMinor", ""))


def _major(name: str, root: Path) -> int | None:
    with suppress(OSError, ValueError):
        for line in (root / "proc/devices").read_text(encoding="ascii").splitlines():
            words = line.split()
            if words[1:] == [name]:
                return int(words[0])
    return None
