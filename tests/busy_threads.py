"""Which threads of a pool are at work."""

from __future__ import annotations

import sys
import threading


def busy_threads(pool: str) -> list[str]:
    """Names of the pool's threads that are not waiting for work."""
    frames = sys._current_frames()
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith(f"{pool}_")
        and (frame := frames.get(thread.ident or 0)) is not None
        and frame.f_code.co_name != "_work"
    ]
