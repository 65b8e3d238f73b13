"""The way from a client command to the master: shared options, a channel, and what its errors mean to a person."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodeservice.errors import ConfigError

if TYPE_CHECKING:
    import grpc

DEFAULT_MASTER = "127.0.0.1:50051"
CALL_SECONDS = 40.0
"""Above 30 s, since a master may pass a call on to a node."""

_MAX_ANSWER_BYTES = 64 * 1024**2

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
    """Where the master is and how to trust it."""

    master: str
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    insecure: bool = False

    @contextlib.contextmanager
    def open(self) -> Iterator[Any]:
        """A stub (`MasterWorkerStub`, which has no types) for the body of the block.

        A call that fails inside ends the command with one line on stderr: code 69 where the master doesn't answer, 75
        where it refuses. Raises ConfigError for options that contradict each other.
        """
        import grpc

        from nodeservice.wire import master_worker_pb2_grpc as pb_grpc

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
            return grpc.insecure_channel(self.master, options=options)
        from nodeservice.rpc.tls import channel_credentials

        return grpc.secure_channel(
            self.master, channel_credentials(self.tls_ca, self.tls_cert, self.tls_key), options=options
        )

    def _ended(self, error: grpc.RpcError) -> typer.Exit:
        import grpc

        from nodeservice.cli.exit_codes import ExitCode

        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        details = (error.details() or "") if isinstance(error, grpc.Call) else str(error)
        if code is grpc.StatusCode.UNAVAILABLE or code is grpc.StatusCode.DEADLINE_EXCEEDED:
            remedy = "" if self.insecure else "; a master without TLS needs --insecure"
            say(f"the master at {self.master} does not answer ({code.name}: {details[:300]}){remedy}")
            return typer.Exit(ExitCode.UNAVAILABLE)
        say(f"the master refused: {details[:2000]} ({code.name})")
        return typer.Exit(ExitCode.REJECTED)


def say(text: str) -> None:
    """One line for a person, on stderr."""
    sys.stderr.write(f"nodeservice: {text}\n")
    sys.stderr.flush()
