"""`nodeservice serve`: the daemon."""

from __future__ import annotations

import os
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)


def serve(
    config: Path = typer.Option(
        None, "--config", envvar="NODESERVICE_CONFIG", help="TOML file; every option here is also a key there."
    ),
    master: str = typer.Option(None, help="HOST:PORT of the master. Without it the node waits to be called."),
    worker_id: str = typer.Option(None, help="Name of this node. Default: the host's name."),
    listen: str = typer.Option(None, help="HOST:PORT to serve on."),
    advertise: str = typer.Option(None, help="HOST[:PORT] for the master to dial, where it can't see the right one."),
    state_dir: str = typer.Option(None, metavar="PATH", help="Journal, logs and work directories."),
    docker_host: str = typer.Option(None, help="The engine's address. Default: DOCKER_HOST, or the usual socket."),
    results_dir: str = typer.Option(
        None, metavar="PATH", help="Results on this host: the store itself, or what is kept meanwhile."
    ),
    result_store: str = typer.Option(
        None, help="file, s3, http or master. Default: s3 if --minio is given, else file."
    ),
    minio: str = typer.Option(None, help="HOST:PORT of S3 or MinIO; credentials come from the environment or a file."),
    bucket: str = typer.Option(None, help="Bucket; made when missing."),
    http_upload_url: str = typer.Option(None, help="Where the http store posts results."),
    tls_cert: str = typer.Option(None, metavar="PATH", help="PEM certificate of this node."),
    tls_key: str = typer.Option(None, metavar="PATH", help="PEM key of this node."),
    tls_ca: str = typer.Option(None, metavar="PATH", help="PEM certificates that peers must be signed by."),
    insecure: bool = typer.Option(None, "--insecure", help="Plain text, no authentication."),
    otlp_endpoint: str = typer.Option(None, help="HOST:PORT of an OTLP/gRPC collector."),
    upload_give_up_seconds: float = typer.Option(
        None, help="For how long to try a store that is away before results are kept on this host."
    ),
    log_level: str = typer.Option(None, help="debug, info, warning or error."),
    log_format: str = typer.Option(None, help="auto, json or console."),
) -> None:
    """Run this machine as a worker node until SIGTERM. Containers that run then run on."""
    flags = {name: value for name, value in locals().items() if name != "config" and value is not None}
    import asyncio
    import faulthandler

    from nodeservice.config import load_config
    from nodeservice.telemetry.logs import configure_logging

    settings = load_config(config, flags, os.environ)
    configure_logging(settings.log_level, settings.log_format)

    from nodeservice.daemon.serving import serve as serve_node
    from nodeservice.service_manager import ServiceManager

    faulthandler.enable()
    asyncio.run(serve_node(settings, manager=ServiceManager.of(os.environ)))
