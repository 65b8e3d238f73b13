"""One suite over both databases of the master: SQLite in a file, and a real PostgreSQL."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from nodeservice.errors import ConfigError, TransientError
from nodeservice.master import schema
from nodeservice.master.rows import NodeRow, OrphanRow, State, TaskRow, Untold, Wanted
from nodeservice.master.store import ORPHANS_KEPT, MasterStore, sqlite_url
from nodeservice.wire import master_worker_pb2 as pb
from tests.integration.postgresql import Cluster, running_postgresql, why_not

_NOBODY = Untold()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with running_postgresql() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path)
    running: Cluster = request.getfixturevalue("cluster")
    name = f"t{uuid.uuid4().hex}"
    engine = sa.create_engine(running.url(), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return running.url(name)


@pytest.fixture
async def store(url: str) -> AsyncIterator[MasterStore]:
    opened = MasterStore(url)
    await opened.open()
    yield opened
    await opened.close()


def row(task_id: str = "t", attempt: int = 1, sequence: int = 1, **fields: object) -> TaskRow:
    task = pb.Task(task_id=task_id, docker_image="busybox", env=[pb.EnvVar(name="A", value="\u00e4\0")])
    return TaskRow(
        task_id=task_id, attempt=attempt, sequence=sequence, task=task, submitted_at_ms=5, queued_at_ms=6, **fields
    )  # type: ignore[arg-type]


async def test_a_task_comes_back_as_it_was_saved(store: MasterStore) -> None:
    saved = row(
        state=State.FAILED, worker_id="w", accepted=True, cancel_requested=True, phase="RUNNING", reason="DEADLINE",
        message="Zeit \u00fcber", traceparent="00-1", assigned_at_ms=2**40, finished_at_ms=2**41,
        result=pb.TaskResult(task_id="t", worker_id="w", logs="tail", attempt=1, exit_code=0),
        late_result=pb.TaskResult(task_id="t"), node_retries=2, user_retries=1, avoid=("w", "v"),
    )  # fmt: skip
    await store.save_tasks([saved])
    assert await store.find_task("t") == saved


async def test_a_database_of_the_first_version_is_brought_up_and_keeps_what_it_holds(url: str) -> None:
    added = {"late_result", "node_retries", "user_retries", "avoid", "queued_at_ms"}
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        old = sa.MetaData()
        columns = [column._copy() for column in schema.tasks.columns if column.name not in added]
        sa.Table("tasks", old, *columns)
        versions = sa.Table("schema_version", old, sa.Column("version", sa.Integer, nullable=False))
        old.create_all(connection)
        connection.execute(versions.insert().values(version=1))
        values = {name: value for name, value in schema.task_values(row()).items() if name not in added}
        connection.execute(old.tables["tasks"].insert().values(**values))
    engine.dispose()
    for _ in range(2):
        opened = MasterStore(url)
        await opened.open()
        assert await opened.find_task("t") == replace(row(), queued_at_ms=5)
        await opened.save_tasks([row(message="written")])
        assert await opened.find_task("t") == row(message="written")
        await opened.save_tasks([replace(row(), queued_at_ms=5)])
        await opened.close()


async def test_of_a_tasks_attempts_the_one_that_was_queued_last_is_found_and_listed(store: MasterStore) -> None:
    await store.save_tasks([row("a", 1, 4), row("a", 2, 3, state=State.DROPPED), row("b", 1, 2)])
    found = await store.find_task("a")
    assert found is not None
    assert found.attempt == 1
    assert [(one.task_id, one.attempt) for one in await store.newest_tasks(5)] == [("a", 1), ("b", 1)]
    assert [one.attempt for one in await store.attempts("a")] == [1, 2]


async def test_saving_again_replaces_and_finding_gives_the_newest_attempt(store: MasterStore) -> None:
    await store.save_tasks([row(), row(attempt=2, sequence=2)])
    await store.save_tasks([row(state=State.CANCELLED)])
    newest = await store.find_task("t")
    assert newest is not None
    assert newest.attempt == 2
    first = await store.find_task("t", 1)
    assert first is not None
    assert first.state is State.CANCELLED
    assert await store.find_task("t", 3) is None
    assert await store.find_task("nobody") is None


async def test_open_tasks_come_in_the_order_of_the_queue_and_lists_newest_first(store: MasterStore) -> None:
    await store.save_tasks([row("c", sequence=3), row("a", sequence=1, state=State.SUCCEEDED), row("b", sequence=2)])
    assert [found.task_id for found in await store.open_tasks()] == ["b", "c"]
    assert [found.task_id for found in await store.newest_tasks(2)] == ["c", "b"]
    assert await store.last_sequence() == 3


@pytest.mark.parametrize(
    ("wanted", "listed"),
    [
        (Wanted(), ["d", "c", "b"]),
        (Wanted(states=frozenset({"FAILED", "RUNNING"})), ["c", "b"]),
        (Wanted(states=frozenset({"LOST"})), []),
        (Wanted(worker_id="w"), ["c"]),
        (Wanted(since_ms=6), ["c"]),
    ],
)
async def test_those_that_are_wanted_are_listed_by_their_current_attempt(
    store: MasterStore, wanted: Wanted, listed: list[str]
) -> None:
    other = replace(row("c", sequence=3, state=State.FAILED, worker_id="w"), submitted_at_ms=6)
    lost = row("d", sequence=4, state=State.LOST, worker_id="w")
    running = row("b", sequence=2, state=State.RUNNING, worker_id="x")
    await store.save_tasks([row("a", state=State.SUCCEEDED), running, other, lost, row("d", 2, 5)])
    assert [found.task_id for found in await store.newest_tasks(3, wanted)] == listed


async def forget(store: MasterStore, before_ms: int, untold: Untold = _NOBODY) -> int:
    """The whole way from look to look; returns how many attempts were removed."""
    count, after = 0, (0, 0)
    while True:
        removed, next_after = await store.forget_tasks(before_ms, after, untold)
        count += removed
        if next_after is None:
            return count
        after = next_after


async def test_what_ended_long_ago_goes_with_all_its_attempts_and_nothing_else(store: MasterStore) -> None:
    old, young = {"state": State.FAILED, "finished_at_ms": 10}, {"state": State.FAILED, "finished_at_ms": 20}
    await store.save_tasks([
        row("old", 1, 1, **old), row("old", 2, 2, **old), row("open", 1, 3, **old), row("open", 2, 4),
        row("young", 1, 5, **old), row("young", 2, 6, **young), row("away", 1, 7, **old, worker_id="away"),
        row("away", 2, 8, **old, worker_id="w"), row("listed", 1, 9, **old, worker_id="w"), row("queued", 1, 10),
    ])  # fmt: skip
    untold = Untold(frozenset({"away"}), frozenset({"listed"}))
    assert await forget(store, 20, untold) == 2
    left = [(one.task_id, one.attempt) for name in ("old", "open", "young") for one in await store.attempts(name)]
    assert left == [("open", 1), ("open", 2), ("young", 1), ("young", 2)]
    assert {one.task_id for one in await store.newest_tasks(9)} == {"open", "young", "away", "listed", "queued"}
    assert await forget(store, 21) == 5
    assert [one.task_id for one in await store.newest_tasks(9)] == ["queued", "open"]


async def test_many_that_ended_at_once_are_all_forgotten_also_behind_many_that_stay(store: MasterStore) -> None:
    ended = {"state": State.REJECTED, "finished_at_ms": 10}
    kept = [row(f"k{number}", 1, number, **ended, worker_id="away") for number in range(1, 251)]
    gone = [row(f"g{number}", 1, number, **ended) for number in range(251, 501)]
    await store.save_tasks([*kept, *gone])
    assert await forget(store, 11, Untold(frozenset({"away"}), frozenset())) == 250
    assert len(await store.newest_tasks(1000)) == 250


async def test_a_database_of_an_older_program_forgets_too(url: str) -> None:
    engine = sa.create_engine(url)
    schema.metadata.create_all(engine)
    schema.tasks_ended.drop(engine)
    engine.dispose()
    store = MasterStore(url)
    await store.open()
    await store.save_tasks([row(state=State.SUCCEEDED, finished_at_ms=10)])
    assert await forget(store, 11) == 1
    await store.close()


async def test_reports_that_were_kept_aside_long_ago_are_forgotten(store: MasterStore) -> None:
    for at in (10, 20):
        await store.save_orphan(
            OrphanRow(task_id=f"t{at}", attempt=1, worker_id="w", result=pb.TaskResult(), received_at_ms=at)
        )
    assert await store.forget_orphans(20) == 1
    assert await store.count_orphans() == 1


async def test_a_call_that_fails_stores_nothing(store: MasterStore) -> None:
    await store.save_tasks([row("a", sequence=1)])
    with pytest.raises(TransientError) as caught:
        await store.save_tasks([row("b", sequence=2), row("c", sequence=1)])
    assert caught.value.reason == "STORE_UNAVAILABLE"
    assert await store.find_task("b") is None


async def test_what_was_saved_is_there_for_the_next_process(url: str) -> None:
    first = MasterStore(url)
    await first.open()
    await first.save_tasks([row()])
    await first.save_node(NodeRow(worker_id="w", address="h:1", registered_at_ms=1, heard_at_ms=2))
    await first.close()
    second = MasterStore(url)
    await second.open()
    try:
        assert await second.find_task("t") == row()
        assert [node.address for node in await second.load_nodes()] == ["h:1"]
    finally:
        await second.close()


async def test_a_node_is_replaced_by_its_name(store: MasterStore) -> None:
    info = pb.WorkerInfo(worker_id="w", total_cpu=2)
    await store.save_node(NodeRow(worker_id="w", address="h:1", registered_at_ms=1, heard_at_ms=1))
    changed = NodeRow(worker_id="w", address="h:2", info=info, registered_at_ms=1, heard_at_ms=2)
    await store.save_node(changed)
    assert await store.load_nodes() == [changed]


async def test_nodes_are_forgotten_by_name_but_for_one_that_has_registered_since(store: MasterStore) -> None:
    for worker_id, heard_at_ms in (("old", 1), ("back", 9), ("other", 1)):
        await store.save_node(NodeRow(worker_id=worker_id, address="h:1", registered_at_ms=1, heard_at_ms=heard_at_ms))
    await store.forget_nodes(["old", "back"], 9)
    assert {node.worker_id for node in await store.load_nodes()} == {"back", "other"}


async def test_nodes_that_register_at_once_share_a_transaction_and_are_all_stored(
    store: MasterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    write = store._write

    def counted(table: sa.Table, keys: tuple[str, ...], values: Iterable[object]) -> None:
        rows = list(values)
        writes.append(len(rows))
        write(table, keys, rows)

    monkeypatch.setattr(store, "_write", counted)
    nodes = [NodeRow(worker_id=f"w{n}", address="h:1", registered_at_ms=1, heard_at_ms=1) for n in range(300)]
    await asyncio.gather(*(store.save_node(node) for node in nodes))
    assert writes == [300]
    assert len(await store.load_nodes()) == 300


async def test_a_node_that_could_not_be_stored_is_told_so_and_the_next_is_stored(
    store: MasterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = NodeRow(worker_id="w", address="h:1", registered_at_ms=1, heard_at_ms=1)
    with monkeypatch.context() as patched:
        patched.setattr(store, "_engine", None)
        failed = await asyncio.gather(*(store.save_node(node) for _ in range(3)), return_exceptions=True)
    assert [type(error) for error in failed] == [TransientError] * 3
    await store.save_node(node)
    assert await store.load_nodes() == [node]


async def test_orphans_are_kept_once_each_and_only_the_newest(
    store: MasterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodeservice.master.store.ORPHANS_KEPT", 3)
    for number in range(6):
        for _ in range(2):
            result = pb.TaskResult(task_id=f"t{number}")
            await store.save_orphan(
                OrphanRow(task_id=f"t{number}", attempt=1, worker_id="w", result=result, received_at_ms=number)
            )
    assert await store.count_orphans() == 3
    assert ORPHANS_KEPT == 1000


async def test_a_message_with_a_nul_character_is_stored_without_it(store: MasterStore) -> None:
    await store.save_tasks([row(message="a\0b", reason="\0", phase="\0")])
    found = await store.find_task("t")
    assert found is not None
    assert found.message == "a\ufffdb"


async def test_many_calls_at_once_run_one_after_the_other_in_the_named_thread(store: MasterStore) -> None:
    await asyncio.gather(*(store.save_tasks([row(f"t{n}", sequence=n + 1)]) for n in range(50)))
    assert len(await store.open_tasks()) == 50
    assert [t.name for t in threading.enumerate() if t.name.startswith("master-store")] == ["master-store_0"]


async def test_a_newer_schema_is_refused_and_left_alone(url: str) -> None:
    first = MasterStore(url)
    await first.open()
    await first.close()
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(schema.schema_version.update().values(version=schema.VERSION + 1))
    second = MasterStore(url)
    with pytest.raises(ConfigError, match=f"schema {schema.VERSION + 1}"):
        await second.open()
    await second.close()
    with engine.begin() as connection:
        assert connection.execute(sa.select(schema.schema_version.c.version)).scalars().all() == [schema.VERSION + 1]
    engine.dispose()


async def test_a_restart_of_postgresql_costs_a_reconnect(cluster: Cluster) -> None:
    store = MasterStore(cluster.url())
    await store.open()
    try:
        await store.save_tasks([row()])
        await asyncio.to_thread(cluster.stop)
        with pytest.raises(TransientError):
            await store.save_tasks([row(sequence=2)])
        await asyncio.to_thread(cluster.start)
        await store.save_tasks([row(sequence=3)])
        assert await store.last_sequence() == 3
    finally:
        await store.close()


async def test_a_postgresql_that_is_gone_without_a_word_is_not_waited_for_by_the_hour(cluster: Cluster) -> None:
    store = MasterStore(cluster.url())
    await store.open()
    with store._live().connect() as connection:
        told = connection.connection.driver_connection.info.get_parameters()  # type: ignore[union-attr]
    await store.close()
    idle, interval, count = (int(told[f"keepalives_{name}"]) for name in ("idle", "interval", "count"))
    assert max(idle + interval * count, int(told["tcp_user_timeout"]) // 1000) <= 30


async def test_only_its_owner_may_read_a_new_sqlite_file_since_it_holds_the_environment_of_tasks(
    tmp_path: Path,
) -> None:
    opened = MasterStore(sqlite_url(tmp_path))
    await opened.open()
    await opened.save_tasks([row()])
    try:
        assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
            f"master.sqlite{side}": 0o600 for side in ("", "-wal", "-shm")
        }
    finally:
        await opened.close()


async def test_sqlite_runs_with_a_write_ahead_log_and_full_sync(tmp_path: Path) -> None:
    store = MasterStore(sqlite_url(tmp_path))
    await store.open()
    try:
        engine = store._live()

        def pragmas() -> tuple[object, object]:
            with engine.connect() as connection:
                return (
                    connection.exec_driver_sql("PRAGMA journal_mode").scalar(),
                    connection.exec_driver_sql("PRAGMA synchronous").scalar(),
                )

        assert await store._run(pragmas) == ("wal", 2)
    finally:
        await store.close()
    with sqlite3.connect(tmp_path / "master.sqlite") as connection:
        assert connection.execute("SELECT version FROM schema_version").fetchall() == [(schema.VERSION,)]
    connection.close()


@pytest.mark.parametrize("bad", ["", "nonsense", "mysql://x/y", "sqlite+nodriver:///x"])
async def test_a_url_that_means_nothing_is_a_configuration_error(bad: str) -> None:
    store = MasterStore(bad)
    with pytest.raises(ConfigError) as caught:
        await store.open()
    assert caught.value.field == "database_url"
    await store.close()


async def test_a_database_that_is_not_there_is_told_and_may_come_later(tmp_path: Path) -> None:
    store = MasterStore(sqlite_url(tmp_path / "missing"))
    with pytest.raises(TransientError):
        await store.open()
    (tmp_path / "missing").mkdir()
    await store.open()
    await store.save_tasks([replace(row(), message="later")])
    await store.close()
