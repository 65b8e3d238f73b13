"""What cgroupspy lacks for cgroup v1: two controllers, and nodes that know them, and cost less.

The library puts a path together from all nodes above, and opens each file as text, with a decoder and buffers.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cached_property
from typing import Any, ClassVar

from cgroupspy.controllers import Controller
from cgroupspy.interfaces import BaseFileInterface, IntegerFile
from cgroupspy.nodes import Node

from nodeservice.limits.files import LimitFile

_READ_BYTES = 16 * 1024


class _Lean(Controller):  # type: ignore[misc]
    """Files of the kernel's, without what a text file brings along."""

    def get_property(self, filename: bytes) -> str:
        descriptor = os.open(self.filepath(filename), os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = b""
            while piece := os.read(descriptor, _READ_BYTES):
                found += piece
        finally:
            os.close(descriptor)
        return found.decode().strip()

    def set_property(self, filename: bytes, value: object) -> int:
        descriptor = os.open(self.filepath(filename), os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            return os.write(descriptor, str(value).encode())
        finally:
            os.close(descriptor)


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

    CONTROLLERS: ClassVar[dict[bytes, Any]] = {
        name: type(controller.__name__, (_Lean, controller), {})
        for name, controller in (Node.CONTROLLERS | {b"pids": PidsController, b"blkio": BlockController}).items()
    }

    @cached_property
    def full_path(self) -> bytes:
        above = self.parent
        return bytes(self.name if above is None else os.path.join(above.full_path, self.name))

    def create_cgroup(self, name: str) -> HierarchyNode:
        with suppress(FileExistsError):
            os.mkdir(os.path.join(self.full_path, os.fsencode(name)))
        return HierarchyNode(name, parent=self)
