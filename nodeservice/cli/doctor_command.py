"""`nodeservice doctor`: which limits hold on this machine, proven."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    config: Path = typer.Option(None, "--config", envvar="NODESERVICE_CONFIG", help="TOML file of the node."),
    state_dir: str = typer.Option(
        None, metavar="PATH", help="State directory, whose file system decides how the disk is bound."
    ),
    docker_host: str = typer.Option(None, help="The engine's address. Default: DOCKER_HOST, or the usual socket."),
    image: str = typer.Option(None, help="An image with /bin/sh. Default: one made from this host's busybox."),
    patience: float = typer.Option(1.0, min=1.0, help="Let each probe take so many times longer: for a busy machine."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on stdout."),
) -> None:
    """Try to break every limit in small containers, and tell what is hard, watched or missing, and how to get it.

    The exit code is 0 where every limit is kept, 1 where one is not, 2 where nothing could be tried.
    """
    import asyncio
    import json
    import sys

    from nodeservice.cli.doctor_view import render_diagnosis
    from nodeservice.cli.exit_codes import DoctorCode
    from nodeservice.cli.fitted import console
    from nodeservice.config import load_config
    from nodeservice.doctor.examine import examine
    from nodeservice.errors import NodeServiceError
    from nodeservice.telemetry.logs import configure_logging
    from nodeservice.telemetry.plain import plain

    configure_logging("error", "console")
    flags = {"state_dir": state_dir, "docker_host": docker_host}
    settings = load_config(config, flags, os.environ, serving=False)
    try:
        diagnosis = asyncio.run(examine(settings, image=image, patience=patience))
    except NodeServiceError as error:
        sys.stderr.write(f"nodeservice: {plain(str(error))}\n")
        if as_json:
            told: dict[str, object] = {"sound": None, "reason": error.reason, "message": str(error), "checks": []}
            sys.stdout.write(json.dumps(told) + "\n")
        raise typer.Exit(DoctorCode.NOT_EXAMINED) from error
    if as_json:
        sys.stdout.write(json.dumps(diagnosis.as_dict(), indent=2) + "\n")
    else:
        render_diagnosis(diagnosis, console())
    raise typer.Exit(DoctorCode.SOUND if diagnosis.is_sound else DoctorCode.NOT_KEPT)
