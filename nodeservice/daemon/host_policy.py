"""What the configuration keeps back for the host, and what it says about parts of GPUs."""

from __future__ import annotations

from nodeservice.capacity.source import Reserve
from nodeservice.config import NodeConfig
from nodeservice.gpu.units import SharingPolicy
from nodeservice.limits.hierarchy import host_cgroup_version


def sharing_policy(config: NodeConfig) -> SharingPolicy:
    return SharingPolicy(
        allowed=config.gpu_sharing == "watched",
        mig_counts=config.gpu_mig_counts,
        mps=config.gpu_mps_pipe_dir is not None,
        driver_limits=host_cgroup_version() == 2,
    )


def reserve(config: NodeConfig) -> Reserve:
    return Reserve(
        cpu_milli=config.reserve_cpu_milli,
        memory_bytes=config.reserve_memory_bytes,
        disk_bytes=config.reserve_disk_bytes,
    )
