"""What the master is told at start."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from nodeservice.certificates import Term
from nodeservice.master.scheduler import SchedulerSettings
from nodeservice.master.tasks import NODE_RETRIES
from nodeservice.master.uploads import PUSH_LIMIT_BYTES

UPLOAD_LIMIT_BYTES = 50 * 1000 * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class MasterSettings:
    """`listen` and `http_listen` are HOST:PORT; port 0 takes a free one. No credentials mean plain text."""

    listen: str
    state_dir: Path
    results_dir: Path | None = None
    """Default: `results` in the state directory."""
    database_url: str | None = None
    """Default: `master.sqlite` in the state directory. May hold a password: never logged."""
    http_listen: str | None = None
    """Where `/upload` takes results; None: nowhere."""
    http_limit_bytes: int = UPLOAD_LIMIT_BYTES
    push_limit_bytes: int = PUSH_LIMIT_BYTES
    """What one attempt may store over gRPC."""
    heartbeat_timeout_seconds: float = 30.0
    gone_after_seconds: float = 600.0
    """A node that was silent for so long is given up: what it held is lost, and follows as a new attempt."""
    node_loss_retries: int = NODE_RETRIES
    """How often that happens to a task, and how often it is tried again after another fault of a node."""
    finished_retention_seconds: float | None = None
    """Tasks that ended, and nodes last heard of, longer ago are forgotten; None: never."""
    server_credentials: grpc.ServerCredentials | None = field(default=None, repr=False)
    dial_credentials: grpc.ChannelCredentials | None = field(default=None, repr=False)
    http_tls: ssl.SSLContext | None = field(default=None, repr=False)
    certified_worker_ids: bool = False
    """A node must be in its certificate by its worker_id; only with credentials that ask for one."""
    certificates: tuple[Term, ...] = ()
    """How long those that the credentials were made of hold; the master warns in time."""
    nodes: tuple[str, ...] = ()
    """Addresses of nodes that wait to be asked (MasterRegister), again and again."""
    advertise: str | None = None
    """What those nodes are told to dial; needed where `listen` names a wildcard."""
    announce_seconds: float = 5.0
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
