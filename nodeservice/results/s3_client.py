"""The blocking half of the S3 store: one bucket through `minio`, with its errors translated.

Imported only by nodes that store to S3, since `minio` and `urllib3` cost about 20 MiB.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import ssl
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, BinaryIO, cast
from xml.etree.ElementTree import ParseError

import structlog
import urllib3
from minio import Minio
from minio.datatypes import Object
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError

from nodeservice.errors import NodeFaultError, RequestError, TransientError
from nodeservice.ports import ResultFile
from nodeservice.results import s3_archive
from nodeservice.results.access import LIGHT_COUNT, BucketMissing, S3Access
from nodeservice.results.s3_http import BlockwisePool, stopped_by
from nodeservice.results.s3_object import AlreadyThere, Standing, StoredObject
from nodeservice.results.s3_parts import PartSender
from nodeservice.results.source import VerifiedReader

log = structlog.get_logger(__name__)

_MAX_PART_COUNT = 10_000
_SHA256_HEADER = "x-amz-meta-sha256"
_CONTENT_SHA256 = "x-amz-content-sha256"
_ANY_BYTES = "application/octet-stream"
_JSON = "application/json"
_ONLY_NEW = {"If-None-Match": "*"}
"""Of S3 since August 2024 ("Conditional writes"), and of MinIO; a store that does not know it may overlook it."""

_TRANSIENT_CODES = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "NoSuchUpload",
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "TemporaryRedirect",
        "XAmzContentSHA256Mismatch",
        "XMinioServerNotInitialized",
    }
)
_FULL_CODES = frozenset({"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded"})
_CREDENTIALS_CODES = frozenset(
    {"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "RequestTimeTooSkewed", "SignatureDoesNotMatch"}
)
"""Answers to whoever asks, whatever it is that they ask."""
_HINTS = {
    "AccessDenied": "allow s3:ListBucket, GetObject, PutObject, AbortMultipartUpload, ListBucketMultipartUploads",
    "InvalidAccessKeyId": "check the access key",
    "SignatureDoesNotMatch": "check the secret key",
    "RequestTimeTooSkewed": "set this host's clock",
    "PermanentRedirect": "set the bucket's region",
}


class BucketClient:
    """Blocking operations on one bucket, for any thread. None retries: the lifecycle does, with backoff.

    Raises BucketMissing; TransientError (STORE_UNREACHABLE, STORE_FULL); NodeFaultError (STORE_CREDENTIALS, STORE_REFUSED);
    RequestError (RESULT_TOO_LARGE); PutStopped once `stop` is set, within one block of an upload.
    """

    def __init__(self, access: S3Access) -> None:
        self._access = access
        self._bucket = access.bucket
        self._http = BlockwisePool(
            timeout=urllib3.Timeout(connect=min(5.0, access.timeout_seconds), read=access.timeout_seconds),
            maxsize=2 * access.parallel_count + LIGHT_COUNT,  # of objects and of parts, and of what is light
            retries=False,
            cert_reqs="CERT_REQUIRED",
            ca_certs=str(access.ca_file) if access.ca_file else None,
        )
        self._minio = _HashedOnce(
            access.endpoint,
            access_key=access.access_key,
            secret_key=access.secret_key,
            secure=access.secure,
            region=access.region,
            http_client=self._http,
        )
        self._parts = PartSender(self._minio, self._bucket, parallel_count=access.parallel_count)
        self._unpacks: bool | None = None
        self._keeps: bool | None = None

    @property
    def keeps_what_is_there(self) -> bool:
        """Whether this store was seen to refuse an object `only_new` whose key it has: see `try_to_overwrite`."""
        return bool(self._keeps)

    def close(self) -> None:
        self._parts.close()
        self._http.clear()

    def check(self) -> None:
        """Look for one object: less than `put` needs, but with an answer that has a body to tell why it is no."""
        prefix = self._access.prefix.strip("/")
        with self._translated("list"):
            listing = self._minio._list_objects(  # noqa: SLF001
                self._bucket, prefix=f"{prefix}/" if prefix else "", max_keys=1
            )
            next(listing, None)

    def make_bucket(self) -> None:
        """Create the bucket. One that exists is success."""
        with self._translated("create the bucket"):
            try:
                self._minio.make_bucket(self._bucket)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise
            else:
                log.info("results.bucket_created", bucket=self._bucket)

    def objects_below(self, prefix: str) -> dict[str, StoredObject]:
        """All objects whose key starts with `prefix`, by key."""
        with self._translated("list"):
            found = self._minio.list_objects(self._bucket, prefix=prefix, recursive=True)
            return {item.object_name: StoredObject(item.size, item.etag or "") for item in found}

    def has(self, key: str) -> bool:
        """Whether there is an object of this key, whatever it holds."""
        return self._look_at(key) is not None

    def holds(self, key: str, size_bytes: int, sha256: str) -> bool:
        """True when an object of this key says that it has this size and sha256."""
        found = self._look_at(key)
        return found is not None and found.size == size_bytes and (found.metadata or {}).get(_SHA256_HEADER) == sha256

    def _look_at(self, key: str) -> Object | None:
        with self._translated(f"look at {key}"):
            try:
                return self._minio.stat_object(self._bucket, key)
            except S3Error as error:
                if error.code == "NoSuchKey":
                    return None
                if error.code == "AccessDenied":
                    self.check()  # the answer to a HEAD has no body, so that each refusal looks like this one
                raise

    def upload(
        self, key: str, file: ResultFile, stop: threading.Event, *, only_new: bool = False
    ) -> tuple[StoredObject, Standing]:
        """Send one file, in parts if it is large. Gives what a listing has to show of it from now on.

        `only_new` raises AlreadyThere instead of replacing an object; large files don't know it.
        """
        size_bytes = file.entry.size_bytes
        part_bytes = max(self._access.part_bytes, -(-size_bytes // _MAX_PART_COUNT))
        if size_bytes > part_bytes:
            self.abort_leftovers(key)
        with VerifiedReader(file, stop=stop) as reader:
            headers = _headers(file.entry.sha256) | (_ONLY_NEW if only_new else {})
            etag, standing = self._send(key, reader, size_bytes, headers, part_bytes=part_bytes, stop=stop)
        return StoredObject(size_bytes, etag), standing

    def upload_together(
        self, base: str, files: Sequence[ResultFile], stop: threading.Event
    ) -> list[StoredObject] | None:
        """Send files of up to `s3_archive.MAX_FILE_BYTES` in one request. None if this store takes no such thing.

        What a listing has to show of each of them, and nothing less, says that it arrived: MinIO checks the digest of the
        request only after it has stored what was in it.
        """
        if not self._http.is_minio or self._unpacks is False:
            return None
        archive, etags = s3_archive.pack(files, [_headers(file.entry.sha256) for file in files], stop)
        key = f"{base}.tar"  # no attempt is called so; it is there only if nobody unpacked it
        try:
            with stopped_by(stop), self._translated(f"upload {len(files)} files below {base}"):
                self._minio._put_object(self._bucket, key, archive, s3_archive.headers(base))  # noqa: SLF001
        except NodeFaultError as error:
            log.info("results.not_unpacked", bucket=self._bucket, error=str(error))
            self._unpacks = False
            return None
        if self._unpacks is None:
            first = files[0].entry
            self._unpacks = self.holds(f"{base}/{first.path}", first.size_bytes, first.sha256)
            if not self._unpacks:
                log.info("results.not_unpacked", bucket=self._bucket, error="the archive was not unpacked as asked")
                self._remove(key)
                return None
        return [StoredObject(file.entry.size_bytes, etag) for file, etag in zip(files, etags, strict=True)]

    def upload_json(self, key: str, data: bytes, stop: threading.Event, *, only_new: bool = False) -> None:
        """Send it, and look whether it arrived unless that is proven. `only_new` as in `upload`."""
        sha256 = hashlib.sha256(data).hexdigest()
        headers = _headers(sha256, _JSON) | (_ONLY_NEW if only_new else {})
        _, standing = self._send(key, io.BytesIO(data), len(data), headers, stop=stop)
        if standing is not Standing.PROVEN and not self.holds(key, len(data), sha256):
            raise self.lost(key)

    def try_to_overwrite(self, key: str, data: bytes, stop: threading.Event) -> None:
        """Once: send what is there again, `only_new`, to see whether the store keeps that condition. Does no harm."""
        if self._keeps is None:
            try:
                self.upload_json(key, data, stop, only_new=True)
            except AlreadyThere:
                self._keeps = True
            except NodeFaultError as error:
                self._keeps = False
                log.info("results.condition_refused", bucket=self._bucket, error=str(error))
            except TransientError as error:  # it is tried again with the next results: these are stored
                log.debug("results.condition_not_tried", bucket=self._bucket, error=str(error))
            else:
                self._keeps = False

    def url(self, key: str) -> str:
        return f"s3://{self._bucket}/{key}"

    def lost(self, key: str) -> TransientError:
        return TransientError(f"{self.url(key)} was sent but is not there as it was sent", reason="STORE_UNREACHABLE")

    def abort_leftovers(self, key: str) -> int:
        """Drop what interrupted uploads of this key left: it costs space and no listing shows it. How many there were.

        The client has no public method for it. MinIO lists uploads for a prefix that is a whole key only.
        """
        with self._translated(f"list interrupted uploads of {key}"):
            listing = self._minio._list_multipart_uploads(self._bucket, prefix=key)  # noqa: SLF001
            count = 0
            for upload in listing.uploads:
                if upload.object_name == key and upload.upload_id:
                    log.info("results.interrupted_upload_dropped", bucket=self._bucket, key=key)
                    with contextlib.suppress(S3Error):
                        self._minio._abort_multipart_upload(self._bucket, key, upload.upload_id)  # noqa: SLF001
                        count += 1
            return count

    def _remove(self, key: str) -> None:
        """As far as a policy lets us, which needs no deleting otherwise."""
        try:
            with self._translated(f"remove {key}"):
                self._minio.remove_object(self._bucket, key)
        except NodeFaultError as error:
            log.warning("results.archive_left", bucket=self._bucket, key=key, error=str(error))

    def _send(
        self,
        key: str,
        data: io.BytesIO | VerifiedReader,
        size_bytes: int,
        headers: dict[str, str],
        *,
        stop: threading.Event,
        part_bytes: int | None = None,
    ) -> tuple[str, Standing]:
        """The ETag. The body's integrity is guarded by its sha256 in the signature (plain HTTP) or by Content-MD5 (TLS)."""
        stream = cast(BinaryIO, data)
        with stopped_by(stop), self._translated(f"upload {key}", only_new="If-None-Match" in headers):
            if part_bytes is not None and size_bytes > part_bytes:
                return self._parts.send(key, stream, size_bytes, headers, part_bytes=part_bytes), Standing.TAKEN
            body = stream.read(size_bytes)
            signed = {**headers, _CONTENT_SHA256: headers[_SHA256_HEADER]}
            etag = str(self._minio._put_object(self._bucket, key, body, dict(signed)).etag)  # noqa: SLF001
        is_small = size_bytes <= s3_archive.MAX_FILE_BYTES
        is_proven = is_small and etag == hashlib.md5(body, usedforsecurity=False).hexdigest()
        return etag, Standing.PROVEN if is_proven else Standing.TAKEN

    @contextlib.contextmanager
    def _translated(self, action: str, *, only_new: bool = False) -> Iterator[None]:
        where = f"{self._access.endpoint}/{self._bucket}"
        try:
            yield
        except S3Error as error:
            if error.code == "NoSuchBucket":
                raise BucketMissing from error
            if error.code == "PreconditionFailed" and only_new:  # else it refuses what was asked under no condition
                raise AlreadyThere from error
            raise _sorted_out(
                error.code or "", error.response.status, f"{where}: cannot {action}: {error.code}"
            ) from error
        except ServerError as error:
            raise _sorted_out("", error.status_code, f"{where}: cannot {action}: HTTP {error.status_code}") from error
        except InvalidResponseError as error:
            status = int(getattr(error, "_code", 500))
            raise _sorted_out("", status, f"{where}: cannot {action}: HTTP {status}, not from S3") from error
        except urllib3.exceptions.SSLError as error:
            why, hint = f"no TLS with it: {error}", "use a server with TLS 1.2 or newer, or none"
            if error.args and isinstance(error.args[0], ssl.SSLCertVerificationError):
                why, hint = "the certificate is not trusted", "set the certificate authority"
            raise NodeFaultError(f"{where}: {why}", reason="STORE_REFUSED", hint=hint) from error
        except (
            urllib3.exceptions.HTTPError,
            ParseError,
            AttributeError,
            OSError,
        ) as error:  # minio's, of an empty answer
            why, hint = _what_broke(error)
            raise TransientError(f"{where}: cannot {action}: {why}", reason="STORE_UNREACHABLE", hint=hint) from error
        except (MinioException, ValueError) as error:
            raise NodeFaultError(f"{where}: cannot {action}: {error}", reason="STORE_REFUSED") from error


def _headers(sha256: str, content_type: str = _ANY_BYTES) -> dict[str, str]:
    return {"Content-Type": content_type, _SHA256_HEADER: sha256}


def _sorted_out(code: str, status: int, message: str) -> TransientError | NodeFaultError | RequestError:
    """Whose move is next. An unknown answer of the 4xx kind is a refusal: repeating the same will not help."""
    if code == "EntityTooLarge":
        return RequestError(message, reason="RESULT_TOO_LARGE", hint="write smaller files")
    if code in _FULL_CODES or status == 507:
        return TransientError(message, reason="STORE_FULL", hint="make room in the store")
    if code == "NotImplemented" or status == 501:
        return NodeFaultError(message, reason="STORE_REFUSED")
    if code in _TRANSIENT_CODES or status >= 500 or status in (408, 429):
        return TransientError(message, reason="STORE_UNREACHABLE")
    reason = "STORE_CREDENTIALS" if code in _CREDENTIALS_CODES else "STORE_REFUSED"
    return NodeFaultError(message, reason=reason, hint=_HINTS.get(code))


def _what_broke(error: Exception) -> tuple[str, str]:
    """In words, and where to look. The library's own texts tell objects of Python's."""
    match error:
        case urllib3.exceptions.NameResolutionError():
            return "no host has this name", "see whether `minio` names the server, and whether this host's DNS knows it"
        case urllib3.exceptions.NewConnectionError():  # which is a TimeoutError of urllib3's
            cause = error.__cause__
            why = os.strerror(cause.errno).lower() if isinstance(cause, OSError) and cause.errno else "no connection"
            return why, "see whether the server runs there, and whether `minio` names it"
        case urllib3.exceptions.TimeoutError() | TimeoutError():
            return "no answer in time", "see whether the server is up, and what lies on the way to it"
        case ParseError() | AttributeError():
            return "its answer is no XML", "see whether what listens there is S3"
    return "the connection broke", "see whether the server is up, and what lies on the way to it"


class _HashedOnce(Minio):
    """Signs a body over plain HTTP with the sha256 that the headers say, instead of hashing it for the second time."""

    def _build_headers(
        self, host: str, headers: Any = None, body: bytes | None = None, creds: Any = None
    ) -> tuple[Any, datetime]:
        known = (headers or {}).get(_CONTENT_SHA256)
        if known is None or not body or creds is None or self._base_url.is_https:
            return super()._build_headers(host, headers, body, creds)
        built, at = super()._build_headers(host, headers, None, creds)
        return built | {"Content-Length": str(len(body)), _CONTENT_SHA256: known}, at
