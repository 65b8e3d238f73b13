"""The tables of the SQLite journal and the steps that lead to them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from nodeservice.errors import ConfigError

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # seq keeps the order of acceptance: an update keeps it.
        """
        CREATE TABLE attempts (
            seq INTEGER PRIMARY KEY,
            task_id TEXT NOT NULL,
            attempt INTEGER NOT NULL,
            phase INTEGER NOT NULL,
            updated_at TEXT NOT NULL,
            record TEXT NOT NULL,
            UNIQUE (task_id, attempt)
        )
        """,
        "CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    ),
    (
        # A checksum of the row, since SQLite has none for what it holds; NULL for what was written before.
        "ALTER TABLE attempts ADD COLUMN checksum INTEGER",
        "ALTER TABLE notes ADD COLUMN checksum INTEGER",
    ),
)
"""Entry n leads from schema version n to n+1. Entries are appended, never changed."""


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the file to the newest schema, each step all or nothing. Raises ConfigError for a schema from the future."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        row = connection.execute("SELECT MAX(version) FROM schema_version").fetchone()
        version = row[0] or 0
        if version > len(MIGRATIONS):
            raise ConfigError(
                f"journal {path} has schema version {version}, this nodeservice knows versions up to {len(MIGRATIONS)}",
                field="state_dir",
                hint="the state directory was written by a newer nodeservice: install that version again",
            )
        for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
            for statement in statements:
                connection.execute(statement)
            connection.execute("INSERT INTO schema_version (version) VALUES (?)", (number,))
