"""The names and labels of containers: enough to time out, kill, collect and report one when the journal is lost."""

from __future__ import annotations

from nodeservice.core.model import AttemptId

PREFIX = "nodeservice."
NODE = f"{PREFIX}node"
"""Names the node that owns a container; every container that a runtime makes has it."""
TASK_ID = f"{PREFIX}task_id"
ATTEMPT = f"{PREFIX}attempt"
SPEC = f"{PREFIX}spec"
"""The request's fingerprint: equal ones on one name are the same container, so a repeated create recognises its own."""
RECORD = f"{PREFIX}record"
"""The whole record at the time of creation, as the journal writes it."""


def container_name(id_: AttemptId) -> str:
    return f"{PREFIX}{id_.task_id}.{id_.attempt}"
