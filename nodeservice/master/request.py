"""What a task asks for, as the master reads it: amounts, and which GPUs will do."""

from __future__ import annotations

from dataclasses import dataclass, field

from nodeservice.master.amounts import GIB, Amounts


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuWish:
    """What a task asks of GPUs: `count` whole ones (or MIG instances), or a part of one. What is empty accepts any."""

    count: int = 0
    model: str = ""
    min_memory_bytes: int = 0
    min_compute_capability: tuple[int, int] = (0, 0)
    mig_profile: str = ""
    uuids: frozenset[str] = frozenset()
    part_milli: int = 0
    """A part as a fraction of memory and compute; else by amounts."""
    part_memory_bytes: int = 0
    part_sm_percent: int = 0

    @property
    def is_part(self) -> bool:
        return bool(self.part_milli or self.part_memory_bytes or self.part_sm_percent)

    @property
    def is_something(self) -> bool:
        return self.count > 0 or self.is_part

    @property
    def takes_any(self) -> bool:
        """A number alone, or nothing."""
        return self == GpuWish(count=self.count)

    @property
    def words(self) -> str:
        """`2 GPU (model T4)`, `0.5 of a GPU`."""
        size = f"{self.count} GPU"
        if self.part_milli:
            size = f"{self.part_milli / 1000:g} of a GPU"
        elif self.is_part:
            amounts = [f"{self.part_memory_bytes / GIB:g} GiB" if self.part_memory_bytes else ""]
            amounts.append(f"{self.part_sm_percent} % of the SMs" if self.part_sm_percent else "")
            size = " and ".join(filter(None, amounts)) + " of a GPU"
        told = [
            f"model {self.model}" if self.model else "",
            f"MIG profile {self.mig_profile}" if self.mig_profile else "",
            f"at least {self.min_memory_bytes / GIB:g} GiB" if self.min_memory_bytes else "",
            "compute capability {}.{} and up".format(*self.min_compute_capability)
            if self.min_compute_capability != (0, 0)
            else "",
            f"{len(self.uuids)} named" if self.uuids else "",
        ]
        described = ", ".join(filter(None, told))
        return f"{size} ({described})" if described else size


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """`amounts.gpu_count` is the number of whole GPUs (and MIG instances), the same as in `gpus`; a part counts 0 there."""

    amounts: Amounts = field(default_factory=Amounts)
    gpus: GpuWish = field(default_factory=GpuWish)
