"""The master's durable memory: tasks, nodes and orphan results in SQLite or PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import QueuePool, StaticPool

from nodeservice.errors import ConfigError, TransientError
from nodeservice.master import schema
from nodeservice.master.rows import NodeRow, OrphanRow, State, TaskRow, Untold, Wanted

T = TypeVar("T")

ORPHANS_KEPT = 1_000
_FORGOTTEN_COUNT = 100
"""Attempts that are looked at in one transaction: some 1 MiB, which others wait for."""
_TCP = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 4, "tcp_user_timeout": 30_000}
"""A server that is gone without a word is noticed after half a minute; Linux would wait for a quarter of an hour or more.

Source: PostgreSQL, "Database Connection Control Functions".
"""
_ANY = Wanted()
_OPEN_STATES = tuple(state.value for state in State if not state.is_final)


def sqlite_url(state_dir: Path) -> str:
    return f"sqlite:///{state_dir.absolute() / 'master.sqlite'}"


class MasterStore:
    """All calls run one after the other in one thread. What a saving call returned from survives a power cut.

    Calls raise TransientError (STORE_UNAVAILABLE) when the database does not take or give; nothing of the call is then
    stored. `open` raises ConfigError for a URL that means nothing and for a schema that is newer than this program.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="master-store")
        self._engine: sa.Engine | None = None
        self._unsaved_nodes: list[NodeRow] = []
        self._saving_nodes: asyncio.Future[None] | None = None

    async def open(self) -> None:
        await self._run(self._open)

    async def close(self) -> None:
        """Closes the database; may be called without `open`, and again."""
        loop = asyncio.get_running_loop()
        if self._engine is not None:
            await loop.run_in_executor(self._thread, self._engine.dispose)
            self._engine = None
        self._thread.shutdown(wait=False)

    async def come_round(self) -> None:
        """Return once the thread has done all that it was given before."""
        await self._run(lambda: None)

    # ---- tasks --------------------------------------------------------------------------------------------------------

    async def save_tasks(self, rows: Sequence[TaskRow]) -> None:
        """Insert or replace, all or nothing."""
        if rows:
            await self._run(lambda: self._write(schema.tasks, ("task_id", "attempt"), map(schema.task_values, rows)))

    async def open_tasks(self) -> list[TaskRow]:
        """All that have not ended, in the order of the queue."""
        query = sa.select(schema.tasks).where(schema.tasks.c.state.in_(_OPEN_STATES)).order_by(schema.tasks.c.sequence)
        return [schema.task_row(found) for found in await self._rows(query)]

    async def newest_tasks(self, limit: int, wanted: Wanted = _ANY) -> list[TaskRow]:
        """The current attempt of each task that is wanted, the newest first."""
        tasks, newer = schema.tasks, schema.tasks.alias()
        is_newer = sa.and_(newer.c.task_id == tasks.c.task_id, newer.c.sequence > tasks.c.sequence)
        query = sa.select(tasks).where(~sa.exists().where(is_newer), tasks.c.submitted_at_ms >= wanted.since_ms)
        if wanted.states:
            # By their own index only those that are few: the ended ones would all be read, to be put in order.
            state = tasks.c.state if wanted.states <= set(_OPEN_STATES) else tasks.c.state.concat("")
            query = query.where(state.in_(wanted.states))
        if wanted.worker_id:
            query = query.where(tasks.c.worker_id == wanted.worker_id)
        query = query.order_by(tasks.c.sequence.desc()).limit(limit)
        return [schema.task_row(found) for found in await self._rows(query)]

    async def find_task(self, task_id: str, attempt: int | None = None) -> TaskRow | None:
        """The given attempt, or the current one."""
        query = sa.select(schema.tasks).where(schema.tasks.c.task_id == task_id)
        if attempt is not None:
            query = query.where(schema.tasks.c.attempt == attempt)
        found = await self._rows(query.order_by(schema.tasks.c.sequence.desc()).limit(1))
        return schema.task_row(found[0]) if found else None

    async def attempts(self, task_id: str) -> list[TaskRow]:
        """All attempts of a task, the oldest first."""
        query = sa.select(schema.tasks).where(schema.tasks.c.task_id == task_id).order_by(schema.tasks.c.attempt)
        return [schema.task_row(found) for found in await self._rows(query)]

    async def last_sequence(self) -> int:
        found = await self._rows(sa.select(sa.func.max(schema.tasks.c.sequence).label("last")))
        return int(found[0]["last"] or 0)

    async def forget_tasks(
        self, before_ms: int, after: tuple[int, int], untold: Untold
    ) -> tuple[int, tuple[int, int] | None]:
        """Look at the next few attempts that ended before `before_ms`, and remove their tasks, each with all its attempts.

        A task stays that has an attempt which is open, ended since, or is of `untold`. Returns how many attempts were
        removed, and what to give as `after` next; None at the end.
        """
        return await self._run(lambda: self._forget_tasks(before_ms, after, untold))

    # ---- nodes and orphans ----------------------------------------------------------------------------------------------

    async def save_node(self, row: NodeRow) -> None:
        """Insert or replace. Nodes that register at the same time, as after an outage, share a transaction."""
        self._unsaved_nodes.append(row)
        if self._saving_nodes is None:
            self._saving_nodes = asyncio.ensure_future(self._save_nodes())
        await asyncio.shield(self._saving_nodes)

    async def _save_nodes(self) -> None:
        try:
            await self.come_round()  # until it is our turn, others may come
        finally:
            rows, self._unsaved_nodes, self._saving_nodes = self._unsaved_nodes, [], None
        await self._run(lambda: self._write(schema.nodes, ("worker_id",), map(schema.node_values, rows)))

    async def load_nodes(self) -> list[NodeRow]:
        return [schema.node_row(found) for found in await self._rows(sa.select(schema.nodes))]

    async def forget_nodes(self, worker_ids: Sequence[str], before_ms: int) -> None:
        """Remove these, but for those that have registered since."""

        def forget() -> None:
            table = schema.nodes
            with self._live().begin() as connection:
                for worker_id in worker_ids:
                    connection.execute(
                        table.delete().where(table.c.worker_id == worker_id, table.c.heard_at_ms < before_ms)
                    )

        if worker_ids:
            await self._run(forget)

    async def save_orphan(self, row: OrphanRow) -> None:
        """Insert or replace; only the newest 1,000 are kept, since any peer can send them."""
        await self._run(lambda: self._save_orphan(row))

    async def forget_orphans(self, before_ms: int) -> int:
        """Remove those that came before; returns how many."""

        def forget() -> int:
            with self._live().begin() as connection:
                old = schema.orphans.c.received_at_ms < before_ms
                return int(connection.execute(schema.orphans.delete().where(old)).rowcount)

        return await self._run(forget)

    async def count_orphans(self) -> int:
        found = await self._rows(sa.select(sa.func.count().label("count")).select_from(schema.orphans))
        return int(found[0]["count"])

    # ---- in the thread --------------------------------------------------------------------------------------------------

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            message = f"the master's database does not answer: {cause}"
            raise TransientError(message, reason="STORE_UNAVAILABLE") from error

    async def _rows(self, query: sa.Select[Any]) -> Sequence[sa.RowMapping]:
        def read() -> Sequence[sa.RowMapping]:
            with self._live().begin() as connection:
                return connection.execute(query).mappings().all()

        return await self._run(read)

    def _live(self) -> sa.Engine:
        if self._engine is None:
            raise TransientError("the master's database is not open", reason="STORE_UNAVAILABLE")
        return self._engine

    def _open(self) -> None:
        try:
            engine = _make_engine(self._url)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise ConfigError(
                f"database_url cannot be used: {error}",
                field="database_url",
                hint="give sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE, and install the driver",
            ) from error
        try:
            with engine.begin() as connection:
                schema.metadata.create_all(connection)
                version = connection.execute(sa.select(schema.schema_version.c.version)).scalar()
                if version is None:
                    connection.execute(schema.schema_version.insert().values(version=schema.VERSION))
                elif version > schema.VERSION:
                    raise ConfigError(
                        f"the master's database has schema {version}, this program knows up to {schema.VERSION}",
                        field="database_url",
                        hint="start the newer program that wrote it, or another database",
                    )
                elif version < schema.VERSION:
                    schema.bring_up(connection)
                    connection.execute(schema.schema_version.update().values(version=schema.VERSION))
        except BaseException:
            engine.dispose()
            raise
        self._engine = engine

    def _write(self, table: sa.Table, keys: tuple[str, ...], values: Any) -> None:
        with self._live().begin() as connection:
            for row in values:
                _upsert(connection, table, keys, row)

    def _forget_tasks(
        self, before_ms: int, after: tuple[int, int], untold: Untold
    ) -> tuple[int, tuple[int, int] | None]:
        task_id, state, worker_id = schema.tasks.c.task_id, schema.tasks.c.state, schema.tasks.c.worker_id
        ended_at, sequence = schema.tasks.c.finished_at_ms, schema.tasks.c.sequence
        is_next = sa.or_(ended_at > after[0], sequence > after[1])
        looked_at = (
            sa.select(task_id, ended_at, sequence)
            .where(ended_at >= max(1, after[0]), ended_at < before_ms, is_next)
            .order_by(ended_at, sequence)
            .limit(_FORGOTTEN_COUNT)
        )
        stays = sa.or_(state.in_(_OPEN_STATES), ended_at >= before_ms, worker_id.in_(untold.worker_ids))
        with self._live().begin() as connection:
            schema.tasks_ended.create(connection, checkfirst=True)
            seen = connection.execute(looked_at).all()
            if not seen:
                return 0, None
            asked = {row.task_id for row in seen} - untold.task_ids
            kept = set(connection.execute(sa.select(task_id).where(task_id.in_(asked), stays)).scalars())
            gone = connection.execute(schema.tasks.delete().where(task_id.in_(asked - kept)))
        return int(gone.rowcount), (seen[-1].finished_at_ms, seen[-1].sequence)

    def _save_orphan(self, row: OrphanRow) -> None:
        table = schema.orphans
        with self._live().begin() as connection:
            _upsert(connection, table, ("task_id", "attempt", "worker_id"), schema.orphan_values(row))
            newest = sa.select(table.c.received_at_ms).order_by(table.c.received_at_ms.desc()).limit(1)
            horizon = connection.execute(newest.offset(ORPHANS_KEPT)).scalar()
            if horizon is not None:
                connection.execute(table.delete().where(table.c.received_at_ms <= horizon))


def _upsert(connection: sa.Connection, table: sa.Table, keys: tuple[str, ...], values: Any) -> None:
    match_key = sa.and_(*(table.c[key] == values[key] for key in keys))
    if not connection.execute(table.update().where(match_key).values(**values)).rowcount:
        connection.execute(table.insert().values(**values))


def _make_engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ArgumentError(f"{parsed.get_backend_name()} is not supported")
    if parsed.get_backend_name() == "postgresql":
        # Pinged before use, so that a restart of the server costs a reconnect and not a failed call.
        options = {"connect_timeout": 10, "options": "-c synchronous_commit=on", **_TCP}
        return sa.create_engine(
            parsed, poolclass=QueuePool, pool_size=1, max_overflow=0, pool_pre_ping=True, connect_args=options
        )
    engine = sa.create_engine(parsed, poolclass=StaticPool, connect_args={"check_same_thread": False, "timeout": 10})
    if parsed.database and not parsed.database.startswith((":", "file:")):
        # It holds the tasks' environment, so only its owner may read it. SQLite gives its side files the mode of this one.
        with contextlib.suppress(OSError):
            Path(parsed.database).touch(0o600)

    def on_connect(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    sa.event.listen(engine, "connect", on_connect)
    return engine
