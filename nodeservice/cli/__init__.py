"""The command line: thin commands over the daemon, the reference master, and its clients."""

from __future__ import annotations

import json
import os
import signal
import sys

import typer

from nodeservice.cli import streams
from nodeservice.cli.exit_codes import ExitCode, code_of_error
from nodeservice.errors import NodeServiceError, RequestError
from nodeservice.task_bounds import is_utf8
from nodeservice.telemetry.plain import plain

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Typer has no name of its own for what its click, bundled or not, raises for wrong options."""


def build_app() -> typer.Typer:
    """All commands. Each module imports what it needs when its command runs, so that none pays for another."""
    from nodeservice.cli import (
        client,
        doctor_command,
        inspect_command,
        master_command,
        mode_command,
        run_command,
        serve_command,
    )

    app = typer.Typer(
        name="nodeservice",
        help="A batch worker for (GPU) machines that a master can trust.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_root)
    for module in (serve_command, run_command, inspect_command, doctor_command, mode_command, master_command, client):
        module.register(app)
    return app


def _version(is_asked: bool) -> None:
    if is_asked:
        from nodeservice import __version__
        from nodeservice.build_info import commit

        typer.echo(f"nodeservice {__version__} ({commit()})")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", help="Show version and commit, and exit.", is_eager=True, callback=_version
    ),
) -> None:
    """What comes before the command."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by `__main__`; commands have something to clean up
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    """Run what was typed; ends the process. Errors made on purpose become one line on stderr and a code of their own."""
    streams.open_missing()
    arguments = sys.argv[1:]
    try:
        code = _run(arguments)
    except SystemExit as exit_:  # 1 is what typer and rich say of a pipe that nobody reads
        code = 0 if not exit_.code else ExitCode.OUTPUT_CLOSED
    except OSError as error:
        if error.filename is not None or streams.takes_more():
            raise
        code = ExitCode.OUTPUT_CLOSED
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a reader of our output may keep us waiting
    if not streams.flushed():
        code = ExitCode.OUTPUT_CLOSED
    # All is closed and flushed. A thread that waits for an engine which never answers must not hold up the end.
    os._exit(code)


def _run(arguments: list[str]) -> int:
    try:
        for number, argument in enumerate(arguments, start=1):
            if not is_utf8(argument):
                raise _UsageError(f"Argument {number} is not UTF-8: {argument[:40]!r}.")
        return int(build_app()(arguments, standalone_mode=False) or 0)
    except _UsageError as error:
        error.show()  # type: ignore[attr-defined]
        _tell_as_json(arguments, error.format_message(), "USAGE")  # type: ignore[attr-defined]
        return ExitCode.USAGE
    except NodeServiceError as error:
        sys.stderr.write(f"nodeservice: {plain(str(error))}\n")
        _tell_as_json(arguments, str(error), error.reason)
        return code_of_error(error)


def _tell_as_json(arguments: list[str], message: str, reason: str) -> None:
    """The failure as an object on stdout, for a caller who asked for JSON and got no further than this."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--json" not in options:
        return
    told: dict[str, object] = {"outcome": None, "reason": reason, "message": message}
    if options[0] == "run":
        from nodeservice.cli.result_view import failure_as_dict

        told = failure_as_dict(task_id="", image="", error=RequestError(message, reason=reason))
    sys.stdout.write(json.dumps(told) + "\n")
