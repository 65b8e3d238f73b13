"""The tables of the master's database, and the translation of rows to and from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    RowMapping,
    Table,
    Text,
    inspect,
)
from sqlalchemy import (
    text as sql,
)
from sqlalchemy.schema import CreateColumn

from nodeservice.master.rows import NodeRow, OrphanRow, State, TaskRow
from nodeservice.wire import master_worker_pb2 as pb

VERSION = 2
"""Rises with every change of a table; a database with a higher one is refused."""

metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, nullable=False))

tasks = Table(
    "tasks",
    metadata,
    Column("task_id", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("sequence", BigInteger, nullable=False, unique=True),
    Column("task", LargeBinary, nullable=False),
    Column("traceparent", Text, nullable=False),
    Column("state", Text, nullable=False, index=True),
    Column("worker_id", Text, nullable=False),
    Column("accepted", Boolean, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("phase", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("result", LargeBinary, nullable=True),
    Column("late_result", LargeBinary, nullable=True),
    Column("node_retries", Integer, nullable=False, server_default="0"),
    Column("user_retries", Integer, nullable=False, server_default="0"),
    Column("avoid", Text, nullable=False, server_default=""),
    Column("submitted_at_ms", BigInteger, nullable=False),
    Column("queued_at_ms", BigInteger, nullable=False, server_default="0"),
    Column("assigned_at_ms", BigInteger, nullable=False),
    Column("finished_at_ms", BigInteger, nullable=False),
)

tasks_ended = Index("tasks_ended", tasks.c.finished_at_ms, tasks.c.sequence)
"""A database of an older program gets it when it is first asked for."""

nodes = Table(
    "nodes",
    metadata,
    Column("worker_id", Text, primary_key=True),
    Column("address", Text, nullable=False),
    Column("info", LargeBinary, nullable=False),
    Column("registered_at_ms", BigInteger, nullable=False),
    Column("heard_at_ms", BigInteger, nullable=False),
)

orphans = Table(
    "orphan_results",
    metadata,
    Column("task_id", Text, primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("worker_id", Text, primary_key=True),
    Column("result", LargeBinary, nullable=False),
    Column("received_at_ms", BigInteger, nullable=False),
    Index("orphan_results_received", "received_at_ms"),
)


def bring_up(connection: Connection) -> None:
    """Add what a database of an older program lacks; safe to repeat after a crash in the middle."""
    present = {column["name"] for column in inspect(connection).get_columns(tasks.name)}
    for column in tasks.columns:
        if column.name not in present:
            described = CreateColumn(column).compile(dialect=connection.dialect)
            connection.execute(sql(f"ALTER TABLE {tasks.name} ADD COLUMN {described}"))
    connection.execute(tasks.update().where(tasks.c.queued_at_ms == 0).values(queued_at_ms=tasks.c.submitted_at_ms))


def text(value: str) -> str:
    """PostgreSQL has no NUL in text; messages from nodes may."""
    return value.replace("\0", "�")


def task_values(row: TaskRow) -> Mapping[str, Any]:
    return {
        "task_id": row.task_id,
        "attempt": row.attempt,
        "sequence": row.sequence,
        "task": row.task.SerializeToString(),
        "traceparent": row.traceparent,
        "state": row.state.value,
        "worker_id": row.worker_id,
        "accepted": row.accepted,
        "cancel_requested": row.cancel_requested,
        "phase": text(row.phase),
        "reason": text(row.reason),
        "message": text(row.message),
        "result": None if row.result is None else row.result.SerializeToString(),
        "late_result": None if row.late_result is None else row.late_result.SerializeToString(),
        "node_retries": row.node_retries,
        "user_retries": row.user_retries,
        "avoid": " ".join(row.avoid),
        "submitted_at_ms": row.submitted_at_ms,
        "queued_at_ms": row.queued_at_ms,
        "assigned_at_ms": row.assigned_at_ms,
        "finished_at_ms": row.finished_at_ms,
    }


def task_row(found: RowMapping) -> TaskRow:
    values = dict(found)
    values["task"] = pb.Task.FromString(values["task"])
    values["state"] = State(values["state"])
    for name in ("result", "late_result"):
        values[name] = None if values[name] is None else pb.TaskResult.FromString(values[name])
    values["avoid"] = tuple(values["avoid"].split())
    return TaskRow(**values)


def node_values(row: NodeRow) -> Mapping[str, Any]:
    return {
        "worker_id": row.worker_id,
        "address": row.address,
        "info": row.info.SerializeToString(),
        "registered_at_ms": row.registered_at_ms,
        "heard_at_ms": row.heard_at_ms,
    }


def node_row(found: RowMapping) -> NodeRow:
    return NodeRow(**{**found, "info": pb.WorkerInfo.FromString(found["info"])})


def orphan_values(row: OrphanRow) -> Mapping[str, Any]:
    return {
        "task_id": row.task_id,
        "attempt": row.attempt,
        "worker_id": row.worker_id,
        "result": row.result.SerializeToString(),
        "received_at_ms": row.received_at_ms,
    }
