"""Where the node can be made to die, freeze or fail: around each call through a port that leaves something outside of it."""

from __future__ import annotations

from nodeservice.fault_points import FaultTable

_TABLE = FaultTable(
    {
        "journal": ("save", "forget"),
        "runtime": ("pull", "create", "start", "wait_exited", "stop", "kill", "remove", "list_owned"),
        "cgroups": ("prepare", "at_end", "remove"),
        "disk": ("prepare", "remove"),
        "bundles": ("collect", "discard_kept"),
        "store": ("put",),
        "fallback": ("put",),
        "uplink": ("report",),
    }
)
POINTS = _TABLE.points
armed = _TABLE.armed
