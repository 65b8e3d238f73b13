"""What `inspect --json` tells of GPUs: what a node tells its master, and what only this host can know."""

from __future__ import annotations

from nodeservice.cli.gpu_json import gpus_document
from nodeservice.daemon.look import Seen
from nodeservice.gpu.health import GpuState
from nodeservice.limits.asked import ids_text
from nodeservice.ports import Gpu
from nodeservice.rpc.convert_gpu import gpu_infos

_WELL = (GpuState.WELL, "")


def gpu_dicts(seen: Seen) -> list[dict[str, object]]:
    """The same keys as in `nodes --json`, and more."""
    inventory = seen.capacity.host.gpus
    infos = gpu_infos(
        inventory,
        seen.capacity.gpu_units,
        seen.gpu_leases,
        lambda uuid: seen.gpu_health.get(uuid, _WELL),
        sharing_allowed=seen.gpu_sharing_allowed,
    )
    found = {gpu.uuid: gpu for gpu in inventory.gpus}
    return [document | _hardware(found[str(document["uuid"])]) for document in gpus_document(infos)]


def _hardware(gpu: Gpu) -> dict[str, object]:
    """Null for what the driver does not tell; `closeness` to other GPUs: 1,000 for each NVLink, less over PCI Express.

    `near_cpu_ids` as the kernel writes lists of CPUs.
    """
    return {
        "minor": gpu.minor,
        "near_cpu_ids": ids_text(frozenset(gpu.cpu_ids)),
        "closeness": dict(gpu.closeness),
        "mig_enabled": gpu.mig_enabled,
        "remap_pending": gpu.remap_pending,
        "remap_failed": gpu.remap_failed,
        "recovery_action": gpu.recovery_action,
        "compute_mode": gpu.compute_mode,
        "process_count": len(gpu.processes),
    }
