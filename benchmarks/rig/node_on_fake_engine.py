"""`serve` with all its parts but the container engine, which is the fake one: thousands of tasks in seconds.

Run as `python -m benchmarks.rig.node_on_fake_engine serve …`, like `python -m nodeservice`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from nodeservice.cli import main
from nodeservice.daemon import node
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime


class ForgetfulEngine(FakeRuntime):
    """It forgets what it was asked, so that all growth is the node's own."""

    degraded = ()
    trouble = ""
    endpoint_url = "fake"

    def __init__(self, *, node_id: str, **_: Any) -> None:
        image = FakeImage(output=b"done\n")
        super().__init__(images={"nodeservice/demo:latest": image}, node_id=node_id, cpu_count=64)
        self.calls = deque(maxlen=1)  # type: ignore[assignment]
        self.specs = deque(maxlen=1)  # type: ignore[assignment]

    def ended_with_the_host(self, _stops: object) -> None:
        """It has no containers of before its start."""

    async def close(self) -> None:
        return None


if __name__ == "__main__":
    vars(node)["DockerRuntime"] = ForgetfulEngine
    main()
