"""Amounts of the four resources that the master places on."""

from __future__ import annotations

from dataclasses import dataclass

from nodeservice.wire import master_worker_pb2 as pb

GIB = 1024**3

LABELS = {"cpu_milli": "CPU", "memory_bytes": "memory", "disk_bytes": "disk", "gpu_count": "GPU"}
"""Fields of `Amounts` in the order in which a shortage is named, with the word for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    cpu_milli: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    gpu_count: int = 0

    def plus(self, other: Amounts) -> Amounts:
        return Amounts(
            cpu_milli=self.cpu_milli + other.cpu_milli,
            memory_bytes=self.memory_bytes + other.memory_bytes,
            disk_bytes=self.disk_bytes + other.disk_bytes,
            gpu_count=self.gpu_count + other.gpu_count,
        )

    def minus(self, other: Amounts) -> Amounts:
        """The difference; negative where more is taken than there is."""
        return Amounts(
            cpu_milli=self.cpu_milli - other.cpu_milli,
            memory_bytes=self.memory_bytes - other.memory_bytes,
            disk_bytes=self.disk_bytes - other.disk_bytes,
            gpu_count=self.gpu_count - other.gpu_count,
        )

    def of(self, resource: str) -> int:
        """The amount of one resource, named by a key of `LABELS`."""
        return int(getattr(self, resource))

    def lacking(self, request: Amounts) -> tuple[str, ...]:
        """Which resources (keys of `LABELS`) are too small here for `request`; empty when it fits.

        A resource of which nothing is asked is never lacking, even where more than everything is taken.
        """
        if (
            request.cpu_milli <= self.cpu_milli
            and request.memory_bytes <= self.memory_bytes
            and request.disk_bytes <= self.disk_bytes
            and request.gpu_count <= self.gpu_count
        ):
            return ()
        return tuple(name for name in LABELS if request.of(name) > max(0, self.of(name)))


def describe(resource: str, amount: int) -> str:
    """An amount with its unit, for people: `1.5 CPU`, `2.00 GiB memory`, `1 GPU`."""
    if resource == "cpu_milli":
        return f"{amount / 1000:g} CPU"
    if resource == "gpu_count":
        return f"{amount} GPU"
    if abs(amount) >= GIB:
        return f"{amount / GIB:.2f} GiB {LABELS[resource]}"
    return f"{amount / 1024**2:.1f} MiB {LABELS[resource]}"


def shortage_reason(resource: str) -> str:
    """The stable reason for a shortage, such as INSUFFICIENT_MEMORY; the same words that a node uses."""
    return "INSUFFICIENT_" + ("STORAGE" if resource == "disk_bytes" else LABELS[resource].upper())


def from_message(message: pb.Resources) -> Amounts:
    return Amounts(
        cpu_milli=message.cpu_milli,
        memory_bytes=message.memory_bytes,
        disk_bytes=message.disk_bytes,
        gpu_count=message.gpu_count,
    )


def to_message(amounts: Amounts) -> pb.Resources:
    return pb.Resources(
        cpu_milli=amounts.cpu_milli,
        memory_bytes=amounts.memory_bytes,
        disk_bytes=amounts.disk_bytes,
        gpu_count=amounts.gpu_count,
    )
