"""`nodeservice run`: one task on this machine, no master."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nodeservice.cli.gpu_options import (
    GpuAsk,
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
    variables,
)

if TYPE_CHECKING:
    from nodeservice.cli.run_view import RunView
    from nodeservice.config import NodeConfig
    from nodeservice.core.model import TaskSpec
    from nodeservice.single import Finished

_UPLOAD_GIVE_UP_SECONDS = 60.0
"""A person waits."""


def register(app: typer.Typer) -> None:
    app.command("run")(run)


def run(
    image: str = typer.Argument(help="Image to run."),
    command: list[str] = typer.Argument(None, help="Command and arguments, after --. Default: the image's own."),
    cpus: str = typer.Option("1", help="Cores, such as 0.5."),
    memory: str = typer.Option("512m", help="Memory, such as 64m or 2g; hard, with swap off."),
    disk: str = typer.Option("1g", help="Most that the task may write: layer, /results and log together."),
    gpus: Gpus = None,
    gpu_model: GpuModel = None,
    gpu_min_memory: GpuMinMemory = None,
    gpu_capability: GpuCapability = None,
    gpu_mig: GpuMig = None,
    gpu_uuid: GpuUuid = None,
    gpu_memory: GpuMemory = None,
    gpu_sms: GpuSms = None,
    timeout: str = typer.Option(None, help="Running time, such as 20s or 1h30m. Default, and 0: no limit."),
    grace: str = typer.Option("10s", help="From SIGTERM to SIGKILL."),
    pids: int = typer.Option(4096, help="Most processes and threads."),
    wait_timeout: WaitTimeout = None,
    pull_timeout: PullTimeout = None,
    total_timeout: TotalTimeout = None,
    stop_signal: StopSignal = None,
    exclusive_cpus: ExclusiveCpus = False,
    open_files: OpenFiles = None,
    read_rate: ReadRate = None,
    write_rate: WriteRate = None,
    env: list[str] = typer.Option([], "--env", "-e", help="NAME=VALUE; a bare NAME: this shell's value, if any."),
    name: str = typer.Option("", help="A name for people."),
    task_id: str = typer.Option(None, help="Id. Default: made up."),
    pull: str = typer.Option("if-not-present", help="always, if-not-present or never."),
    results: str = typer.Option(None, help="DIR or s3://BUCKET/PREFIX. Default: below the user's state directory."),
    minio: str = typer.Option(None, help="HOST:PORT for s3:// results; credentials come from the environment."),
    otlp_endpoint: str = typer.Option(None, help="HOST:PORT of an OTLP/gRPC collector."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout; log and phases on stderr."),
) -> None:
    """Run IMAGE once under limits, collect /results, and tell how it went. Ctrl-C cancels cleanly, a second one kills.

    The exit code is the task's own; 124 deadline, 137 memory limit, 73 disk limit, 130 cancelled, 127 command not found,
    126 not started, 65 image, 75 rejected, 74 results not stored, 70 node, 69 no engine, 78 configuration, 141 output
    closed.
    """
    import asyncio
    import json
    import secrets
    import signal

    # Before anything is imported that takes long: as Ctrl-C, until the node that is started below reacts to both.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    from nodeservice.cli.exit_codes import ExitCode, code_of_error, exit_code_of
    from nodeservice.cli.result_view import failure_as_dict, interrupted_as_dict, record_as_dict
    from nodeservice.cli.run_view import RunView
    from nodeservice.errors import NodeServiceError
    from nodeservice.telemetry.logs import configure_logging

    configure_logging("error", "console")
    id_ = task_id or f"run-{secrets.token_hex(5)}"
    view = RunView(log_to_stderr=as_json)
    try:
        spec = _spec(
            id_=id_, image=image, command=command or [], cpus=cpus, memory=memory, disk=disk,
            gpus=gpus_asked(
                gpus=gpus, model=gpu_model, min_memory=gpu_min_memory, capability=gpu_capability, mig=gpu_mig,
                uuids=gpu_uuid, memory=gpu_memory, sms=gpu_sms,
            ),
            timeout=timeout, grace=grace, pids=pids, env=env, name=name, pull=pull,
            limits=limits_given(
                wait_timeout=wait_timeout, pull_timeout=pull_timeout, total_timeout=total_timeout,
                stop_signal=stop_signal, exclusive_cpus=exclusive_cpus, open_files=open_files, read_rate=read_rate,
                write_rate=write_rate,
            ),
        )  # fmt: skip
        config = _config(id_, results, minio, otlp_endpoint)
        finished = asyncio.run(_run(config, spec, view))
    except NodeServiceError as error:
        code = code_of_error(error)
        error.message = by_option(error.message)
        view.say(f"rejected: {error}" if code is ExitCode.REJECTED else str(error))
        if as_json:
            view.put(json.dumps(failure_as_dict(task_id=id_, image=image, error=error)))
        raise typer.Exit(code) from error
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        view.say("cancelled before the task was accepted")
        if as_json:
            view.put(json.dumps(interrupted_as_dict(task_id=id_, image=image)))
        raise typer.Exit(ExitCode.CANCELLED) from error
    document = record_as_dict(finished.record, finished.manifest)
    view.verdict(finished.record)
    if as_json:
        view.put(json.dumps(document))
    if view.closed:
        raise typer.Exit(ExitCode.OUTPUT_CLOSED)
    verdict = finished.record.verdict
    if verdict is None:
        raise typer.Exit(ExitCode.NODE_FAULT)
    raise typer.Exit(exit_code_of(outcome=verdict.outcome, reason=verdict.reason, exit_code=verdict.exit_code))


def _spec(
    *, id_: str, image: str, command: list[str], cpus: str, memory: str, disk: str, gpus: GpuAsk, timeout: str | None,
    grace: str, pids: int, env: list[str], name: str, pull: str, limits: dict[str, Any],
) -> TaskSpec:  # fmt: skip
    from nodeservice.cli.units import parse_bytes, parse_cpus, parse_seconds
    from nodeservice.core.model import AttemptId, PullPolicy, Resources, TaskSpec
    from nodeservice.errors import RequestError

    try:
        policy = PullPolicy(pull)
    except ValueError as error:
        raise RequestError(
            f"--pull is {pull!r}", reason="INVALID_REQUEST", field="pull", hint="always, if-not-present or never"
        ) from error
    return TaskSpec(
        id=AttemptId(id_),
        image=image,
        argv=tuple(command),
        env=tuple(variables(env)),
        request=Resources(
            cpu_milli=parse_cpus(cpus),
            memory_bytes=parse_bytes(memory),
            disk_bytes=parse_bytes(disk, option="--disk"),
            gpu_count=gpus.count,
        ),
        gpu=gpus.request,
        pids_limit=pids,
        timeout_seconds=(parse_seconds(timeout) or None) if timeout else None,
        grace_seconds=parse_seconds(grace, option="--grace"),
        pull_policy=policy,
        task_name=name,
        open_files_asked="open_files_limit" in limits,
        fingerprint=id_,
        **limits,
    )


def _state_home() -> Path:
    from nodeservice.errors import ConfigError

    place = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state")
    try:
        home = place.expanduser() / "nodeservice"
        home.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the latter of a user who has no home
        why = getattr(error, "strerror", None) or "this user has no home directory"
        hint = "set XDG_STATE_HOME to a directory that this user may write to"
        raise ConfigError(f"no state can be kept in {place}: {why}", field="XDG_STATE_HOME", hint=hint) from error
    return home


def _config(id_: str, results: str | None, minio: str | None, otlp_endpoint: str | None) -> NodeConfig:
    from nodeservice.config import load_config
    from nodeservice.core.admission import check_task_id

    check_task_id(id_)
    home = _state_home()
    flags: dict[str, object] = {"worker_id": id_, "state_dir": home / "run" / id_, "results_dir": home / "results"}
    flags["upload_give_up_seconds"] = _UPLOAD_GIVE_UP_SECONDS
    if minio is not None:
        flags["minio"] = minio
    if otlp_endpoint is not None:
        flags["otlp_endpoint"] = otlp_endpoint
    if results is not None and results.startswith("s3://"):
        flags["bucket"], _, prefix = results.removeprefix("s3://").partition("/")
        flags["result_prefix"], flags["result_store"] = prefix.strip("/") or None, "s3"
    else:
        flags["result_store"] = "file"
        if results is not None:
            flags["results_dir"] = _directory(results)
    return load_config(None, flags, os.environ, serving=False)


def _directory(results: str) -> Path:
    from nodeservice.errors import ConfigError

    path = results.removeprefix("file://")
    if not path or "://" in path:
        raise ConfigError(f"--results is {results[:200]!r}", field="results", hint="give DIR or s3://BUCKET/PREFIX")
    return Path(path)


async def _run(config: NodeConfig, spec: TaskSpec, view: RunView) -> Finished:
    import contextlib

    from nodeservice.single import remove_run, run_once, sweep_dead_runs

    await sweep_dead_runs(config.state_dir.parent, docker_host=config.docker_host, say=view.say)
    try:
        finished = await run_once(
            config,
            spec,
            traceparent=os.environ.get("TRACEPARENT"),
            on_change=view.changed,
            on_log=view.log,
            on_pull=view.pulling,
            say=view.say,
        )
    except BaseException:
        # Whatever still runs, now that this went wrong, and its directory.
        await sweep_dead_runs(config.state_dir.parent, docker_host=config.docker_host)
        raise
    with contextlib.suppress(OSError):
        kept = remove_run(config.state_dir)
        if kept is not None:
            view.say(f"what could not be collected or stored stays in {kept}")
    return finished
