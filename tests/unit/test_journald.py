"""Events as entries of systemd's journal, over a real Unix datagram socket in journald's place."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nodeservice.telemetry.journald import JournalLogger, is_journal, render


class Journal:
    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.setblocking(False)

    def entry(self) -> dict[str, str]:
        """Parsed as journald does, by the protocol's description."""
        rest, fields = self.socket.recv(1 << 20), {}
        while rest:
            line, _, rest = rest.partition(b"\n")
            name, mark, value = line.partition(b"=")
            if not mark:
                (length,) = struct.unpack_from("<Q", rest)
                value, rest = rest[8 : 8 + length], rest[8 + length :]
                assert rest[:1] == b"\n"
                rest = rest[1:]
            fields[name.decode()] = value.decode()
        return fields


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    found = Journal(tmp_path / "socket")
    yield found
    found.socket.close()


def written(journal: Journal, **event: Any) -> dict[str, str]:
    fallback = io.StringIO()
    (datagram, line), _ = render(None, "info", event)
    JournalLogger(fallback, journal.path).msg(datagram, line)
    assert fallback.getvalue() == ""
    return journal.entry()


def test_a_text_from_elsewhere_does_not_hide_its_entry(journal: Journal) -> None:
    """journalctl prints an entry whose MESSAGE has control characters as `[42B blob data]`."""
    entry = written(journal, event="task.refused", level="info", task_id="a\x1b[2J", why="\x9b hidden")
    assert entry["MESSAGE"] == 'task.refused task_id=a\\x1b[2J why="\\x9b hidden"'
    assert entry["TASK_ID"] == "a\x1b[2J"


def test_each_field_of_an_event_is_a_field_of_the_entry(journal: Journal) -> None:
    entry = written(
        journal,
        event="task.finished",
        level="info",
        task_id="t-1",
        attempt=2,
        usage={"cpu": 1.5},
        why=None,
        at=Path("/x"),
    )
    assert entry == {
        "MESSAGE": 'task.finished task_id=t-1 attempt=2 usage={"cpu": 1.5} why=null at="/x"',
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "nodeservice",
        "EVENT": "task.finished",
        "TASK_ID": "t-1",
        "ATTEMPT": "2",
        "USAGE": '{"cpu": 1.5}',
        "WHY": "null",
        "AT": '"/x"',
    }


@pytest.mark.parametrize(
    ("level", "priority"),
    [("debug", "7"), ("info", "6"), ("warning", "4"), ("error", "3"), ("critical", "2"), ("other", "5")],
)
def test_levels_become_the_priorities_of_syslog(journal: Journal, level: str, priority: str) -> None:
    assert written(journal, event="e", level=level)["PRIORITY"] == priority


def test_a_field_can_forge_neither_another_field_nor_one_of_journald(journal: Journal) -> None:
    names = {"message": "mine", "priority": "0", "code_file": "f", "syslog_pid": "7", "invocation_id": "i"}
    entry = written(journal, event="e", level="info", image="ä\nPRIORITY=0\n", text='a"\ud800', **names)
    assert entry["IMAGE"] == "ä\nPRIORITY=0\n"
    assert entry["TEXT"] == 'a"?'
    assert entry["PRIORITY"] == "6"
    assert {name: entry[f"NODESERVICE_{name.upper()}"] for name in names} == names
    assert entry["MESSAGE"].startswith('e image="ä\\nPRIORITY=0\\n" text="a\\"\\ud800" message=mine')


def test_a_traceback_follows_the_message(journal: Journal) -> None:
    entry = written(journal, event="step.failed", level="error", exception="Traceback\n\tValueError: \ud800\rbroken")
    assert entry["MESSAGE"] == "step.failed\nTraceback\n\tValueError: \\ud800\\rbroken"
    assert "EXCEPTION" not in entry


@pytest.mark.parametrize("path", ["nobody", "socket"])
def test_what_the_journal_does_not_take_goes_to_stderr_with_its_priority(journal: Journal, path: str) -> None:
    """Nobody there, or an entry that is larger than a datagram can be."""
    fallback = io.StringIO()
    logger = JournalLogger(fallback, str(Path(journal.path).parent / path))
    size = 10 if path == "nobody" else logger._sender.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    (datagram, line), _ = render(
        None, "", {"event": "e", "level": "error", "text": "x" * size, "exception": "one\ntwo"}
    )
    logger.msg(datagram, line)
    first, *rest = fallback.getvalue().splitlines()
    assert first == f"<3>e text={'x' * size}"
    assert rest == ["<3>one", "<3>two"]


def test_a_journal_that_takes_no_more_holds_nobody_up(journal: Journal) -> None:
    fallback = io.StringIO()
    logger = JournalLogger(fallback, journal.path)
    (datagram, line), _ = render(None, "", {"event": "e", "level": "info"})
    while not fallback.getvalue():
        logger.msg(datagram, line)
    assert fallback.getvalue() == "<6>e\n"


def test_only_the_stream_that_is_the_journal_is_taken_for_it(tmp_path: Path) -> None:
    with (tmp_path / "stream").open("w") as stream, (tmp_path / "other").open("w") as other:
        found = os.fstat(stream.fileno())
        environment = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        assert is_journal(stream, environment)
        assert not is_journal(other, environment)
        assert not is_journal(stream, {})
        assert not is_journal(io.StringIO(), environment)
    assert not is_journal(stream, environment), "it was closed"


@pytest.mark.parametrize(("chosen", "in_journal"), [("auto", True), ("json", False)])
def test_logs_go_to_the_journal_where_stderr_is_the_journal_unless_another_form_is_asked_for(
    journal: Journal, tmp_path: Path, chosen: str, in_journal: bool
) -> None:
    code = (
        "import os, sys, structlog; from nodeservice.telemetry import journald, logs;"
        f"journald.JournalLogger.__init__.__defaults__ = ({journal.path!r},);"
        "found = os.fstat(2); os.environ['JOURNAL_STREAM'] = f'{found.st_dev}:{found.st_ino}';"
        f"logs.configure_logging('info', {chosen!r});"
        "import logging; logging.getLogger('urllib3').warning('again')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    if in_journal:
        entry = journal.entry()
        assert (entry["EVENT"], entry["NODESERVICE_MESSAGE"], entry["LOGGER"]) == (
            "library.warning",
            "again",
            "urllib3",
        )
        assert (entry["PRIORITY"], ran.stderr) == ("4", "")
        assert "TIMESTAMP" not in entry
    else:
        assert json.loads(ran.stderr)["event"] == "library.warning"
