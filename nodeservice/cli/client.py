"""The commands that talk to a master: submit, ps, show, logs, wait, cancel, nodes."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodeservice.cli.connection import CALL_SECONDS, Connection, say, with_connection
from nodeservice.cli.gpu_options import (
    GpuCapability,
    GpuMemory,
    GpuMig,
    GpuMinMemory,
    GpuModel,
    Gpus,
    GpuSms,
    GpuUuid,
    gpus_asked,
)
from nodeservice.cli.task_options import (
    ExclusiveCpus,
    OpenFiles,
    PullTimeout,
    ReadRate,
    StopSignal,
    TotalTimeout,
    WaitTimeout,
    WriteRate,
    by_option,
    limits_given,
)
from nodeservice.errors import RequestError

if TYPE_CHECKING:
    from nodeservice.wire import master_worker_pb2 as pb

_POLL_SECONDS = 0.5


class TaskState(StrEnum):
    """Of a task, which is that of its current attempt."""

    QUEUED = "QUEUED"
    ASSIGNED = "ASSIGNED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    REJECTED = "REJECTED"


TaskId = Annotated[str, typer.Argument(metavar="ID", help="The task's id.")]
Attempt = Annotated[
    int, typer.Option(min=0, max=1_000_000, show_default=False, help="Of this attempt. Default: the newest.")
]


def register(app: typer.Typer) -> None:
    for command in (submit, ps, show, logs, wait, cancel, nodes):
        app.command(command.__name__)(with_connection(command))


def submit(
    link: Connection,
    *,
    image: Annotated[str, typer.Argument(help="Image to run.")],
    command: Annotated[list[str] | None, typer.Argument(help="Command, after --. Default: the image's own.")] = None,
    shell: Annotated[str, typer.Option(help="Run this with /bin/sh -c instead of a command.")] = "",
    cpus: Annotated[str, typer.Option(help="Cores, such as 0.5.")] = "1",
    memory: Annotated[str, typer.Option(help="Memory, such as 64m or 2g; hard, with swap off.")] = "512m",
    disk: Annotated[str, typer.Option(help="Most that the task may write: layer, /results, log.")] = "1g",
    gpus: Gpus = None,
    gpu_model: GpuModel = None,
    gpu_min_memory: GpuMinMemory = None,
    gpu_capability: GpuCapability = None,
    gpu_mig: GpuMig = None,
    gpu_uuid: GpuUuid = None,
    gpu_memory: GpuMemory = None,
    gpu_sms: GpuSms = None,
    timeout: Annotated[str | None, typer.Option(help="Running time, such as 20s or 1h30m.")] = None,
    grace: Annotated[str | None, typer.Option(help="From SIGTERM to SIGKILL.")] = None,
    pids: Annotated[int | None, typer.Option(help="Most processes and threads.")] = None,
    wait_timeout: WaitTimeout = None,
    pull_timeout: PullTimeout = None,
    total_timeout: TotalTimeout = None,
    stop_signal: StopSignal = None,
    exclusive_cpus: ExclusiveCpus = False,
    open_files: OpenFiles = None,
    read_rate: ReadRate = None,
    write_rate: WriteRate = None,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", help="NAME=VALUE; a bare NAME: this shell's value, if any.")
    ] = None,
    name: Annotated[str, typer.Option(help="A name for people.")] = "",
    task_id: Annotated[str, typer.Option(help="Id. Default: the master makes one up.")] = "",
    attempt: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="A retry of an ended task is a higher attempt.")
    ] = None,
    max_retries: Annotated[
        int | None,
        typer.Option(min=0, max=1000, help="New attempts after failures that are neither its own nor its node's."),
    ] = None,
    retry_own_failures: Annotated[
        bool, typer.Option("--retry-own-failures", help="--max-retries is for its own failures too.")
    ] = False,
    pull: Annotated[str, typer.Option(help="always, if-not-present or never.")] = "",
    target: Annotated[str, typer.Option(help="Only on the node with this worker id.")] = "",
    user: Annotated[str, typer.Option(help="On whose behalf.")] = "",
) -> None:
    """Queue a task and print its id. Exit code 75 when it is refused."""
    from nodeservice.cli.submission import Submission, traceparent

    try:
        task = Submission(
            image=image, argv=tuple(command or ()), shell=shell, cpus=cpus, memory=memory, disk=disk,
            gpus=gpus_asked(
                gpus=gpus, model=gpu_model, min_memory=gpu_min_memory, capability=gpu_capability, mig=gpu_mig,
                uuids=gpu_uuid, memory=gpu_memory, sms=gpu_sms,
            ),
            timeout=timeout, grace=grace, pids=pids, env=tuple(env or ()), name=name, task_id=task_id, attempt=attempt,
            max_retries=max_retries, retry_own_failures=retry_own_failures, pull=pull, target=target, user=user,
            limits=limits_given(
                wait_timeout=wait_timeout, pull_timeout=pull_timeout, total_timeout=total_timeout,
                stop_signal=stop_signal, exclusive_cpus=exclusive_cpus, open_files=open_files, read_rate=read_rate,
                write_rate=write_rate,
            ),
        ).task()  # fmt: skip
        with link.open() as stub:
            ack = stub.SubmitTask(task, timeout=CALL_SECONDS, metadata=traceparent())
    except RequestError as error:
        _submitted(link.as_json, success=False, task_id=task_id, reason=error.reason, message=by_option(str(error)))
        return
    _submitted(
        link.as_json, success=ack.success, task_id=ack.task_id, reason=ack.reason, message=by_option(ack.message)
    )


def _submitted(as_json: bool, *, success: bool, task_id: str, reason: str, message: str) -> None:
    from nodeservice.cli.exit_codes import ExitCode

    if as_json:
        outcome = None if success else "REJECTED"
        _print_json(
            {
                "task_id": task_id or None,
                "accepted": success,
                "outcome": outcome,
                "reason": reason or None,
                "message": message,
            }
        )
    elif success:
        sys.stdout.write(f"{task_id}\n")
    if not success:
        say(f"rejected: {message} [{reason}]")
        raise typer.Exit(ExitCode.REJECTED)


def ps(
    link: Connection,
    *,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="The newest so many.")] = 100,
    states: Annotated[
        list[TaskState] | None, typer.Option("--state", case_sensitive=False, help="In this state; repeatable.")
    ] = None,
    node: Annotated[str, typer.Option(help="Given to the node with this worker id.")] = "",
    since: Annotated[str | None, typer.Option(help="Submitted in the last, such as 2h or 7d.")] = None,
) -> None:
    """List tasks, newest first."""
    import time

    from nodeservice.cli.task_json import task_summary
    from nodeservice.cli.units import parse_seconds
    from nodeservice.wire import master_worker_pb2 as pb

    since_ms = 0 if since is None else int((time.time() - parse_seconds(since, option="--since")) * 1000)
    wanted = pb.ListTasksRequest(limit=limit, states=states or (), worker_id=node, since_unix_ms=since_ms)
    with link.open() as stub:
        answer = stub.ListTasks(wanted, timeout=CALL_SECONDS)
    tasks = [task_summary(view) for view in answer.tasks]
    if len(tasks) == limit:
        say(f"these are the newest {limit}; there may be more: see --limit, --state, --node and --since")
    if link.as_json:
        _print_json(tasks)
    else:
        from nodeservice.cli.render import show_tasks

        show_tasks(tasks)


def show(
    link: Connection,
    *,
    task_id: TaskId,
    attempt: Attempt = 0,
) -> None:
    """Tell the full story of a task: outcome, reason, phases, usage, limits, results, trace."""
    from nodeservice.cli.task_json import task_document

    with link.open() as stub:
        document = task_document(_get(stub, task_id, attempt))
    if link.as_json:
        _print_json(document)
    else:
        from nodeservice.cli.render import show_task

        show_task(document)


def logs(
    link: Connection,
    *,
    task_id: TaskId,
    attempt: Attempt = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the task has ended.")] = False,
) -> None:
    """Print a task's log, both streams in their order. With --json, one object a line.

    What the master says about the log goes to stderr, or is an object with `notice`. Exit code 69 where the task's node does
    not answer; with -f it is waited for. Of an ended task the end of the log, from its report, is printed instead, and a
    notice says so. With --attempt, -f ends with that attempt.
    """
    from nodeservice.wire import master_worker_pb2 as pb

    told = f"attempt {attempt}" if attempt else "the task"
    with link.open() as stub:
        for chunk in stub.StreamTaskLogs(pb.TaskLogRequest(task_id=task_id, follow=follow, attempt=attempt)):
            if link.as_json:
                _print_json(_chunk(chunk), indent=None)
            elif chunk.HasField("notice"):
                say(chunk.notice)
            elif not chunk.is_complete:
                sys.stdout.write(f"{chunk.content}\n")
            else:
                say(f"{told} {'was ' if chunk.status == 'cancelled' else ''}{chunk.status}")
            sys.stdout.flush()


def _chunk(chunk: pb.LogChunk) -> dict[str, object]:
    if chunk.is_complete:
        return {"task_id": chunk.task_id, "is_complete": True, "status": chunk.status}
    told = {"notice": chunk.notice} if chunk.HasField("notice") else {"content": chunk.content}
    return {"task_id": chunk.task_id, "timestamp": chunk.timestamp, **told}


def wait(
    link: Connection,
    *,
    task_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of tasks.")],
    timeout: Annotated[str | None, typer.Option(help="Give up after, such as 5m.")] = None,
) -> None:
    """Wait until all have ended.

    The exit code is 0 if all succeeded, else that of a single task or 1 for several; 124 when --timeout is over.
    """
    import time

    from nodeservice.cli.exit_codes import ExitCode, exit_code_of
    from nodeservice.cli.task_json import FINAL_STATES, task_summary
    from nodeservice.cli.units import parse_seconds

    end = None if timeout is None else time.monotonic() + parse_seconds(timeout)
    open_ids, ended = list(dict.fromkeys(task_ids)), {}
    order = list(open_ids)
    with link.open() as stub:
        while open_ids:
            for task_id in list(open_ids):
                view = _get(stub, task_id, 0)
                if view.state in FINAL_STATES:
                    ended[task_id] = view
                    open_ids.remove(task_id)
                    say(f"{task_id} {view.state} {view.reason}: {view.message}".rstrip(": "))
            if open_ids and end is not None and time.monotonic() >= end:
                break
            if open_ids:
                time.sleep(_POLL_SECONDS)
    if link.as_json:
        _print_json([task_summary(ended[task_id]) for task_id in order if task_id in ended])
    if open_ids:
        say(f"still not ended: {' '.join(open_ids)}")
        raise typer.Exit(ExitCode.DEADLINE)
    codes = [
        exit_code_of(
            outcome=view.state,
            reason=view.reason,
            exit_code=view.result.exit_code if view.result.HasField("exit_code") else None,
        )
        for view in ended.values()
    ]
    if any(codes):
        raise typer.Exit(codes[0] if len(codes) == 1 else 1)


def cancel(
    link: Connection,
    *,
    task_id: TaskId,
) -> None:
    """Cancel a task. Exit code 75 when it has ended already."""
    from nodeservice.cli.exit_codes import ExitCode
    from nodeservice.wire import master_worker_pb2 as pb

    with link.open() as stub:
        ack = stub.CancelTask(pb.TaskID(task_id=task_id), timeout=CALL_SECONDS)
    if link.as_json:
        reason = ack.reason if ack.HasField("reason") and ack.reason else None
        _print_json({"task_id": task_id, "success": ack.success, "reason": reason, "message": ack.message})
    say(f"{task_id}: {ack.message}")
    if not ack.success:
        raise typer.Exit(ExitCode.REJECTED)


def nodes(
    link: Connection,
    *,
    worker_ids: Annotated[
        list[str] | None, typer.Argument(metavar="NODE...", help="Worker ids. Default: all nodes.")
    ] = None,
) -> None:
    """List the nodes: state, what is assigned of what tasks may have, last heartbeat. Exit code 66 for an unknown one."""
    from nodeservice.cli.exit_codes import ExitCode
    from nodeservice.cli.task_json import node_document
    from nodeservice.wire import master_worker_pb2 as pb

    with link.open() as stub:
        answer = stub.ListNodes(pb.ListNodesRequest(), timeout=CALL_SECONDS)
    documents = [node_document(view) for view in answer.nodes if not worker_ids or view.worker_id in worker_ids]
    unknown = set(worker_ids or ()).difference(view.worker_id for view in answer.nodes)
    if unknown:
        raise link.failure(ExitCode.NOT_FOUND, "NOT_FOUND", f"the master knows no node {', '.join(sorted(unknown))}")
    if link.as_json:
        _print_json(documents)
    else:
        from nodeservice.cli.render import show_nodes

        show_nodes(documents)


def _get(stub: Any, task_id: str, attempt: int) -> pb.TaskView:
    from nodeservice.wire import master_worker_pb2 as pb

    view: pb.TaskView = stub.GetTask(pb.TaskID(task_id=task_id, attempt=attempt), timeout=CALL_SECONDS)
    return view


def _print_json(document: object, *, indent: int | None = 2) -> None:
    sys.stdout.write(json.dumps(document, indent=indent, ensure_ascii=False) + "\n")
