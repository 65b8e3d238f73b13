"""Keeps the journal in an SQLite file: durable, embedded, no server."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import structlog

from nodeservice.core.model import AttemptId, TaskRecord
from nodeservice.errors import NodeFaultError, NodeServiceError, TransientError
from nodeservice.journal.codec import CORRUPT_HINT, RecordWriter, decode_record
from nodeservice.journal.schema import migrate
from nodeservice.threads import Threads

log = structlog.get_logger(__name__)

JOURNAL_NAME = "journal.sqlite"
"""In a node's state directory."""

T = TypeVar("T")
Row = tuple[str | int, ...]

_SAVE = """
INSERT INTO attempts (task_id, attempt, phase, updated_at, record, checksum) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (task_id, attempt) DO UPDATE SET phase = excluded.phase, updated_at = excluded.updated_at,
    record = excluded.record, checksum = excluded.checksum
"""
_FORGET = "DELETE FROM attempts WHERE task_id = ? AND attempt = ?"
_SET_NOTE = """
INSERT INTO notes (key, value, checksum) VALUES (?, ?, ?)
ON CONFLICT (key) DO UPDATE SET value = excluded.value, checksum = excluded.checksum
"""
# As bytes, since damaged text need not be text any more.
_LOAD = """
SELECT CAST(task_id AS BLOB), attempt, phase, CAST(record AS BLOB), checksum FROM attempts ORDER BY seq
"""
_GET_NOTE = "SELECT CAST(value AS BLOB), checksum FROM notes WHERE key = ?"

_CORRUPT_CODES = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR}
"""The last means that a statement does not fit the tables: ours are always the same, so the tables are damaged."""

_WAL_LIMIT_BYTES = 16 * 1024**2
"""The write-ahead log is cut back to this after a checkpoint, so that a burst does not hold disk for ever."""


@dataclass(slots=True, eq=False)
class _Write:
    statement: str
    rows: list[Row]
    error: BaseException | None = None


class SqliteJournal:
    """A Journal in one file, WAL mode with full sync, all I/O in one thread of its own.

    The file is opened at first use, and opened again after an I/O error, so that a disk that was full or read-only is
    taken up again without a restart. Writes that wait while the disk syncs share the next transaction, in order: a
    burst of assignments costs a few syncs, not one each. If a shared transaction fails, each of its callers is told so.
    A cancelled write may or may not have been made. The file holds the tasks' environment, so only its owner may read it.
    What was written is read back as it was, or not at all: each row has a checksum, and all is checked when it is opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = Threads(1, name="nodeservice-journal")
        self._connection: sqlite3.Connection | None = None
        self._writer = RecordWriter()
        self._writes: deque[_Write] = deque()
        self._writes_lock = threading.Lock()
        self._is_closed = False

    async def load(self) -> Sequence[TaskRecord]:
        return await self._call(self._load)

    async def save(self, records: Sequence[TaskRecord]) -> None:
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        await self._write(_SAVE, [_row(record, self._writer.encode(record), now) for record in records])

    async def forget(self, ids: Sequence[AttemptId]) -> None:
        await self._write(_FORGET, [(id_.task_id, id_.attempt) for id_ in ids])

    async def get_note(self, key: str) -> str | None:
        return await self._call(lambda connection: self._note(connection, key))

    async def set_note(self, key: str, value: str) -> None:
        await self._write(_SET_NOTE, [(key, value, _checksum(key, value.encode()))])

    async def close(self) -> None:
        """Finish what waits, then close. Closing twice is success; any other use after it raises RuntimeError."""
        if not self._is_closed:
            self._is_closed = True
            await self._thread.run(self._disconnect)
        self._thread.close()
        await self._thread.ended()

    # ---- caller's side ----

    async def _call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        self._refuse_when_closed()
        return await self._thread.run(lambda: self._guarded(work))

    async def _write(self, statement: str, rows: list[Row]) -> None:
        if not rows:
            return
        self._refuse_when_closed()
        write = _Write(statement, rows)
        with self._writes_lock:
            self._writes.append(write)
        try:
            await self._thread.run(self._flush)  # or an earlier flush, which took it along, and has ended too
        except asyncio.CancelledError:
            with self._writes_lock, suppress(ValueError):  # it is under way, or made
                self._writes.remove(write)
            raise
        if write.error is not None:
            raise write.error

    def _refuse_when_closed(self) -> None:
        if self._is_closed:
            raise RuntimeError(f"journal {self._path} is closed")

    # ---- in the thread ----

    def _flush(self) -> None:
        """Write everything that waits in one transaction. Finding nothing is normal: an earlier flush took it along."""
        with self._writes_lock:
            group = list(self._writes)
            self._writes.clear()
        if not group:
            return

        def work(connection: sqlite3.Connection) -> None:
            if len(group) == 1 and len(group[0].rows) == 1:  # one statement is a transaction of its own
                connection.execute(group[0].statement, group[0].rows[0])
                return
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                for write in group:
                    connection.executemany(write.statement, write.rows)

        try:
            self._guarded(work)
        except BaseException as error:
            for write in group:
                write.error = error

    def _guarded(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            if self._connection is None:
                self._connection = self._open()
            return work(self._connection)
        except sqlite3.Error as error:
            self._disconnect()
            raise self._translated(error) from error
        except UnicodeDecodeError as error:  # the name of a table, say, is no text any more
            self._disconnect()
            raise self._corrupt(str(error)) from error
        except OSError as error:
            self._disconnect()
            raise self._unwritable(error.strerror or str(error)) from error

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # SQLite gives its side files the mode of the main file.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=5.0)
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                # Some network file systems have no shared memory; a rollback journal with full sync is as durable.
                log.warning("journal.without_wal", path=str(self._path), journal_mode=mode)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if found != "ok":
                raise self._corrupt(found)
            migrate(connection, self._path)
        except BaseException:
            connection.close()
            raise
        return connection

    def _load(self, connection: sqlite3.Connection) -> list[TaskRecord]:
        records = []
        for raw_id, attempt, phase, raw, checksum in connection.execute(_LOAD):
            task_id = raw_id.decode(errors="replace")
            if checksum is not None and checksum != _checksum(f"{task_id}.{attempt} {phase}", raw):
                raise self._corrupt(f"the record of {task_id}.{attempt} is not what was written")
            try:
                records.append(decode_record(raw.decode(errors="replace")))
            except NodeFaultError as error:
                log.error("journal.record_corrupt", path=str(self._path), task_id=task_id, attempt=attempt)
                raise NodeFaultError(
                    f"{error.message} (task {task_id}, attempt {attempt}, in {self._path})",
                    reason=error.reason,
                    hint=error.hint,
                ) from error
        return records

    def _note(self, connection: sqlite3.Connection, key: str) -> str | None:
        row: tuple[bytes, int | None] | None = connection.execute(_GET_NOTE, (key,)).fetchone()
        if row is None:
            return None
        if row[1] is not None and row[1] != _checksum(key, row[0]):
            raise self._corrupt(f"the note {key} is not what was written")
        return row[0].decode(errors="replace")

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except sqlite3.Error as error:
                log.debug("journal.close_failed", error=str(error))

    # ---- errors ----

    def _translated(self, error: sqlite3.Error) -> NodeServiceError:
        code = getattr(error, "sqlite_errorcode", None)
        # The low byte is the primary code, the rest refines it (SQLite, "Result and Error Codes"). Without one, what was
        # read could not be decoded.
        if code is None or code & 0xFF in _CORRUPT_CODES:
            return self._corrupt(str(error))
        return self._unwritable(str(error))

    def _corrupt(self, why: str) -> NodeFaultError:
        return NodeFaultError(
            f"journal {self._path} is corrupted: {why}", reason="JOURNAL_CORRUPT", field="state_dir", hint=CORRUPT_HINT
        )

    def _unwritable(self, why: str) -> TransientError:
        return TransientError(
            f"journal {self._path} cannot be used: {why}",
            reason="JOURNAL_UNWRITABLE",
            field="state_dir",
            hint="free disk space in the state directory, or make it writable",
        )


def _row(record: TaskRecord, text: str, now: str) -> Row:
    phase = record.phase.value
    return record.id.task_id, record.id.attempt, phase, now, text, _checksum(f"{record.id} {phase}", text.encode())


def _checksum(name: str, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(name.encode()))
