"""`nodeservice master`: the reference master."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nodeservice.errors import ConfigError, RequestError

if TYPE_CHECKING:
    import ssl

    from nodeservice.master.settings import MasterSettings

_LEAST_RETENTION_SECONDS = 86400.0


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Keys of the file become defaults: an option and its environment variable win."""
    if path is None:
        return None
    import tomllib

    try:
        keys = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}", field="config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}", field="config") from error
    known = {
        parameter.name: parameter for parameter in context.command.params if parameter.name not in (None, "config")
    }
    for key, value in keys.items():
        if key not in known:
            raise ConfigError(
                f"{path} has an unknown key {key!r}", field=key, hint=f"known are {', '.join(sorted(known))}"
            )
        try:
            known[key].process_value(context, value)
        except typer.BadParameter as error:  # else of the command line, and systemd would try for ever
            hint = "see nodeservice master --help; what is repeatable there is a list here"
            raise ConfigError(f"{path}: {key} is {value!r}: {error.message}", field=key, hint=hint) from error
    context.default_map = {**(context.default_map or {}), **keys}
    return path


def register(app: typer.Typer) -> None:
    app.command("master")(master)


def master(
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=_read_config,
            envvar="NODESERVICE_CONFIG",
            help="TOML file; every option here is also a key there.",
        ),
    ] = None,
    listen: Annotated[
        str, typer.Option(envvar="NODESERVICE_LISTEN", help="HOST:PORT to serve on.")
    ] = "127.0.0.1:50051",
    state_dir: Annotated[
        str,
        typer.Option(envvar="NODESERVICE_STATE_DIR", metavar="PATH", help="The queue, and by default the results."),
    ] = "/var/lib/nodeservice/master",
    results_dir: Annotated[
        str | None,
        typer.Option(
            envvar="NODESERVICE_RESULTS_DIR",
            metavar="PATH",
            help="Results that nodes push. Default: in the state directory.",
        ),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            envvar="NODESERVICE_DATABASE_URL",
            help="postgresql+psycopg://…, best from the environment. Default: SQLite in the state directory.",
        ),
    ] = None,
    http_listen: Annotated[
        str | None,
        typer.Option(envvar="NODESERVICE_HTTP_LISTEN", help="HOST:PORT for results by HTTP POST to /upload."),
    ] = None,
    http_limit: Annotated[
        str, typer.Option(envvar="NODESERVICE_HTTP_LIMIT", help="What one POST may carry.")
    ] = "50000000",
    push_limit: Annotated[
        str, typer.Option(envvar="NODESERVICE_PUSH_LIMIT", help="What one attempt may push over gRPC.")
    ] = "100g",
    node: Annotated[
        list[str] | None,
        typer.Option(envvar="NODESERVICE_NODE", help="HOST:PORT of a node that waits to be called; repeatable."),
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(envvar="NODESERVICE_ADVERTISE", help="HOST:PORT that those nodes dial.")
    ] = None,
    heartbeat_timeout: Annotated[
        str, typer.Option(envvar="NODESERVICE_HEARTBEAT_TIMEOUT", help="A node silent for so long is inactive.")
    ] = "30s",
    gone_after: Annotated[
        str,
        typer.Option(
            envvar="NODESERVICE_GONE_AFTER", help="A node silent for so long is given up, its tasks elsewhere."
        ),
    ] = "10m",
    node_loss_retries: Annotated[
        int,
        typer.Option(
            min=0,
            max=100,
            envvar="NODESERVICE_NODE_LOSS_RETRIES",
            help="How often a task is tried again after a fault of its node.",
        ),
    ] = 3,
    finished_retention: Annotated[
        str | None,
        typer.Option(
            envvar="NODESERVICE_FINISHED_RETENTION",
            help="Forget tasks that ended, and nodes last heard of, longer ago, such as 90d. Default: never.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(envvar="NODESERVICE_TLS_CERT", help="PEM certificate of this master.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="NODESERVICE_TLS_KEY", help="PEM key of this master.")] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(envvar="NODESERVICE_TLS_CA", help="PEM certificates that nodes and clients must be signed by."),
    ] = None,
    certified_worker_ids: Annotated[
        bool,
        typer.Option(
            "--certified-worker-ids",
            envvar="NODESERVICE_CERTIFIED_WORKER_IDS",
            help="Nodes must be in their certificates by their worker_id.",
        ),
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", envvar="NODESERVICE_INSECURE", help="Plain text, no authentication.")
    ] = False,
    log_level: Annotated[
        str, typer.Option(envvar="NODESERVICE_LOG_LEVEL", help="debug, info, warning or error.")
    ] = "info",
    log_format: Annotated[
        Literal["auto", "json", "console"],
        typer.Option(
            envvar="NODESERVICE_LOG_FORMAT",
            help="Of the log; auto: the journal's own where stderr is the journal, else json.",
        ),
    ] = "auto",
) -> None:
    """Run the reference master until SIGTERM: a durable queue, placement over several nodes, results."""
    import asyncio
    import faulthandler
    import os

    import structlog

    from nodeservice.service_manager import ServiceManager
    from nodeservice.telemetry.logs import LEVELS, configure_logging

    transport = _transport(tls_cert, tls_key, tls_ca, insecure=insecure)
    if log_level not in LEVELS:
        raise ConfigError(f"--log-level is {log_level!r}", field="log_level", hint=f"use one of {', '.join(LEVELS)}")
    if certified_worker_ids and tls_ca is None:
        words = "--certified-worker-ids without --tls-ca: nobody is asked for a certificate"
        raise ConfigError(words, field="certified_worker_ids", hint="give --tls-ca, or drop it")
    configure_logging(log_level, log_format)
    if not insecure and tls_ca is None:
        structlog.get_logger(__name__).warning("master.callers_unknown", hint="give --tls-ca: else anybody may call")
    daemon, settings_type = _import_master()
    settings = settings_type(
        **_amounts(
            http_limit=http_limit,
            push_limit=push_limit,
            heartbeat_timeout=heartbeat_timeout,
            gone_after=gone_after,
            finished_retention=finished_retention,
        ),
        listen=listen,
        state_dir=_directory("state_dir", state_dir),
        results_dir=None if results_dir is None else _directory("results_dir", results_dir),
        database_url=database_url,
        http_listen=http_listen,
        node_loss_retries=node_loss_retries,
        nodes=tuple(node or ()),
        advertise=advertise,
        certified_worker_ids=certified_worker_ids,
        http_tls=_http_tls(tls_cert, tls_key, tls_ca) if http_listen and not insecure else None,
        **transport,
    )
    faulthandler.enable()
    asyncio.run(daemon.serve_master(settings, manager=ServiceManager.of(os.environ)))


def _directory(key: str, path: str) -> Path:
    """Nothing, such as from a variable that is not set, is not the current directory."""
    if not path:
        raise ConfigError(f"--{key.replace('_', '-')} is empty", field=key, hint="give the path of a directory")
    return Path(path)


def _amounts(
    *, http_limit: str, push_limit: str, heartbeat_timeout: str, gone_after: str, finished_retention: str | None
) -> dict[str, Any]:
    """As settings. What is no amount is a wrong configuration, not a request that is refused."""
    from nodeservice.cli.units import parse_bytes, parse_seconds

    try:
        amounts = {
            "http_limit_bytes": parse_bytes(http_limit, option="--http-limit"),
            "push_limit_bytes": parse_bytes(push_limit, option="--push-limit"),
            "heartbeat_timeout_seconds": parse_seconds(heartbeat_timeout, option="--heartbeat-timeout"),
            "gone_after_seconds": parse_seconds(gone_after, option="--gone-after"),
        }
        if finished_retention is not None:
            option = "--finished-retention"
            amounts["finished_retention_seconds"] = parse_seconds(finished_retention, option=option)
    except RequestError as error:
        raise ConfigError(error.message, field=error.field, hint=error.hint) from error
    if amounts["heartbeat_timeout_seconds"] <= 0:
        words = f"--heartbeat-timeout is {heartbeat_timeout}: every node would be silent"
        raise ConfigError(
            words, field="heartbeat_timeout", hint="give a few times what nodes have as heartbeat_seconds"
        )
    if amounts["gone_after_seconds"] < amounts["heartbeat_timeout_seconds"]:
        words = f"--gone-after is {gone_after}: nodes would be given up before they are silent"
        raise ConfigError(
            words, field="gone_after", hint=f"give at least what --heartbeat-timeout is, {heartbeat_timeout}"
        )
    if amounts.get("finished_retention_seconds", _LEAST_RETENTION_SECONDS) < _LEAST_RETENTION_SECONDS:
        words = f"--finished-retention is {finished_retention}: who waits for a task may not hear its end"
        raise ConfigError(words, field="finished_retention", hint="give a day at least, such as 90d")
    return amounts


def _import_master() -> tuple[Any, type[MasterSettings]]:
    try:
        from nodeservice.master import daemon
        from nodeservice.master.settings import MasterSettings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the master needs the package {error.name}", hint="install nodeservice[master], or [master,postgresql]"
        ) from error
    return daemon, MasterSettings


def _transport(cert: Path | None, key: Path | None, ca: Path | None, *, insecure: bool) -> dict[str, Any]:
    if insecure:
        if cert or key or ca:
            raise ConfigError("--insecure and --tls-… exclude each other", field="insecure", hint="drop one of them")
        return {}
    if cert is None or key is None:
        raise ConfigError(
            "the master has no certificate",
            field="tls_cert",
            hint="give --tls-cert and --tls-key, or --insecure for plain text",
        )
    from nodeservice.certificates import read_terms
    from nodeservice.rpc.tls import channel_credentials, server_credentials

    return {
        "certificates": read_terms(cert, ca),
        "server_credentials": server_credentials(cert, key, ca),
        "dial_credentials": channel_credentials(ca, cert, key),
    }


def _http_tls(cert: Path | None, key: Path | None, ca: Path | None) -> ssl.SSLContext | None:
    """As strict as gRPC beside it: with an authority, who POSTs results must show a certificate that it signed."""
    if cert is None or key is None:
        return None
    import ssl

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    if ca is not None:
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
