"""Makes the wire's Task from what was typed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nodeservice.cli.gpu_options import GpuAsk
from nodeservice.cli.task_options import variables
from nodeservice.cli.units import parse_bytes, parse_cpus, parse_seconds
from nodeservice.errors import RequestError
from nodeservice.task_bounds import check_pids

if TYPE_CHECKING:
    from nodeservice.wire import master_worker_pb2 as pb

_GIB = 1024**3
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """Options of `submit` as they were typed; empty or None is left to the node."""

    image: str
    argv: tuple[str, ...] = ()
    shell: str = ""
    cpus: str
    memory: str
    disk: str
    gpus: GpuAsk = field(default_factory=GpuAsk)
    timeout: str | None = None
    grace: str | None = None
    pids: int | None = None
    env: tuple[str, ...] = ()
    name: str = ""
    task_id: str = ""
    attempt: int | None = None
    max_retries: int | None = None
    retry_own_failures: bool = False
    pull: str = ""
    target: str = ""
    user: str = ""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """As `task_options.limits_given` gives them."""

    def task(self) -> pb.Task:
        """Old and exact fields, filled with the same amounts. Raises RequestError."""
        from nodeservice.wire import master_worker_pb2 as pb

        if self.shell and self.argv:
            raise RequestError(
                "--shell and a command after -- exclude each other", reason="INVALID_REQUEST", field="shell"
            )
        cpu_milli = parse_cpus(self.cpus)
        memory_bytes = parse_bytes(self.memory, option="--memory")
        disk_bytes = parse_bytes(self.disk, option="--disk")
        task = pb.Task(
            task_id=self.task_id,
            docker_image=self.image,
            command=self.shell,
            req_cpu=cpu_milli / 1000,
            req_memory=memory_bytes / _GIB,
            req_storage=disk_bytes / _GIB,
            req_gpu=_gpu_number(self.gpus),
            gpu=_gpu_message(self.gpus),
            target_worker_id=self.target,
            user_id=self.user,
            task_name=self.name,
            argv=self.argv,
            env=[pb.EnvVar(name=name, value=value) for name, value in variables(self.env)],
            cpu_milli=cpu_milli,
            memory_bytes=memory_bytes,
            disk_bytes=disk_bytes,
            **self.limits,
        )
        if self.timeout is not None:
            task.timeout_seconds = parse_seconds(self.timeout, option="--timeout")
        if self.grace is not None:
            task.grace_seconds = parse_seconds(self.grace, option="--grace")
        if self.pids is not None:
            check_pids(self.pids)
            task.pids_limit = self.pids
        if self.pull:
            task.pull_policy = self.pull
        if self.attempt is not None:
            task.attempt = self.attempt
        if self.max_retries is not None:
            task.max_retries = self.max_retries
        if self.retry_own_failures:
            task.retry_own_failures = True
        return task


def _gpu_number(asked: GpuAsk) -> float:
    share = asked.request.share
    return share.milli / 1000 if share is not None and share.milli else float(asked.count)


def _gpu_message(asked: GpuAsk) -> pb.GpuRequest | None:
    """None where a number says it all, so that older peers understand all of it."""
    from nodeservice.wire import master_worker_pb2 as pb

    request = asked.request
    capability = request.min_compute_capability
    message = pb.GpuRequest(
        model=request.model,
        min_memory_bytes=request.min_memory_bytes,
        min_compute_capability="" if capability is None else "{}.{}".format(*capability),
        mig_profile=request.mig_profile,
        uuids=request.uuids,
    )
    if request.share is not None and not request.share.milli:
        message.share.memory_bytes = request.share.memory_bytes
        message.share.sm_percent = request.share.sm_percent
    return message if message.ByteSize() else None


def traceparent() -> tuple[tuple[str, str], ...]:
    """gRPC metadata that joins the task to the trace of whoever called us (TRACEPARENT), if any."""
    value = os.environ.get("TRACEPARENT", "")
    return (("traceparent", value),) if _TRACEPARENT.fullmatch(value) else ()
