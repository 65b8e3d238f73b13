"""A probe: a small task that tries to break a limit, and the judgement on how it went."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from nodeservice.core.model import MIB, AttemptId, PullPolicy, Reason, Resources, TaskRecord, TaskSpec
from nodeservice.doctor.finding import Finding, State

_OPEN_FILES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """How a probe went. `record` is None for one that was not accepted; `refused` then says why."""

    record: TaskRecord | None
    refused: str = ""
    processes_left: tuple[int, ...] = ()
    """Processes of it that were alive when it was told to be over."""

    @property
    def log(self) -> str:
        collected = self.record.collected if self.record else None
        return collected.log_tail if collected else ""

    @property
    def reason(self) -> Reason | None:
        verdict = self.record.verdict if self.record else None
        return verdict.reason if verdict else None

    @property
    def exit_code(self) -> int | None:
        verdict = self.record.verdict if self.record else None
        return verdict.exit_code if verdict else None

    @property
    def message(self) -> str:
        verdict = self.record.verdict if self.record else None
        return verdict.message if verdict else self.refused

    @property
    def has_run(self) -> bool:
        return self.record is not None and self.record.started_at is not None

    @property
    def ended_at(self) -> datetime | None:
        """Its container, as this service saw it."""
        timings = self.record.timings if self.record else ()
        return next((timing.ended_at for timing in timings if timing.name == "run"), None)

    @property
    def start_seconds(self) -> float:
        """Its start by the engine, whose runtime begins in the container's cgroup; 0 where it is not known."""
        start = next(
            (timing for timing in (self.record.timings if self.record else ()) if timing.name == "start"), None
        )
        if start is None or start.ended_at is None:
            return 0.0
        return (start.ended_at - start.started_at).total_seconds()

    @property
    def run_seconds(self) -> float | None:
        """From the container's start to its end as this service saw it."""
        if self.record is None or self.record.started_at is None or self.ended_at is None:
            return None
        return (self.ended_at - self.record.started_at).total_seconds()

    def receipt(self, part: str) -> Mapping[str, Any]:
        """`asked`, `effective`, `enforcement`, `read_from` or `unread`; empty where there is no receipt."""
        found = self.record.limits.get(part) if self.record else None
        return found if isinstance(found, Mapping) else {}

    def mismatch(self, limit: str) -> str:
        """What the receipt has against the limit, in words."""
        found = self.record.limits.get("mismatches") if self.record else None
        sentences = found if isinstance(found, Sequence) else ()
        return "; ".join(str(sentence) for sentence in sentences if str(sentence).startswith(f"{limit}: "))


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """`script` is run by `/bin/sh -c`, with no other programs than those that every shell image has."""

    name: str
    script: str
    judge: Callable[[Seen], Sequence[Finding]]
    cpu_milli: int = 100
    memory_bytes: int = 32 * MIB
    disk_bytes: int = 32 * MIB
    timeout_seconds: float = 8.0
    also: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the TaskSpec."""

    def spec(self, *, task_id: str, image: str, pull: PullPolicy) -> TaskSpec:
        fields: dict[str, Any] = {
            "pids_limit": 32,
            "grace_seconds": 0.2,
            "open_files_limit": _OPEN_FILES,
            "task_name": f"doctor {self.name}",
        }
        return TaskSpec(
            id=AttemptId(task_id),
            image=image,
            command=self.script,
            request=Resources(cpu_milli=self.cpu_milli, memory_bytes=self.memory_bytes, disk_bytes=self.disk_bytes),
            timeout_seconds=self.timeout_seconds,
            pull_policy=pull,
            fingerprint=task_id,
            **(fields | dict(self.also)),
        )


def not_tried(seen: Seen, limits: Sequence[str], remedy: str) -> list[Finding]:
    """Findings for a probe that did not run to its end, be it that the limit can't be kept here; empty for one that did."""
    if seen.has_run and seen.reason is not None:
        return []
    cant_be_kept = seen.record is None or seen.reason is Reason.LIMIT_NOT_ENFORCED
    state = State.MISSING if cant_be_kept and not seen.has_run else State.FAILED
    evidence = seen.message or ("it had not ended in time" if seen.has_run else "it was not started in time")
    return [Finding(limit=limit, state=state, evidence=evidence, remedy=remedy) for limit in limits]


def in_force(seen: Seen, limit: str) -> tuple[State, str]:
    """What the receipt says of a limit. One that the kernel's files don't show counts by the engine's word."""
    wrong = seen.mismatch(limit)
    if wrong:
        return State.MISSING, wrong
    effective, read_from = seen.receipt("effective"), seen.receipt("read_from")
    if limit not in effective:
        return State.FAILED, f"could not be read: {seen.receipt('unread').get(limit, 'no receipt')}"
    return State.HARD, f"{effective[limit]} in {read_from.get(limit, 'no file')}"
