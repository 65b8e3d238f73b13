"""How the node stands, in one line for a person: `systemctl status` shows it."""

from __future__ import annotations

from nodeservice.core.model import Phase
from nodeservice.daemon.node import Node


def standing(node: Node) -> str:
    if node.runtime.trouble:
        return f"takes no tasks: {node.runtime.trouble}"
    driver = node.driver
    live = driver.live()
    running = sum(record.phase is Phase.RUNNING for record in live)
    parts = [f"{running} tasks running, {len(live) - running} others unfinished"]
    if driver.cordoned:
        parts.append("cordoned")
    conditions = driver.all_conditions()
    if conditions:
        parts.append(f"takes no tasks: {', '.join(f'{name} ({words})' for name, words in conditions.items())}")
    return "; ".join(parts)
