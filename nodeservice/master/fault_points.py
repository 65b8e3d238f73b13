"""Where the master can be made to die, freeze or fail: around each write to its store, each call to a node, each result."""

from __future__ import annotations

from nodeservice.fault_points import FaultTable

_TABLE = FaultTable(
    {
        "store": ("save_tasks", "save_node", "save_orphan"),
        "node": ("AssignTask", "CancelTask", "MasterRegister"),
        "results": ("commit",),
    }
)
POINTS = _TABLE.points
armed = _TABLE.armed
