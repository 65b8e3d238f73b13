"""How to reach a bucket, and the one fact about it that is not an error."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

MIB = 1024 * 1024

LIGHT_COUNT = 16
"""Requests at a time that carry little: most of their time goes by in the store, which waits for its disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Access:
    """Endpoint `host[:port]` and bucket. The secret never shows in a repr.

    `parallel_count` objects travel at a time, each holding one part of `part_bytes` (5 MiB at least) in memory; beside
    them `LIGHT_COUNT` of up to 1 MiB.
    `timeout_seconds` bounds each silence on a connection, not an upload.
    """

    endpoint: str
    bucket: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    secure: bool = True
    region: str = "us-east-1"
    prefix: str = ""
    parallel_count: int = 4
    part_bytes: int = 16 * MIB
    timeout_seconds: float = 30.0
    ca_file: Path | None = None


class BucketMissing(Exception):  # noqa: N818 (a fact for the store, which makes the bucket)
    """The bucket does not exist, or not any more."""
