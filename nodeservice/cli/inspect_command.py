"""`nodeservice inspect`: what this machine really has."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)


def inspect(
    config: Path = typer.Option(None, "--config", envvar="NODESERVICE_CONFIG", help="TOML file of the node."),
    state_dir: str = typer.Option(None, metavar="PATH", help="State directory, whose disk is looked at."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
) -> None:
    """Show CPU, memory, disk, GPUs and engine: what exists, what is reserved, what tasks may have, what is free."""
    import asyncio
    import json
    import sys

    from nodeservice.cli.fitted import console
    from nodeservice.cli.inspect_view import render_seen, seen_as_dict
    from nodeservice.config import load_config
    from nodeservice.daemon.look import look
    from nodeservice.telemetry.logs import configure_logging

    configure_logging("error", "console")  # what there is to warn of stands in the answer
    flags = {"state_dir": state_dir} if state_dir is not None else {}
    seen = asyncio.run(look(load_config(config, flags, os.environ, serving=False)))
    if as_json:
        sys.stdout.write(json.dumps(seen_as_dict(seen), indent=2) + "\n")
    else:
        render_seen(seen, console())
