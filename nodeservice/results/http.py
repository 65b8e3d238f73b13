"""Store results by one multipart POST to a master's `/upload`.

The format, which the receiving side implements too:

Request: `POST <url>`, `Content-Type: multipart/form-data; boundary=…`, with a `Content-Length`. The parts come in exactly
this order, so that a receiver can check while it streams to disk:

====================  ================================  ==============================================================
part name             content type                      content
====================  ================================  ==============================================================
``task_id``           (none)                            the task's id
``attempt``           (none)                            decimal, from 1
``worker_id``         (none)                            the node's id
``user_id``           (none)                            may be empty
``task_name``         (none)                            may be empty; text to show, never a path
``submitted_at``      (none)                            decimal Unix seconds, 0 when unknown
``manifest``          ``application/json``              the exact bytes of `manifest.json` (see `results.manifest`)
``file`` (repeated)   ``application/octet-stream``      one part for each entry of the manifest's `files`, in its order
====================  ================================  ==============================================================

The n-th ``file`` part **is** the n-th entry of the manifest: the receiver takes path, size and sha256 from there. The
part's ``filename`` repeats the path for people and for simple receivers, with `%`, `"`, `\\` and everything outside
printable ASCII percent-encoded as UTF-8 (`urllib.parse.unquote` gives the path back); HTTP libraries cut or unescape file
names in ways of their own. There may be no ``file`` part at all. All text is UTF-8; all of it is hostile to the receiver.

Response: `200` with JSON `{"success": true, "location": "<url or path>"}` once every file and, written last,
`manifest.json` are durable. Otherwise a status from 400 and, if possible, JSON `{"success": false, "message": "…"}`:

* 400 malformed, or a part that does not match its manifest entry; 401 and 403 not allowed; 404 an attempt that the master
  does not know;
* 409 this attempt is stored already with another manifest (the same manifest again is a success without a change);
* 413 more than the master takes;
* 408, 429 and 5xx: try again later.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from nodeservice.core.model import AttemptId
from nodeservice.errors import NodeFaultError, RequestError, TransientError
from nodeservice.ports import ResultBundle
from nodeservice.results.source import VerifiedReader
from nodeservice.threads import Threads

if TYPE_CHECKING:
    import requests

LIMIT_BYTES = 50 * 1000 * 1000
"""Default for what one POST may carry: results are held up by the slowest of them, so large ones belong in a store."""

_CONNECT_SECONDS = 10.0
_ANSWER_SECONDS = 60.0
"""A master syncs everything to disk before it answers."""

_RETRY_STATUS = (408, 429)

_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) not in '%"\\')


class HttpResultStore:
    """One POST per `put`; see the module's docstring for the format.

    Repeating sends everything again; the master takes the same manifest twice. `limit_bytes` counts files and manifest:
    more is RequestError (RESULT_TOO_LARGE) before anything is sent. A file's source is opened when its turn comes, so the
    number of files is not bounded by descriptors. `ca_file` replaces the system's certificate authorities; `certificate` and
    its key are shown to a server that asks for one.
    """

    def __init__(
        self,
        url: str,
        *,
        limit_bytes: int = LIMIT_BYTES,
        ca_file: Path | None = None,
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        self._url = url
        self._limit_bytes = limit_bytes
        self._authorities: str | bool = str(ca_file) if ca_file else True
        self._certificate = (str(certificate[0]), str(certificate[1])) if certificate else None
        self._pool = Threads(2, name="results-http")

    async def put(self, bundle: ResultBundle) -> str:
        total = bundle.manifest.total_bytes + len(bundle.manifest_bytes)
        if total > self._limit_bytes:
            raise self._too_large(f"results of {bundle.spec.id} have {total} bytes, more than {self._limit_bytes}")
        stop = threading.Event()
        try:
            return await self._pool.run(lambda: self._post(bundle, stop))
        finally:
            stop.set()

    async def check(self) -> None:
        """Connect as an upload would. What the answer to a HEAD is says nothing about a POST, so any will do."""
        await self._pool.run(self._connect)

    async def drop_leftovers(self, id_: AttemptId, paths: Sequence[str]) -> int:
        """A POST that broke off is the master's to forget."""
        return 0

    async def close(self) -> None:
        self._pool.close()
        await self._pool.ended()

    def _post(self, bundle: ResultBundle, stop: threading.Event) -> str:
        import requests
        from requests_toolbelt import MultipartEncoder

        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(VerifiedReader(file, stop=stop)) for file in bundle.files]
            encoder = MultipartEncoder(fields=_parts(bundle, readers))
            with self._translated():
                response = requests.post(
                    self._url,
                    data=encoder,
                    headers={"Content-Type": encoder.content_type},
                    timeout=(_CONNECT_SECONDS, _ANSWER_SECONDS),
                    verify=self._authorities,
                    cert=self._certificate,
                    allow_redirects=False,
                )
        return self._location(response, bundle)

    def _connect(self) -> None:
        import requests

        with self._translated():
            timeout = (_CONNECT_SECONDS, _ANSWER_SECONDS)
            requests.head(
                self._url, timeout=timeout, verify=self._authorities, cert=self._certificate, allow_redirects=False
            )

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        import requests

        try:
            yield
        except requests.exceptions.SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" not in str(error):  # it hung up, perhaps since it does not know us
                raise TransientError(
                    f"{self._url} ended the TLS connection",
                    reason="STORE_UNREACHABLE",
                    hint="it may not trust this node's certificate",
                ) from error
            raise NodeFaultError(
                f"{self._url} has a certificate that this node does not trust",
                reason="STORE_REFUSED",
                hint="configure the certificate authority of the master",
            ) from error
        except requests.exceptions.InvalidURL as error:
            raise NodeFaultError(f"{self._url} is not a URL to send to", reason="STORE_REFUSED") from error
        except requests.exceptions.RequestException as error:
            raise TransientError(
                f"results cannot be sent to {self._url}: {type(error).__name__}", reason="STORE_UNREACHABLE"
            ) from error

    def _location(self, response: requests.Response, bundle: ResultBundle) -> str:
        answer = _json(response)
        message = str(answer.get("message", ""))[:500] or response.reason
        story = f"{self._url} answered {response.status_code} for results of {bundle.spec.id}: {message}"
        if response.status_code == 200 and answer.get("success") is True:
            location = answer.get("location")
            return location if isinstance(location, str) and location else f"{self._url}#{bundle.prefix}"
        if response.status_code == 413:
            raise self._too_large(story)
        if response.status_code == 409:
            raise NodeFaultError(story, reason="RESULT_CONFLICT", hint="two nodes ran this attempt")
        if 300 <= response.status_code < 500 and response.status_code not in _RETRY_STATUS:
            raise NodeFaultError(story, reason="STORE_REFUSED", hint="check the upload URL and the master's log")
        raise TransientError(story, reason="STORE_UNREACHABLE")

    @staticmethod
    def _too_large(story: str) -> RequestError:
        return RequestError(
            story, reason="RESULT_TOO_LARGE", field="results", hint="write less, or configure an object store (s3://…)"
        )


def _parts(bundle: ResultBundle, readers: list[VerifiedReader]) -> list[tuple[str, object]]:
    spec = bundle.spec
    parts: list[tuple[str, object]] = [
        ("task_id", spec.id.task_id),
        ("attempt", str(spec.id.attempt)),
        ("worker_id", bundle.worker_id),
        ("user_id", spec.user_id),
        ("task_name", spec.task_name),
        ("submitted_at", str(spec.submitted_at_unix)),
        ("manifest", (None, bundle.manifest_bytes, "application/json")),
    ]
    for file, reader in zip(bundle.files, readers, strict=True):
        parts.append(("file", (quote(file.entry.path, safe=_PLAIN), reader, "application/octet-stream")))
    return parts


def _json(response: requests.Response) -> dict[str, object]:
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
