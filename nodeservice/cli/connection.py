"""The way from a client command to the master: shared options, a channel, and what its errors mean to a person."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodeservice.errors import ConfigError
from nodeservice.telemetry.plain import plain

if TYPE_CHECKING:
    import grpc

    from nodeservice.cli.exit_codes import ExitCode

_DEFAULT_MASTER = "127.0.0.1:50051"
CALL_SECONDS = 40.0
"""Above 30 s, since a master may pass a call on to a node."""

_MAX_ANSWER_BYTES = 64 * 1024**2
_ADDRESS = re.compile(r"((?!https?:)\S+:///?)?[^\s:/]+:\d{1,5}|\[[0-9a-fA-F:.]+\]:\d{1,5}|unix:\S+")
_REASON_KEY = "nodeservice-reason"
"""Trailing metadata of errors that the other side tells; who does not answer has none."""
_HUNG_UP = ("Socket closed", "Connection reset", "Broken pipe", "closed unexpectedly")

Master = Annotated[str, typer.Option("--master", envvar="NODESERVICE_MASTER", help="HOST:PORT of the master.")]
TlsCert = Annotated[Path | None, typer.Option(envvar="NODESERVICE_TLS_CERT", help="PEM certificate to show.")]
TlsKey = Annotated[Path | None, typer.Option(envvar="NODESERVICE_TLS_KEY", help="PEM key of that certificate.")]
TlsCa = Annotated[
    Path | None,
    typer.Option(envvar="NODESERVICE_TLS_CA", help="PEM certificates that the other side must be signed by."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", envvar="NODESERVICE_INSECURE", help="Plain text, no authentication.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else; words on stderr.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Where the master, or a node, is and how to trust it."""

    address: str
    """HOST:PORT."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    insecure: bool = False
    peer: str = "master"
    """What is called there, for messages; also the name of the option with its address."""
    as_json: bool = False
    """A failure is told on stdout too, as one object."""

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """A stub (`MasterWorkerStub`, which has no types) for the body of the block.

        A call that fails inside ends the command with one line on stderr: code 69 where the master doesn't answer, or says
        that it can't for now, 66 for a task that it doesn't know, 75 where it refuses. Raises ConfigError for options that
        are wrong or contradict each other.
        """
        # gRPC prints failed handshakes itself; what they mean is said below.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        import grpc

        from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

        if not _ADDRESS.fullmatch(self.address):
            raise ConfigError(f"--{self.peer} is {self.address!r}", field=self.peer, hint="give HOST:PORT")
        channel = self._channel()
        try:
            yield pb_grpc.MasterWorkerStub(channel)
        except grpc.RpcError as error:
            raise self._ended(error) from error
        finally:
            channel.close()

    def _channel(self) -> grpc.Channel:
        import grpc

        options = [("grpc.max_receive_message_length", _MAX_ANSWER_BYTES)]
        if self.insecure:
            if self.tls_cert or self.tls_key or self.tls_ca:
                raise ConfigError(
                    "--insecure and --tls-… exclude each other", field="insecure", hint="drop one of them"
                )
            return grpc.insecure_channel(self.address, options=options)
        from nodeservice.rpc.tls import channel_credentials

        return grpc.secure_channel(
            self.address, channel_credentials(self.tls_ca, self.tls_cert, self.tls_key), options=options
        )

    def _ended(self, error: grpc.RpcError) -> typer.Exit:
        import grpc

        from nodeservice.cli.exit_codes import ExitCode

        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        details = (error.details() or "") if isinstance(error, grpc.Call) else str(error)
        metadata: dict[str, Any] = dict(error.trailing_metadata() or ()) if isinstance(error, grpc.Call) else {}
        reason = str(metadata.get(_REASON_KEY, ""))
        if code is grpc.StatusCode.UNAVAILABLE and reason:
            return self.failure(ExitCode.UNAVAILABLE, reason, details[:2000])
        if code is grpc.StatusCode.UNAVAILABLE or code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return self.failure(
                ExitCode.UNAVAILABLE,
                f"{self.peer.upper()}_UNREACHABLE",
                f"{self._cause(details)} ({code.name}: {details[:300]})",
            )
        if code is grpc.StatusCode.NOT_FOUND:
            return self.failure(ExitCode.NOT_FOUND, code.name, details[:2000] or f"the {self.peer} knows no such task")
        return self.failure(ExitCode.REJECTED, code.name, f"the {self.peer} refused: {details[:2000]} ({code.name})")

    def failure(self, code: ExitCode, reason: str, message: str) -> typer.Exit:
        """Said; to be raised."""
        say(message)
        if self.as_json:
            sys.stdout.write(json.dumps({"outcome": None, "reason": reason, "message": message}) + "\n")
        return typer.Exit(code)

    def _cause(self, details: str) -> str:
        """What a call that got no answer means, with the remedy.

        Who refuses a certificate only hangs up (in TLS 1.3 after the client's handshake has ended), so what is said then
        depends on what was shown.
        """
        at = f"the {self.peer} at {self.address}"
        if "failed to connect" in details and any(sign in details for sign in _HUNG_UP):
            if self.insecure:
                return (
                    f"{at} hung up at once: it may want TLS (give --tls-ca, --tls-cert and --tls-key, not --insecure)"
                )
            if self.tls_cert is None:
                return f"{at} hung up: it may want a client certificate (give --tls-cert and --tls-key)"
            if own := self._expired():
                return f"{at} hung up: {own}"
            return f"{at} hung up: it may not trust the certificate {self.tls_cert} (have its authority sign one)"
        if "certificate has expired" in details:
            return f"{at} shows a certificate that has expired, or its authority's has (renew it there, then restart)"
        if "CERTIFICATE_VERIFY_FAILED" in details:
            trusted = f"--tls-ca {self.tls_ca}" if self.tls_ca else "the public roots (give --tls-ca)"
            return f"{at} shows a certificate that is not signed by {trusted}"
        if "WRONG_VERSION_NUMBER" in details:
            return f"{at} does not speak TLS (--insecure is for one without TLS)"
        if "peer name" in details.lower() or "hostname verification" in details.lower():
            return f"{at} shows a certificate for another name (dial a name that stands in it)"
        return f"{at} does not answer"

    def _expired(self) -> str | None:
        from datetime import UTC, datetime

        from nodeservice.certificates import read_terms

        own = [term for term in read_terms(self.tls_cert, None) if term.has_expired(datetime.now(UTC))]
        return f"the certificate {self.tls_cert} has expired, on {own[0].ends_on} (renew it)" if own else None


def with_connection(
    command: Callable[..., None], *, peer: str = "master", address: Any = Master, default: str = _DEFAULT_MASTER
) -> Callable[..., None]:
    """The command with the options that its first parameter, a Connection, is made of in the place of that one."""
    options = {
        "as_json": (AsJson, False),
        peer: (address, default),
        "tls_cert": (TlsCert, None),
        "tls_key": (TlsKey, None),
        "tls_ca": (TlsCa, None),
        "insecure": (Insecure, False),
    }

    @functools.wraps(command)
    def connected(**given: Any) -> None:
        shared = {name: given.pop(name) for name in options}
        command(Connection(address=shared.pop(peer), peer=peer, **shared), **given)

    signature = inspect.signature(command, eval_str=True)
    _, *own = signature.parameters.values()
    own += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=usual)
        for name, (kind, usual) in options.items()
    ]
    connected.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return connected


def say(text: str) -> None:
    """One line for a person, on stderr."""
    sys.stderr.write(f"nodeservice: {plain(text)}\n")
    sys.stderr.flush()
