"""The names and labels of containers: enough to time out, kill, collect and report one when the journal is lost."""

from __future__ import annotations

from nodeservice.core.model import AttemptId

PREFIX = "nodeservice."
NODE = "nodeservice.node"
TASK_ID = "nodeservice.task_id"
ATTEMPT = "nodeservice.attempt"
SPEC = "nodeservice.spec"
"""The request's fingerprint, by which a repeated create recognises its own container."""
RECORD = "nodeservice.record"
"""The whole record at the time of creation, as the journal writes it."""


def container_name(id_: AttemptId) -> str:
    return f"{PREFIX}{id_.task_id}.{id_.attempt}"
