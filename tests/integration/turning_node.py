"""`python -m tests.integration.turning_node serve …`: a node that tells each second how often its loop has turned."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

from nodeservice.cli import main

turns = 0


def count_turns() -> None:
    once: Any = asyncio.BaseEventLoop._run_once  # type: ignore[attr-defined]

    def counted(loop: asyncio.BaseEventLoop) -> None:
        global turns  # noqa: PLW0603
        turns += 1
        once(loop)

    asyncio.BaseEventLoop._run_once = counted  # type: ignore[attr-defined]


def tell() -> None:
    while True:
        print(json.dumps({"event": "loop.turns", "turns": turns, "at": time.monotonic()}), flush=True)
        time.sleep(1)


if __name__ == "__main__":
    count_turns()
    threading.Thread(target=tell, daemon=True).start()
    main()
