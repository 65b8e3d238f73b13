"""The tables of the master's database, and the translation of rows to and from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import BigInteger, Boolean, Column, Index, Integer, LargeBinary, MetaData, RowMapping, Table, Text

from nodeservice.master.rows import NodeRow, OrphanRow, State, TaskRow
from nodeservice.wire import master_worker_pb2 as pb

VERSION = 1
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
    Column("submitted_at_ms", BigInteger, nullable=False),
    Column("assigned_at_ms", BigInteger, nullable=False),
    Column("finished_at_ms", BigInteger, nullable=False),
)

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
        "submitted_at_ms": row.submitted_at_ms,
        "assigned_at_ms": row.assigned_at_ms,
        "finished_at_ms": row.finished_at_ms,
    }


def task_row(found: RowMapping) -> TaskRow:
    values = dict(found)
    values["task"] = pb.Task.FromString(values["task"])
    values["state"] = State(values["state"])
    values["result"] = None if values["result"] is None else pb.TaskResult.FromString(values["result"])
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
