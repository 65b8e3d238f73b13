"""Which store a configured URL means."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from nodeservice.errors import ConfigError
from nodeservice.ports import ResultStore
from nodeservice.results.access import S3Access
from nodeservice.results.mount import ResultsMount

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
"""S3's rule for new buckets (Amazon S3 user guide, bucket naming rules), which MinIO follows."""


def open_result_store(
    url: str,
    *,
    s3: S3Access | None = None,
    http_limit_bytes: int | None = None,
    ca_file: Path | None = None,
    certificate: tuple[Path, Path] | None = None,
    mount: ResultsMount | None = None,
) -> ResultStore:
    """`file:///dir`, `s3://bucket[/prefix]`, `http(s)://host/upload`.

    For s3, `s3` says how to reach it, and the URL's bucket and prefix replace those in it. Nothing is contacted here. The
    push over gRPC is not a URL; the daemon composes it. Raises ConfigError.
    """
    parts = urlsplit(url)
    match parts.scheme:
        case "file":
            return _open_directory(url, parts.netloc, unquote(parts.path), mount)
        case "s3":
            return _open_bucket(url, parts.netloc, unquote(parts.path).strip("/"), s3)
        case "http" | "https":
            from nodeservice.results.http import LIMIT_BYTES, HttpResultStore

            if not parts.hostname:
                raise _refused(url, "it names no host", "http://HOST:PORT/upload")
            limit = LIMIT_BYTES if http_limit_bytes is None else http_limit_bytes
            return HttpResultStore(url, limit_bytes=limit, ca_file=ca_file, certificate=certificate)
        case _:
            raise _refused(url, "the scheme is unknown", "file:///DIR, s3://BUCKET/PREFIX or http://HOST:PORT/upload")


def _open_directory(url: str, host: str, path: str, mount: ResultsMount | None) -> ResultStore:
    from nodeservice.results.file import FileResultStore

    if host not in ("", "localhost") or not path.startswith("/"):
        raise _refused(url, "it is not an absolute path on this host", "file:///DIR, with three slashes")
    return FileResultStore(Path(path), mount=mount)


def _open_bucket(url: str, bucket: str, prefix: str, s3: S3Access | None) -> ResultStore:
    from nodeservice.results.s3 import S3ResultStore

    if not _BUCKET.fullmatch(bucket):
        raise _refused(url, "it has no valid bucket name", "3 to 63 lower-case letters, digits, dots and hyphens")
    if s3 is None:
        raise _refused(url, "no endpoint and credentials are configured", "set endpoint, access key and secret key")
    return S3ResultStore(replace(s3, bucket=bucket, prefix=prefix))


def _refused(url: str, why: str, hint: str) -> ConfigError:
    return ConfigError(f"{url!r} cannot be used for results: {why}", field="results", hint=hint)
