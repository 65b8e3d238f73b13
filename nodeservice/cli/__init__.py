"""The command line: thin commands over the daemon, the reference master, and its clients."""

from __future__ import annotations

import sys

import typer

from nodeservice.cli.exit_codes import code_of_error
from nodeservice.errors import NodeServiceError


def build_app() -> typer.Typer:
    """All commands. Each module imports what it needs when its command runs, so that none pays for another."""
    from nodeservice.cli import client, doctor_command, inspect_command, master_command, run_command, serve_command

    app = typer.Typer(
        name="nodeservice",
        help="A batch worker for (GPU) machines that a master can trust.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_root)
    for module in (serve_command, run_command, inspect_command, doctor_command, master_command, client):
        module.register(app)
    return app


def _root(
    version: bool = typer.Option(False, "--version", help="Show the version and exit.", is_eager=True),
) -> None:
    if version:
        from nodeservice import __version__

        typer.echo(f"nodeservice {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point. Errors made on purpose become one clear line on stderr and a code of their own."""
    try:
        build_app()()
    except NodeServiceError as error:
        sys.stderr.write(f"nodeservice: {error}\n")
        sys.exit(code_of_error(error))
