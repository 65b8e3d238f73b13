"""The settings themselves: their names, types, defaults and what they demand of each other.

Each field's description says what to give: it is the remedy shown with an error.
"""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from nodeservice.errors import ConfigError
from nodeservice.task_bounds import DAY_SECONDS, ID, MAX_SECONDS, MOST_PIDS

PREFIX = "NODESERVICE_"
CREDENTIALS = {"minio_access_key": "MINIO_ACCESS_KEY", "minio_secret_key": "MINIO_SECRET_KEY"}

_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})\Z")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?\Z")
_LAST_PORT = 65535
_PREFIX = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*\Z")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
_MIB = 1024**2


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        found = pattern.match(value)
        if found is None or (pattern in (_HOST_PORT, _HOST) and int(found["port"] or 0) > _LAST_PORT):
            raise ValueError(f"is not {what}")
        return value

    return AfterValidator(check)


def _url(*schemes: str) -> AfterValidator:
    def check(value: str) -> str:
        scheme, mark, rest = value.partition("://")
        if not mark or scheme not in schemes or not rest:
            raise ValueError(f"is not a URL that begins with {' or '.join(f'{s}://' for s in schemes)}")
        if scheme in ("http", "https") and not urlsplit(value).hostname:
            raise ValueError("names no host")
        if ":" in rest.partition("/")[0].rpartition("@")[0]:
            raise ValueError("must not hold a password")
        return value

    return AfterValidator(check)


def _endpoint(value: str) -> str:
    if not _HOST_PORT.match(value) and not re.match(r"https?://[^@\s/]+(:[0-9]+)?/?\Z", value):
        raise ValueError("is neither HOST:PORT nor http(s)://HOST:PORT")
    return value


def _endpoint_or_none(value: str) -> str | None:
    return None if value.lower() == "none" else _endpoint(value)


def _default_worker_id() -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname()).strip("-._")[:128] or "node"


def _named(value: object) -> object:
    if isinstance(value, str) and (not value or "\0" in value):
        raise ValueError("is no path")
    return value


def _found(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:  # pathlib's word for a user without a home
        raise ValueError("names the home of a user who has none") from error


Folder = Annotated[Path, BeforeValidator(_named), AfterValidator(_found)]
HostPort = Annotated[str, _matching(_HOST_PORT, "HOST:PORT")]
Lower = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
_LONGEST_SECONDS = 1e9
"""Some 30 years. With much longer ones no instant can be reckoned."""
Seconds = Annotated[float, Field(gt=0, le=_LONGEST_SECONDS)]
SecondsOrNone = Annotated[float, Field(ge=0, le=_LONGEST_SECONDS)]
Bytes = Annotated[int, Field(gt=0)]


class NodeConfig(BaseSettings):
    """All settings of a node. Constructed directly it reads neither file nor environment: that is `load_config`'s work."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        env_prefix=PREFIX,
        env_ignore_empty=True,
        validate_default=True,
    )

    # who and where
    worker_id: Annotated[str, _matching(ID, "a safe name")] = Field(
        default_factory=_default_worker_id, description="1-128 of A-Z a-z 0-9 . _ -, beginning with a letter or digit"
    )
    listen: HostPort = Field("0.0.0.0:50052", description="HOST:PORT to listen on; port 0 takes a free one")
    master: HostPort | None = Field(None, description="HOST:PORT of the master; without it the node waits to be called")
    advertise: Annotated[str, _matching(_HOST, "HOST or HOST:PORT")] | None = Field(
        None, description="HOST or HOST:PORT for the master to dial, where the one it sees is wrong"
    )
    state_dir: Folder = Field(
        Path("/var/lib/nodeservice"), description="a directory on a local disk, of this node alone"
    )
    docker_host: Annotated[str, _url("unix", "tcp", "http")] | None = Field(
        None,
        description="the engine's address, such as unix:///var/run/docker.sock; default DOCKER_HOST or that socket",
    )

    # transport security
    tls_cert: Folder | None = Field(None, description="PEM file of the certificate and its chain")
    tls_key: Folder | None = Field(None, description="PEM file of the certificate's key, without a passphrase")
    tls_ca: Folder | None = Field(None, description="PEM file of the authority whose peers are trusted")
    insecure: bool = Field(False, description="true for plain text without any authentication")

    # results
    results_dir: Folder = Field(
        default_factory=lambda data: data["state_dir"] / "results", description="a directory for results"
    )
    minio: HostPort | None = Field(None, description="HOST:PORT of the S3 or MinIO server")
    bucket: Annotated[str, _matching(_BUCKET, "a valid bucket name")] = Field(
        "nodeservice-results", description="3-63 of a-z 0-9 . -, beginning and ending with a letter or digit"
    )
    result_prefix: Annotated[str, _matching(_PREFIX, "a plain path")] | None = Field(
        None, description="a path below the bucket, of A-Z a-z 0-9 . _ - and /, such as team/a"
    )
    minio_secure: bool = Field(False, description="true where the S3 server speaks TLS")
    minio_region: str | None = Field(None, description="the region's name; needed by few servers")
    minio_access_key: SecretStr | None = Field(None, description="set MINIO_ACCESS_KEY or minio_credentials_file")
    minio_secret_key: SecretStr | None = Field(None, description="set MINIO_SECRET_KEY or minio_credentials_file")
    minio_credentials_file: Folder | None = Field(
        None, description="a file with the lines MINIO_ACCESS_KEY=… and MINIO_SECRET_KEY=…"
    )
    http_upload_url: Annotated[str, _url("http", "https")] | None = Field(
        None, description="URL that takes the results"
    )
    http_upload_limit_bytes: Bytes = Field(50_000_000, description="bytes of one multipart POST, at least 1")
    result_store: Literal["file", "s3", "http", "master"] = Field(
        default_factory=lambda data: "s3" if data["minio"] else "file", description="file, s3, http or master"
    )
    upload_give_up_seconds: SecondsOrNone = Field(3600.0, description="seconds before results are kept on this host")

    # GPUs
    gpu_sharing: Literal["enforced", "watched"] = Field(
        "enforced", description="enforced, or watched to give parts of GPUs too that are only watched"
    )
    gpu_mig_counts: bool = Field(False, description="true to give MIG instances to tasks that ask for a number of GPUs")
    gpu_mps_pipe_dir: Folder | None = Field(None, description="the directory in which an MPS server listens")
    gpu_lock_dir: Folder = Field(
        Path("/run/nodeservice/gpus"), description="a directory in memory that all workers of this host share"
    )
    gpu_poll_seconds: Seconds = Field(1.0, description="seconds between two looks, more than 0")
    gpu_quarantine_seconds: Seconds = Field(60.0, description="seconds without trouble before a GPU takes tasks again")

    # what a task that asks for nothing gets
    default_cpu_milli: int = Field(1000, ge=10, description="thousandths of a core, at least 10")
    default_memory_bytes: int = Field(512 * _MIB, ge=6 * _MIB, description="bytes, at least 6 MiB")
    default_disk_bytes: Bytes = Field(1024 * _MIB, description="bytes, at least 1")
    default_pids_limit: int = Field(4096, ge=1, le=MOST_PIDS, description="processes and threads, at least 1")
    default_timeout_seconds: Annotated[float, Field(gt=0, le=MAX_SECONDS)] | None = Field(
        None, description="seconds of running, more than 0 and at most a year; unset for none"
    )
    default_grace_seconds: float = Field(
        10.0, ge=0, le=DAY_SECONDS, description="seconds from SIGTERM to SIGKILL, at most a day"
    )

    # kept back from tasks; unset takes the built-in reserve
    reserve_cpu_milli: int | None = Field(None, ge=0, description="thousandths of a core")
    reserve_memory_bytes: int | None = Field(None, ge=0, description="bytes")
    reserve_disk_bytes: int | None = Field(None, ge=0, description="bytes")

    keep_free_disk_bytes: int = Field(
        512 * _MIB, ge=0, description="bytes; with less free disk no task is taken, with half of it one is ended"
    )

    # what is left on this host, and for how long
    image_high_percent: float = Field(
        85.0,
        gt=0,
        le=100,
        description="percent of the engine's disk, above 0; above it images that were pulled are removed",
    )
    image_low_percent: float = Field(80.0, gt=0, le=100, description="percent, not more than image_high_percent")
    sweep_seconds: Seconds = Field(600.0, description="seconds between looks for what is left over, more than 0")
    orphan_grace_seconds: SecondsOrNone = Field(600.0, description="seconds for which it has to be seen before it goes")
    results_retention_seconds: Seconds | None = Field(
        None, description="seconds to keep results in results_dir, more than 0; unset for ever"
    )
    salvage_retention_seconds: Seconds | None = Field(
        None, description="seconds to keep what could not be collected, more than 0; unset for ever"
    )
    janitor_dry_run: bool = Field(False, description="true to log what would be removed, and remove none of it")

    # times and bounds
    heartbeat_seconds: Seconds = Field(5.0, description="seconds, more than 0; masters give a node up after 30")
    call_deadline_seconds: Seconds = Field(35.0, description="seconds for a call to the master; it may hold one for 30")
    connect_backoff_min_seconds: Seconds = Field(0.5, description="seconds, more than 0")
    connect_backoff_max_seconds: Seconds = Field(30.0, description="seconds, not less than connect_backoff_min_seconds")
    report_backoff_min_seconds: Seconds = Field(0.5, description="seconds, more than 0")
    report_backoff_max_seconds: Seconds = Field(30.0, description="seconds, not less than report_backoff_min_seconds")
    pull_timeout_seconds: Seconds = Field(3600.0, description="seconds for a whole image pull, more than 0")
    pull_inactivity_seconds: Seconds = Field(120.0, description="seconds without progress of a pull, more than 0")
    relist_seconds: Seconds = Field(10.0, description="seconds between looks at all containers, more than 0")
    log_max_bytes: Bytes = Field(100 * _MIB, description="bytes of a task's log that are kept, at least 1")
    log_tail_bytes: int = Field(8000, ge=0, le=1_000_000, description="bytes of log in a report, at most 1000000")
    finished_retention_count: int = Field(2_000, ge=0, description="finished tasks to remember")
    finished_retention_seconds: SecondsOrNone = Field(7 * 86400.0, description="seconds to remember a finished task")

    # what the node says about itself
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Lower] = Field(
        "info", description="debug, info, warning or error"
    )
    log_format: Annotated[Literal["auto", "json", "console"], Lower] = Field(
        "auto", description="auto, json or console"
    )
    otlp_endpoint: Annotated[str, AfterValidator(_endpoint)] | None = Field(
        None,
        description="HOST:PORT or URL of an OTLP/gRPC collector; default OTEL_EXPORTER_OTLP_ENDPOINT, else no traces",
    )
    otlp_metrics_endpoint: Annotated[str, AfterValidator(_endpoint_or_none)] | None = Field(
        default_factory=lambda data: data["otlp_endpoint"],
        description="HOST:PORT or URL of an OTLP/gRPC collector of metrics, or none; default otlp_endpoint",
    )
    otlp_insecure: bool = Field(False, description="true for plain text to the collector; http:// means the same")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @model_validator(mode="after")
    def _check_together(self) -> NodeConfig:
        # A ConfigError passes through pydantic as it is, since it is no ValueError.
        for name in ("connect", "report"):
            low, high = (getattr(self, f"{name}_backoff_{end}_seconds") for end in ("min", "max"))
            if high < low:
                raise ConfigError(
                    f"{name}_backoff_max_seconds = {high:g} is less than {name}_backoff_min_seconds = {low:g}",
                    field=f"{name}_backoff_max_seconds",
                    hint="give a maximum that is not less than the minimum",
                )
        if self.image_low_percent > self.image_high_percent:
            raise ConfigError(
                f"image_low_percent = {self.image_low_percent:g} is more than image_high_percent = "
                f"{self.image_high_percent:g}",
                field="image_low_percent",
                hint="give a low mark that is not above the high one",
            )
        ours = (self.state_dir / name for name in ("tasks", "logs", "salvage"))
        below = [place for place in ours if self.results_dir.is_relative_to(place)]
        if below or self.results_dir == self.state_dir:  # where a task may be called as a file of ours
            raise ConfigError(
                f"results_dir = {self.results_dir} lies among this node's own files: {[*below, self.state_dir][0]}",
                field="results_dir",
                hint="give a directory beside it, such as the default, results in the state_dir",
            )
        if self.result_store == "http" and self.http_upload_url is None:
            raise _needed("http_upload_url", "result_store is http", "give the URL that takes the results")
        if self.result_store == "s3":
            if self.minio is None:
                raise _needed("minio", "result_store is s3", "give the HOST:PORT of the S3 or MinIO server")
            for field in CREDENTIALS:
                if getattr(self, field) is None:
                    raise _needed(field, "result_store is s3", str(type(self).model_fields[field].description))
        return self

    def check_transport(self) -> None:
        """Raise ConfigError unless either TLS or plain text was chosen, and chosen completely."""
        given = [name for name in ("tls_cert", "tls_key", "tls_ca") if getattr(self, name) is not None]
        if self.insecure and given:
            raise ConfigError(
                f"insecure = true contradicts {given[0]}", field="insecure", hint="drop insecure, or the TLS files"
            )
        if not self.insecure and not given:
            raise ConfigError(
                "neither TLS nor plain text was chosen",
                field="tls_cert",
                hint="give tls_cert and tls_key (and tls_ca), or set insecure for plain text without authentication",
            )
        for name in ("tls_cert", "tls_key"):
            if given and name not in given:
                raise _needed(name, f"{given[0]} is given", str(type(self).model_fields[name].description))


def _needed(field: str, because: str, hint: str) -> ConfigError:
    return ConfigError(f"{field} is missing, and {because}", field=field, hint=hint)
