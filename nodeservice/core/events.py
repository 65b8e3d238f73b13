"""What happened to an attempt: facts, past tense. Each carries the instant `at` (aware UTC) at which it was observed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from nodeservice.core.model import Collected, Reason, StopRequest, Usage, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested(Event):
    """Somebody (the master, the deadline) wants the attempt to end."""

    stop: StopRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePulled(Event):
    """The image is on this host. `digest` is what the container must be created from (repo digest, else image id)."""

    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed(Event):
    """Pull, create or start failed for good, or was given up because a stop was requested (then `reason` is CANCELLED)."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerCreated(Event):
    container_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerStarted(Event):
    """`started_at` is the engine's own instant, so that a repeated observation gives the same deadline."""

    started_at: datetime
    limits: Mapping[str, object] = field(default_factory=dict)
    not_enforced: tuple[str, ...] = ()
    """The limits that were read back and are not as promised, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerExited(Event):
    """The container ended by itself or by a signal. `oom_killed` is the engine's or kernel's word, never inferred."""

    exit_code: int
    oom_killed: bool
    """A process of it was killed at the attempt's own memory limit."""
    host_oom_killed: bool = False
    """A process of it was killed for lack of memory elsewhere: on the host, or in all tasks together."""
    error: str = ""
    """The engine's error, when the process could not be run at all."""
    finished_at: datetime | None = None
    """The engine's own instant of the end; None where the host's clock was set while it ran, so that it tells no order."""
    ran: timedelta | None = None
    """From its start to its end."""
    observed: Usage = field(default_factory=Usage)
    """What could only be seen while it ran."""
    gpu_fault: str = ""
    """A fault of one of its GPUs that was seen before it ended, in words."""
    by_engine: bool = False
    """The engine ended it by going away or by coming back, whatever its exit code."""
    engine_was_away: bool = False
    """The engine was restarted while it lived, so its log may lack something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerLost(Event):
    """The container is gone and its exit status can no longer be had."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerStuck(Event):
    """SIGKILL was sent and something of the attempt still lives. It is tried again until it is gone."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerGone(Event):
    """Nothing of the attempt runs any more. What it wrote is still to be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsCollected(Event):
    """The container is verified gone, its usage read, its log drained, its output frozen."""

    collected: Collected
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectFailed(Event):
    message: str
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsStored(Event):
    """Every object and the manifest can be read at `location`."""

    location: str
    collected: Collected | None = None
    """What is stored, where that is less than was collected: a store may be unable to hold some names."""
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsRetained(Event):
    """The store did not take the results in time; they lie complete at `location` (file://…) on this host."""

    location: str
    message: str
    will_retry: bool = True
    """False where the store can never take them, so that the copy on this host is final."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsGivenUp(Event):
    """What was kept on this host is gone or damaged, or others lie in its place: no try to store it will ever end well."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportAcknowledged(Event):
    """The master accepted the outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanedUp(Event):
    """Container, cgroup and working directory of the attempt are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskAbandoned(Event):
    """The node itself cannot go on with this attempt (an internal error in a step); still collect and report."""

    verdict: Verdict
