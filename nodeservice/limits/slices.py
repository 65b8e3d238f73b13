"""A task's cgroup where systemd owns the tree and the engine asks it for scopes: explicit slices, over D-Bus.

A slice that exists only because a scope sits in it is collected when it is empty, and what it counted with it; one that was
started by name stays until it is stopped. A dash in a slice's name separates it from its parent's. Sources:
systemd.slice(5), systemd.resource-control(5), systemd.unit(5), org.freedesktop.systemd1(5).
"""

from __future__ import annotations

import errno
import hashlib
import re
import time
from typing import Any, ClassVar

from jeepney import DBusAddress, MessageType, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from nodeservice.core.model import AttemptId
from nodeservice.limits.hierarchy import TASKS_SLICE, Mount
from nodeservice.limits.plan import CPU_PERIOD_US, CgroupLimits, cpu_weight
from nodeservice.limits.tree import remove_tree
from nodeservice.limits.v2 import UnifiedCgroup, V2CgroupTree

_MANAGER = DBusAddress(
    "/org/freedesktop/systemd1", bus_name="org.freedesktop.systemd1", interface="org.freedesktop.systemd1.Manager"
)
_LITERAL = re.compile(r"[A-Za-z0-9:_.]")
_MAX_NAME = 255
"""Characters of a unit's name, its suffix included (systemd.unit(5))."""
_MAX_NODE = 180
"""Of a node's part of it, so that a task's has room."""
_CALL_SECONDS = 10.0
_EXISTS = "org.freedesktop.systemd1.UnitExists"
_NO_SUCH_UNIT = "org.freedesktop.systemd1.NoSuchUnit"


def escape(text: str) -> str:
    """As systemd-escape(1): what is not safe in a unit's name, the dash included, as `\\xNN`."""
    parts = []
    for position, byte in enumerate(text.encode("utf-8", "surrogatepass")):
        char = chr(byte)
        safe = byte < 128 and _LITERAL.match(char) and not (position == 0 and char == ".")
        parts.append(char if safe else f"\\x{byte:02x}")
    return "".join(parts)


def _digest(text: str) -> str:
    """In place of a name that is too long. No id of a node or task begins with the mark."""
    return "_" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


class SlicePlaces:
    """`nodeservice.slice/nodeservice-NODE.slice/nodeservice-NODE-TASK.slice`.

    A dash takes four characters there, so that an id which is short enough elsewhere may be too long.
    """

    def __init__(self, node_id: str) -> None:
        node = escape(node_id)
        self._stem = f"nodeservice-{node if len(node) <= _MAX_NODE else _digest(node_id)}"

    def of_node(self) -> str:
        return f"{TASKS_SLICE}/{self._stem}.slice"

    def of_task(self, id_: AttemptId) -> str:
        name = f"{self._stem}-{escape(str(id_))}.slice"
        return f"{self.of_node()}/{name if len(name) <= _MAX_NAME else f'{self._stem}-{_digest(str(id_))}.slice'}"

    def parent_for_engine(self, id_: AttemptId) -> str:
        return self.of_task(id_).rpartition("/")[2]


class SliceTree(V2CgroupTree):
    """Implements CgroupTree: systemd makes and removes, the kernel's files are read directly. For use from one thread."""

    needs_looks: ClassVar[bool] = True

    def __init__(self, mounts: tuple[Mount, ...], *, disks: tuple[str, ...] = ()) -> None:
        super().__init__(mounts, disks=disks)
        self._bus: DBusConnection | None = None
        self._call("GetUnitByControlGroup", "s", ("/",), tolerated=(_NO_SUCH_UNIT,))

    def create(self, place: str, limits: CgroupLimits) -> None:
        for depth in range(1, place.count("/") + 1):
            self._start("/".join(place.split("/")[:depth]), [])
        self._start(place, _properties(limits, self._disks))
        # Not among systemd's properties of slices.
        if limits.oom_group:
            UnifiedCgroup(self._top / place).set_if_offered("memory_oom_group", True)

    def look_after(self, place: str) -> None:
        """systemd writes 0 to the flag whenever a scope starts in the slice, a property is set, or it is reloaded (252)."""
        task = UnifiedCgroup(self._top / place)
        if task.read("memory_oom_group") is not False:
            return
        task.set_if_offered("memory_oom_group", True)
        if (task.read("memory_events") or {}).get("oom_kill"):  # meanwhile the kernel ended only a part
            self.kill(place)

    def _write_cpus(self, place: str, cpu_ids: tuple[int, ...]) -> None:
        """Through systemd, which writes its own idea of them whenever it looks at the slice again.

        It also hands the controller down, which it does not while nobody asks for it.
        """
        unit, cpus = place.rpartition("/")[2], [("AllowedCPUs", ("ay", _cpu_mask(cpu_ids)))]
        self._call("SetUnitProperties", "sba(sv)", (unit, True, cpus), tolerated=(_NO_SUCH_UNIT,))
        self.look_after(place)

    def remove(self, place: str) -> bool:
        if self.processes(place):
            return False
        self._stop(place)
        gone = not (self._top / place).exists() or remove_tree(self._top / place, self._rmdir)
        node = place.rpartition("/")[0]
        # The one above is shared with other nodes of this host, and may be a package's.
        if gone and node != TASKS_SLICE and not self.children(node) and not self.processes(node):
            # The next task must not find it just before it goes: then systemd would make it anew, without limits.
            _ = self._stop(node) and self._await(node, there=False)
        return gone

    def _stop(self, place: str) -> bool:
        try:
            return self._call("StopUnit", "ss", (place.rpartition("/")[2], "replace"), tolerated=(_NO_SUCH_UNIT,))
        except OSError:
            return False

    def close(self) -> None:
        if self._bus is not None:
            self._bus.close()
            self._bus = None

    def _start(self, place: str, properties: list[tuple[str, tuple[str, Any]]]) -> None:
        unit = place.rpartition("/")[2]
        if not (self._top / place).is_dir():
            made = self._call(
                "StartTransientUnit", "ssa(sv)a(sa(sv))", (unit, "replace", properties, []), tolerated=(_EXISTS,)
            )
            if not made:  # it has a file of its own, as the top one of a package has, or is on its way
                self._call("StartUnit", "ss", (unit, "replace"))
            if not self._await(place, there=True):
                raise OSError(errno.ETIMEDOUT, "systemd did not start the slice", place)
            if made:
                return
        if properties:
            self._call("SetUnitProperties", "sba(sv)", (unit, True, properties))

    def _await(self, place: str, *, there: bool) -> bool:
        """The job is queued when the call returns. False where it is not done in time."""
        until = time.monotonic() + _CALL_SECONDS
        while (self._top / place).is_dir() is not there:
            if time.monotonic() > until:
                return False
            time.sleep(0.001)
        return True

    def _call(self, method: str, signature: str, body: tuple[Any, ...], *, tolerated: tuple[str, ...] = ()) -> bool:
        """False for a tolerated refusal. Raises OSError: ECONNREFUSED where D-Bus can't be reached, else EPERM or EIO."""
        message = new_method_call(_MANAGER, method, signature, body)
        may_be_stale = self._bus is not None
        while True:
            try:
                if self._bus is None:
                    self._bus = open_dbus_connection(bus="SYSTEM")
                reply = self._bus.send_and_get_reply(message, timeout=_CALL_SECONDS)
                break
            except (OSError, ValueError, EOFError, KeyError) as error:
                self.close()
                if isinstance(error, TimeoutError) or not may_be_stale:
                    raise OSError(errno.ECONNREFUSED, f"systemd can't be reached over D-Bus: {error}") from error
                may_be_stale = False  # D-Bus may have been started anew since it was asked last
        if reply.header.message_type is MessageType.error:
            name = next((str(v) for k, v in reply.header.fields.items() if k.name == "error_name"), "")
            if name in tolerated:
                return False
            number = errno.EPERM if "AccessDenied" in name else errno.EIO
            raise OSError(number, f"systemd refused {method}: {name} {' '.join(map(str, reply.body))}", str(body[0]))
        return True


def _properties(limits: CgroupLimits, disks: tuple[str, ...]) -> list[tuple[str, tuple[str, Any]]]:
    found: list[tuple[str, tuple[str, Any]]] = []
    if limits.memory_bytes is not None:
        found += [("MemoryMax", ("t", limits.memory_bytes)), ("MemorySwapMax", ("t", 0))]
    if limits.cpu_quota_us is not None:
        found += [
            ("CPUQuotaPerSecUSec", ("t", limits.cpu_quota_us * 1_000_000 // CPU_PERIOD_US)),
            ("CPUQuotaPeriodUSec", ("t", CPU_PERIOD_US)),
        ]
    if limits.cpu_weight_milli is not None:
        found.append(("CPUWeight", ("t", cpu_weight(limits.cpu_weight_milli))))
    if limits.pids_max is not None:
        found.append(("TasksMax", ("t", limits.pids_max)))
    if limits.cpu_ids:
        found.append(("AllowedCPUs", ("ay", _cpu_mask(limits.cpu_ids))))
    for name, rate in (
        ("IOReadBandwidthMax", limits.read_bytes_per_second),
        ("IOWriteBandwidthMax", limits.write_bytes_per_second),
    ):
        if rate is not None:
            found.append((name, ("a(st)", [(f"/dev/block/{disk}", rate) for disk in disks])))
    return found


def _cpu_mask(cpu_ids: tuple[int, ...]) -> bytes:
    mask = sum(1 << cpu for cpu in cpu_ids)
    return mask.to_bytes(max(cpu_ids) // 8 + 1, "little")
