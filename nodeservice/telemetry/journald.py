"""Writes events to systemd's journal with each of their fields as a field of its own, where stderr is the journal.

Sources: systemd.exec(5) ($JOURNAL_STREAM names device and inode of a stderr that is the journal); "Native Journal Protocol"
(a datagram of `NAME=value` lines; a value with a newline has its length before it); systemd.journal-fields(7);
sd-daemon(3) (`<N>` before a line tells its priority).
"""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from collections.abc import Mapping
from typing import Any, TextIO

import structlog

from nodeservice.telemetry.plain import plain

SOCKET = "/run/systemd/journal/socket"
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_NOTICE = 5
_OF_JOURNALD = re.compile(
    r"(MESSAGE|MESSAGE_ID|PRIORITY|ERRNO|INVOCATION_ID|USER_INVOCATION_ID|UNIT|USER_UNIT|TID|DOCUMENTATION"
    r"|(CODE|SYSLOG|OBJECT|COREDUMP)_.*)\Z"
)
"""Names with a meaning of their own; a field of ours that is called so gets a prefix."""


def is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether what is written to it ends in the journal, rather than in a file or terminal it was redirected to."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def render(_logger: Any, _method: str, event: structlog.typing.EventDict) -> tuple[tuple[bytes, str], dict[str, Any]]:
    """The last processor: the datagram, and the line that is written where the journal does not take it."""
    fields = dict(event)
    priority = _PRIORITIES.get(str(fields.pop("level", "")), _NOTICE)
    traceback = fields.pop("exception", None)
    name = str(fields.pop("event", ""))
    words = " ".join([name, *(f"{key}={_shown(value)}" for key, value in fields.items())])
    message = plain(words if traceback is None else f"{words}\n{traceback}")
    entry = {"MESSAGE": message, "PRIORITY": str(priority)}
    entry |= {"SYSLOG_IDENTIFIER": "nodeservice", "EVENT": name}
    entry |= {_name(key): value if isinstance(value, str) else _as_json(value) for key, value in fields.items()}
    line = f"<{priority}>{message}".replace("\n", f"\n<{priority}>")
    return (b"".join(_assignment(key, value) for key, value in entry.items()), line), {}


class JournalLogger:
    """What structlog calls. Never raises: an entry that the journal does not take goes to `fallback`, as a line."""

    def __init__(self, fallback: Any, path: str = SOCKET) -> None:
        self._fallback = fallback
        self._path = path
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def msg(self, datagram: bytes, line: str) -> None:
        try:
            self._sender.sendto(datagram, socket.MSG_DONTWAIT, self._path)
        except OSError:  # too large for a datagram, or journald is away or busy for the moment
            self._fallback.write(f"{line}\n")

    log = debug = info = warn = warning = error = exception = critical = fatal = msg


def _shown(value: object) -> str:
    if isinstance(value, str) and re.fullmatch(r"[^\s\"=]+", value):
        return value
    return _as_json(value)


def _as_json(value: object) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _name(key: str) -> str:
    name = key.upper()
    return f"NODESERVICE_{name}" if _OF_JOURNALD.match(name) else name


def _assignment(name: str, value: str) -> bytes:
    content = value.encode(errors="replace")
    if b"\n" not in content:
        return b"%s=%s\n" % (name.encode(), content)
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(content)), content)
