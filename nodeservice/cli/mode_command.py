"""The commands for who looks after a node: cordon, uncordon, drain."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodeservice.cli.connection import CALL_SECONDS, Connection, say, with_connection

if TYPE_CHECKING:
    from nodeservice.wire import master_worker_pb2 as pb

_POLL_SECONDS = 1.0
Node = Annotated[str, typer.Option("--node", envvar="NODESERVICE_NODE", help="HOST:PORT of the node itself.")]
_DEFAULT_NODE = "127.0.0.1:50052"


def register(app: typer.Typer) -> None:
    for command in (cordon, uncordon, drain):
        app.command(command.__name__)(with_connection(command, peer="node", address=Node, default=_DEFAULT_NODE))


def cordon(link: Connection) -> None:
    """Let a node take no new tasks. What it has goes on. Holds across restarts until uncordon."""
    _set(link, "CORDONED")


def uncordon(link: Connection) -> None:
    """Let a node take tasks again."""
    _set(link, "ACTIVE")


def drain(
    link: Connection,
    *,
    deadline: Annotated[
        str | None, typer.Option(help="After so long, end what still runs, such as 10m. Default: let it finish.")
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return at once instead of when it is empty.")] = False,
) -> None:
    """Empty a node: it takes nothing new; what it has comes to its end, is stored and reported. Uncordon takes it back."""
    from nodeservice.cli.units import parse_seconds

    seconds = None if deadline is None else parse_seconds(deadline, option="--deadline")
    answer = _set(link, "DRAINING", deadline_seconds=seconds, is_last=no_wait)
    shown = -1
    while not no_wait and answer.unfinished_tasks and answer.mode == "DRAINING":
        if answer.unfinished_tasks != shown:
            shown = answer.unfinished_tasks
            say(f"tasks left: {shown}")
        time.sleep(_POLL_SECONDS)
        with link.open() as stub:
            answer = _ask(stub, "")
    if not no_wait:
        _tell(link, answer)


def _set(link: Connection, mode: str, *, deadline_seconds: float | None = None, is_last: bool = True) -> pb.NodeModeAck:
    with link.open() as stub:
        answer = _ask(stub, mode, deadline_seconds)
    if not answer.success or is_last:
        _tell(link, answer)
    return answer


def _ask(stub: Any, mode: str, deadline_seconds: float | None = None) -> pb.NodeModeAck:
    from nodeservice.wire import master_worker_pb2 as pb

    request = pb.NodeMode(mode=mode)
    if deadline_seconds is not None:
        request.deadline_seconds = deadline_seconds
    answer: pb.NodeModeAck = stub.SetNodeMode(request, timeout=CALL_SECONDS)
    return answer


def _tell(link: Connection, answer: pb.NodeModeAck) -> None:
    """Ends the command with code 75 where the node refused."""
    from nodeservice.cli.exit_codes import ExitCode

    if link.as_json:
        told = {
            "success": answer.success,
            "mode": answer.mode or None,
            "unfinished_tasks": answer.unfinished_tasks,
            "reason": answer.reason or None,
            "message": answer.message,
        }
        sys.stdout.write(json.dumps(told) + "\n")
    elif answer.success:
        left = f", unfinished tasks: {answer.unfinished_tasks}" if answer.unfinished_tasks else ", no task unfinished"
        sys.stdout.write(f"{answer.mode}{left}\n")
    if not answer.success:
        say(answer.message)
        raise typer.Exit(ExitCode.REJECTED)
