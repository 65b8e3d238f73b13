"""What cgroupspy lacks for cgroup v1: two controllers, and nodes that know them."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, ClassVar

from cgroupspy.controllers import Controller
from cgroupspy.interfaces import BaseFileInterface, IntegerFile
from cgroupspy.nodes import Node

from nodeservice.limits.files import LimitFile


class PidsController(Controller):  # type: ignore[misc]
    """The controller that the library lacks (Documentation/admin-guide/cgroup-v1/pids.rst)."""

    max = LimitFile("pids.max")
    current = IntegerFile("pids.current", readonly=True)
    peak = IntegerFile("pids.peak", readonly=True)


class BlockController(Controller):  # type: ignore[misc]
    """What the library's lacks: throttling files that name one device each line, and counts that include children."""

    read_bps = BaseFileInterface("blkio.throttle.read_bps_device")
    write_bps = BaseFileInterface("blkio.throttle.write_bps_device")
    service_bytes = BaseFileInterface("blkio.throttle.io_service_bytes_recursive", readonly=True)


class HierarchyNode(Node):  # type: ignore[misc]
    """The library's node, which also knows what the library lacks, and makes children of its own kind."""

    CONTROLLERS: ClassVar[dict[bytes, Any]] = {**Node.CONTROLLERS, b"pids": PidsController, b"blkio": BlockController}

    def create_cgroup(self, name: str) -> HierarchyNode:
        with suppress(FileExistsError):
            os.mkdir(os.path.join(self.full_path, os.fsencode(name)))
        return HierarchyNode(name, parent=self)
