"""What the configuration keeps back for the host, and what it says about parts of GPUs."""

from __future__ import annotations

from nodeservice.capacity.reserve import Reserve
from nodeservice.config import NodeConfig
from nodeservice.core.model import Resources
from nodeservice.errors import ConfigError
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


CALLERS_UNKNOWN = "CALLERS_UNKNOWN"
"""A warning, no error: a proxy may ask callers who they are. Plain text asks nobody either, but is chosen in words."""
HEARTBEAT_SLOW = "HEARTBEAT_SLOW"
"""A warning, no error: a master can be told to wait for longer."""
_MASTERS_WAIT_SECONDS = 30.0


def check_reserve(config: NodeConfig, capacity: Resources) -> None:
    """Raise ConfigError where the configuration keeps back all of something: no task could ever run here."""
    for name in ("cpu_milli", "memory_bytes", "disk_bytes"):
        kept, there = getattr(config, f"reserve_{name}"), getattr(capacity, name)
        if kept is not None and kept >= there:
            raise ConfigError(
                f"reserve_{name} = {kept} leaves nothing for tasks: this host has {there}",
                field=f"reserve_{name}",
                hint="keep back less than there is; unset, a share of it is kept back",
            )


def doubts(config: NodeConfig) -> dict[str, str]:
    """What may be meant and mostly is not, by name, in words."""
    found = {}
    if config.tls_cert is not None and config.tls_ca is None:
        words = f"tls_ca is not set, so whoever reaches {config.listen} may assign tasks"
        found[CALLERS_UNKNOWN] = f"{words} (give the authority whose certificates callers have to show)"
    seconds = config.heartbeat_seconds
    if seconds >= _MASTERS_WAIT_SECONDS:
        words = f"heartbeat_seconds = {seconds:g}, but masters take a node for silent after {_MASTERS_WAIT_SECONDS:g}"
        found[HEARTBEAT_SLOW] = f"{words} (set a few seconds, or raise the master's --heartbeat-timeout above it)"
    return found
