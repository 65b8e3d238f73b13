"""What a task was promised, limit by limit, in the words of a `Reading`; pure.

Some of it no task asks for, and every task gets: no new privileges, a filter of system calls, no core files.
"""

from __future__ import annotations

from nodeservice.core.gpus import HOLDS_COMPUTE
from nodeservice.core.model import MIB, Lease, TaskSpec

Value = int | str

CAPABILITY_BITS = {
    "CHOWN": 0,
    "DAC_OVERRIDE": 1,
    "FOWNER": 3,
    "FSETID": 4,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
    "NET_BIND_SERVICE": 10,
    "NET_RAW": 13,
    "SYS_CHROOT": 18,
    "MKNOD": 27,
    "AUDIT_WRITE": 29,
    "SETFCAP": 31,
}
"""The default set of Docker Engine (docs.docker.com/engine/security), with the bits of linux/capability.h."""
DROPPED_CAPABILITIES = ("NET_RAW", "MKNOD", "AUDIT_WRITE")
"""Taken from that set.

Raw sockets allow spoofing on the bridge that all tasks share; device nodes could be made for a GPU or disk that was not
granted, wherever the device cgroup is lax; audit records could be forged. The rest of the default set stays, for images
that install packages or drop privileges at start need it.
"""
CORE_FILE_BYTES = 1
"""No core files: none fits into one byte.

With 0 a host that pipes them to a program would still start it, as root outside of all limits, and feed it the task's memory
(measured). 1 is the one value with which the kernel does not (fs/coredump.c).
"""
SECCOMP_FILTER = 2
"""proc(5): 0 is no confinement, 1 strict, 2 a filter."""
OOM_SCORE_ADJ = 0
"""Less would have the kernel prefer a process of the host."""
STANDARD_DEVICES = "standard"

_MIN_SHM_BYTES = 64 * MIB


def shm_bytes(memory_bytes: int) -> int:
    """The size of /dev/shm. What lies in it counts as the task's memory, so it never adds to what the task may take."""
    return max(_MIN_SHM_BYTES, memory_bytes // 2)


def allowed_capabilities() -> int:
    return sum(1 << bit for name, bit in CAPABILITY_BITS.items() if name not in DROPPED_CAPABILITIES)


def capabilities_text(mask: int) -> str:
    """As /proc/PID/status writes it."""
    return f"{mask:016x}"


def capability_names(mask: int) -> str:
    names = {bit: name for name, bit in CAPABILITY_BITS.items()}
    return ", ".join(names.get(bit, f"capability {bit}") for bit in range(64) if mask >> bit & 1)


def asked_limits(spec: TaskSpec, lease: Lease) -> dict[str, Value]:
    """By name of the limit, in the order in which people want to read them. What was not asked for is not in it."""
    request = spec.request
    asked: dict[str, Value] = {
        "cpu_milli": request.cpu_milli,
        "memory_bytes": request.memory_bytes,
        "memory_swap_bytes": request.memory_bytes,
        "pids_limit": spec.pids_limit,
    }
    asked = {name: value for name, value in asked.items() if isinstance(value, int) and value > 0}
    if request.disk_bytes > 0:
        asked["disk_bytes"] = request.disk_bytes
    if lease.cpu_ids:
        asked["cpu_ids"] = ids_text(frozenset(lease.cpu_ids))
    if spec.read_bytes_per_second is not None:
        asked["read_bytes_per_second"] = spec.read_bytes_per_second
    if spec.write_bytes_per_second is not None:
        asked["write_bytes_per_second"] = spec.write_bytes_per_second
    if lease.gpu_part is not None:
        asked["gpu_memory_bytes"] = lease.gpu_part.memory_bytes
        if lease.gpu_part.method in HOLDS_COMPUTE and lease.gpu_part.sm_percent:
            asked["gpu_sm_percent"] = lease.gpu_part.sm_percent
    asked["shm_bytes"] = shm_bytes(request.memory_bytes)
    asked["open_files_limit"] = spec.open_files_limit
    asked["core_file_bytes"] = CORE_FILE_BYTES
    asked["capabilities"] = capabilities_text(allowed_capabilities())
    asked["no_new_privileges"] = 1
    asked["seccomp"] = SECCOMP_FILTER
    asked["oom_score_adj"] = OOM_SCORE_ADJ
    gpus = len(lease.gpu_uuids)
    asked["devices"] = asked["device_rules"] = STANDARD_DEVICES + (f" and {gpus} GPU" if gpus else "")
    if gpus:
        asked["gpu_uuids"] = " ".join(lease.gpu_uuids)
    return asked


def ids_text(ids: frozenset[int]) -> str:
    """`0-1,4`, the way the kernel writes lists of CPUs (cpuset(7))."""
    parts: list[str] = []
    for id_ in sorted(ids):
        if id_ - 1 in ids:
            continue
        last = id_
        while last + 1 in ids:
            last += 1
        parts.append(str(id_) if last == id_ else f"{id_}-{last}")
    return ",".join(parts)


def ids_of(text: str) -> frozenset[int]:
    """Raises ValueError for what is no list of CPUs."""
    ids: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        ids.update(range(int(first), int(last or first) + 1))
    return frozenset(ids)
