"""Puts together who holds what and what the driver sees: memory by attempt, strangers, what is left behind. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nodeservice.core.gpus import ShareMethod
from nodeservice.core.model import MIB, AttemptId, Lease
from nodeservice.gpu.bill import GpuSample
from nodeservice.ports import Gpu, GpuInventory, GpuProcess, MigInstance

_SLACK_BYTES = 256 * MIB
_SLACK_SHARE = 100
"""The driver holds a little by itself: what is no more than a hundredth, or 256 MiB, is taken for nothing."""


@dataclass(frozen=True, slots=True)
class Place:
    """A GPU, or one MIG instance of it."""

    gpu: Gpu
    instance: MigInstance | None = None

    @property
    def uuid(self) -> str:
        return self.instance.uuid if self.instance is not None else self.gpu.uuid

    @property
    def name(self) -> str:
        return self.instance.name if self.instance is not None else self.gpu.name

    @property
    def used_bytes(self) -> int | None:
        return self.instance.memory_used_bytes if self.instance is not None else self.gpu.memory_used_bytes

    @property
    def total_bytes(self) -> int:
        return self.instance.memory_total_bytes if self.instance is not None else self.gpu.memory_total_bytes

    @property
    def processes(self) -> tuple[GpuProcess, ...]:
        if self.instance is None:
            return self.gpu.processes
        own = self.instance.gpu_instance_id
        return tuple(process for process in self.gpu.processes if process.gpu_instance_id == own)


def left_behind_bytes(place: Place, owners: Mapping[int, AttemptId]) -> int:
    """What is used beyond what the driver holds by itself; 0 where that is not known.

    What a process holds that `owners` does not know is left out: it has ended, or it is an MPS server.
    """
    passing = sum(process.memory_bytes or 0 for process in place.processes if process.pid not in owners)
    used = (place.used_bytes or 0) - passing
    return used if used > max(_SLACK_BYTES, place.total_bytes // _SLACK_SHARE) else 0


def places(inventory: GpuInventory) -> dict[str, Place]:
    """By UUID: all that tasks can hold, and GPUs that are split."""
    found: dict[str, Place] = {}
    for gpu in inventory.gpus:
        found[gpu.uuid] = Place(gpu)
        found.update((instance.uuid, Place(gpu, instance)) for instance in gpu.mig_instances)
    return found


def memory_of(place: Place, id_: AttemptId, owners: Mapping[int, AttemptId]) -> int | None:
    """What the attempt's processes hold there; None where the driver does not tell it of one of them."""
    held = [process.memory_bytes for process in place.processes if owners.get(process.pid) == id_]
    return None if any(count is None for count in held) else sum(count or 0 for count in held)


def strangers(place: Place, holders: Iterable[AttemptId], owners: Mapping[int, AttemptId]) -> list[int]:
    """Processes there that belong to nobody who holds it. One that `owners` does not know has ended since the look."""
    allowed = set(holders)
    pids = {process.pid for process in place.processes}
    return sorted(pid for pid in pids if pid in owners and owners[pid] not in allowed)


def still_there(place: Place, owners: Mapping[int, AttemptId]) -> str:
    """Who or what is on what nobody should use, in words; empty where nothing is."""
    pids, left_bytes = strangers(place, (), owners), left_behind_bytes(place, owners)
    return f"{len(pids)} processes and {left_bytes} bytes are still" if pids or left_bytes else ""


def touched(lease: Lease, gpu: str, instance_id: int | None, seen: Mapping[str, Place]) -> list[str]:
    """Which units of a lease lie on this GPU; only the one with this id, where there is one."""
    found: list[str] = []
    for uuid in lease.gpu_uuids:
        place = seen.get(uuid)
        if place is None:  # then it is by itself what it lies on
            found += [uuid] if uuid == gpu else []
            continue
        other_instance = (
            instance_id is not None and place.instance is not None and place.instance.gpu_instance_id != instance_id
        )
        if place.gpu.uuid == gpu and not other_instance:
            found.append(uuid)
    return found


def sample(place: Place, id_: AttemptId, lease: Lease, owners: Mapping[int, AttemptId]) -> GpuSample:
    """What of it concerns one attempt that holds it."""
    alone = lease.gpu_part is None or lease.gpu_part.method is ShareMethod.MIG
    whole = alone and place.instance is None
    if place.gpu.lost:  # what else is known of it is of before
        return GpuSample(uuid=place.uuid, name=place.name)
    own = memory_of(place, id_, owners)
    known = [count for count in (own, place.used_bytes) if count is not None]
    return GpuSample(
        uuid=place.uuid,
        name=place.name,
        utilization_percent=place.gpu.utilization_percent if whole else None,
        memory_bytes=max(known, default=None) if alone else own,
        energy_millijoules=place.gpu.energy_millijoules if whole else None,
        throttle_reasons=place.gpu.throttle_reasons,
    )
