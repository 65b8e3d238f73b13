"""What parts are made of from the configuration."""

from __future__ import annotations

from nodeservice.config import NodeConfig
from nodeservice.core.model import Resources
from nodeservice.errors import InvariantError
from nodeservice.ports import ResultStore
from nodeservice.results.access import S3Access
from nodeservice.results.file import FileResultStore
from nodeservice.results.http import HttpResultStore
from nodeservice.results.mount import ResultsMount
from nodeservice.results.s3 import S3ResultStore
from nodeservice.rpc.convert import TaskDefaults

DEFAULT_REGION = "us-east-1"


def open_store(config: NodeConfig) -> ResultStore:
    """The configured store, other than the push over gRPC."""
    match config.result_store:
        case "s3":
            if config.minio is None or config.minio_access_key is None or config.minio_secret_key is None:
                raise InvariantError("a configuration with result_store s3 has endpoint and credentials")
            access = S3Access(
                endpoint=config.minio,
                bucket=config.bucket,
                access_key=config.minio_access_key.get_secret_value(),
                secret_key=config.minio_secret_key.get_secret_value(),
                secure=config.minio_secure,
                region=config.minio_region or DEFAULT_REGION,
                prefix=config.result_prefix or "",
            )
            return S3ResultStore(access)
        case "http":
            if config.http_upload_url is None:
                raise InvariantError("a configuration with result_store http has a URL")
            return HttpResultStore(
                config.http_upload_url,
                limit_bytes=config.http_upload_limit_bytes,
                ca_file=config.tls_ca,
                certificate=(config.tls_cert, config.tls_key) if config.tls_cert and config.tls_key else None,
            )
        case _:
            return open_results_dir(config)


def open_results_dir(config: NodeConfig) -> ResultStore:
    return FileResultStore(config.results_dir, mount=results_mount(config))


def results_mount(config: NodeConfig) -> ResultsMount:
    return ResultsMount(config.results_dir, config.state_dir)


def task_defaults(config: NodeConfig) -> TaskDefaults:
    return TaskDefaults(
        request=Resources(
            cpu_milli=config.default_cpu_milli,
            memory_bytes=config.default_memory_bytes,
            disk_bytes=config.default_disk_bytes,
        ),
        pids_limit=config.default_pids_limit,
        timeout_seconds=config.default_timeout_seconds,
        grace_seconds=config.default_grace_seconds,
    )
