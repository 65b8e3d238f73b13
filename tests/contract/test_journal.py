"""One suite for every journal, then what only a file can show: power loss, a full disk, damage, a newer schema."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nodeservice.core.model import AttemptId, Lease, Phase, PhaseTiming, Resources, TaskRecord, TaskSpec, TraceIds
from nodeservice.errors import ConfigError, InvariantError, NodeFaultError, TransientError
from nodeservice.journal.codec import encode_record
from nodeservice.journal.lock import StateDirLock, not_writable
from nodeservice.journal.schema import MIGRATIONS
from nodeservice.journal.sqlite import SqliteJournal
from nodeservice.ports import Journal
from nodeservice.testing.failing_journal import FailingJournal
from nodeservice.testing.memory_journal import MemoryJournal

NOW = datetime(2026, 1, 1, tzinfo=UTC)
Reopen = Callable[[], Journal]


def a_record(task_id: str = "task-1", attempt: int = 1, phase: Phase = Phase.PULLING, **changes: object) -> TaskRecord:
    record = TaskRecord(
        spec=TaskSpec(
            id=AttemptId(task_id, attempt),
            image="busybox",
            request=Resources(cpu_milli=100),
            pids_limit=64,
            fingerprint="f",
        ),
        lease=Lease(granted=Resources(cpu_milli=100)),
        trace=TraceIds(trace_id="a" * 32, span_id="b" * 16),
        accepted_at=NOW,
        phase=phase,
        timings=(PhaseTiming(name="admit", started_at=NOW),),
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


@pytest.fixture(params=["memory", "sqlite", "healthy FailingJournal"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Reopen:
    """Opens the same journal again, as a restarted process does."""
    memory = MemoryJournal()
    return {
        "memory": lambda: memory,
        "sqlite": lambda: SqliteJournal(tmp_path / "state" / "journal.db"),
        "healthy FailingJournal": lambda: FailingJournal(memory),
    }[request.param]


@pytest.fixture
async def journal(reopen: Reopen) -> AsyncIterator[Journal]:
    journal = reopen()
    yield journal
    await journal.close()


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[SqliteJournal]:
    journal = SqliteJournal(tmp_path / "journal.db")
    yield journal
    await journal.close()


# ---- the contract -----------------------------------------------------------------------------------------------------


async def test_a_new_journal_is_empty(journal: Journal) -> None:
    assert list(await journal.load()) == []
    assert await journal.get_note("master") is None


async def test_saved_records_come_back_equal_oldest_first_after_a_restart(journal: Journal, reopen: Reopen) -> None:
    records = [a_record("b"), a_record("a"), a_record("a", 2)]
    await journal.save(records)
    await journal.close()
    again = reopen()
    assert list(await again.load()) == records
    await again.close()


async def test_the_last_write_per_attempt_wins_and_keeps_its_place(journal: Journal) -> None:
    await journal.save([a_record("a"), a_record("b")])
    await journal.save([a_record("a", phase=Phase.RUNNING)])
    await journal.save([a_record("b", phase=Phase.CREATING), a_record("b", phase=Phase.STARTING)])
    assert [(str(r.id), r.phase) for r in await journal.load()] == [("a.1", Phase.RUNNING), ("b.1", Phase.STARTING)]


async def test_saving_the_same_twice_changes_nothing(journal: Journal) -> None:
    for _ in range(2):
        await journal.save([a_record()])
    assert list(await journal.load()) == [a_record()]


async def test_saving_or_forgetting_nothing_is_allowed(journal: Journal) -> None:
    await journal.save([])
    await journal.forget([])
    assert list(await journal.load()) == []


async def test_forgotten_attempts_are_gone_and_others_stay(journal: Journal) -> None:
    await journal.save([a_record("a"), a_record("a", 2), a_record("b")])
    await journal.forget([AttemptId("a", 1), AttemptId("b"), AttemptId("never-seen")])
    await journal.forget([AttemptId("a", 1)])
    assert [str(record.id) for record in await journal.load()] == ["a.2"]


async def test_a_note_is_kept_overwritten_and_independent_of_records(journal: Journal, reopen: Reopen) -> None:
    await journal.set_note("master", "one:50051")
    await journal.set_note("master", "two:50051")
    await journal.set_note("empty", "")
    await journal.close()
    again = reopen()
    assert await again.get_note("master") == "two:50051"
    assert await again.get_note("empty") == ""
    assert list(await again.load()) == []
    await again.close()


async def test_two_hundred_saves_at_once_are_all_kept(journal: Journal) -> None:
    await asyncio.gather(*(journal.save([a_record(f"task-{number}")]) for number in range(200)))
    assert {record.id.task_id for record in await journal.load()} == {f"task-{number}" for number in range(200)}


async def test_writes_take_effect_in_the_order_in_which_they_were_called(journal: Journal) -> None:
    phases = [Phase.PULLING, Phase.CREATING, Phase.STARTING, Phase.RUNNING]
    await asyncio.gather(
        journal.save([a_record("x")]),
        journal.forget([AttemptId("x")]),
        *(journal.save([a_record("y", phase=phase)]) for phase in phases),
    )
    assert [(str(record.id), record.phase) for record in await journal.load()] == [("y.1", Phase.RUNNING)]


# ---- the failing double -----------------------------------------------------------------------------------------------


async def test_a_failing_journal_fails_the_next_n_writes_then_heals() -> None:
    journal = FailingJournal(MemoryJournal())
    journal.fail_next(2)
    for _ in range(2):
        with pytest.raises(TransientError) as caught:
            await journal.save([a_record()])
        assert caught.value.reason == "JOURNAL_UNWRITABLE"
    assert list(await journal.load()) == []
    await journal.save([a_record()])
    assert len(await journal.load()) == 1


async def test_a_failing_journal_can_fail_for_good() -> None:
    journal = FailingJournal(MemoryJournal())
    journal.fail_always()
    for _ in range(5):
        with pytest.raises(TransientError):
            await journal.set_note("a", "b")
    journal.heal()
    await journal.set_note("a", "b")
    assert await journal.get_note("a") == "b"


# ---- the file ---------------------------------------------------------------------------------------------------------

SAVE_AND_DIE = """
import asyncio, os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_journal import SqliteJournal, a_record
async def main():
    journal = SqliteJournal(Path(sys.argv[1]))
    await journal.save([a_record("first")])
    await asyncio.gather(*(journal.save([a_record(f"task-{n}")]) for n in range(20)))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


async def test_a_process_killed_right_after_save_returned_has_lost_nothing(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    run = subprocess.run([sys.executable, "-c", SAVE_AND_DIE, path, Path(__file__).parent], check=False, timeout=60)
    assert run.returncode == -signal.SIGKILL
    journal = SqliteJournal(path)
    assert [r.id.task_id for r in await journal.load()] == ["first", *(f"task-{n}" for n in range(20))]
    await journal.close()


async def test_a_save_is_synced_before_it_returns(sqlite: SqliteJournal) -> None:
    await sqlite.save([a_record()])
    assert sqlite._connection is not None
    settings = [sqlite._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2], "2 is FULL"


async def test_a_group_that_waits_shares_one_transaction(sqlite: SqliteJournal) -> None:
    await sqlite.load()
    assert sqlite._connection is not None
    statements: list[str] = []
    sqlite._connection.set_trace_callback(statements.append)
    await asyncio.gather(*(sqlite.save([a_record(f"task-{number}")]) for number in range(100)))
    assert 1 <= statements.count("BEGIN IMMEDIATE") < 50


async def test_one_save_is_all_or_nothing(sqlite: SqliteJournal) -> None:
    with pytest.raises(InvariantError):
        await sqlite.save([a_record("good"), a_record("bad", limits={"asked": object()})])
    assert list(await sqlite.load()) == []


async def test_forgetting_lets_the_file_be_used_again_instead_of_growing(sqlite: SqliteJournal, tmp_path: Path) -> None:
    async def round_trip() -> int:
        records = [a_record(f"task-{number}", remarks=("x" * 4000,)) for number in range(300)]
        await sqlite.save(records)
        await sqlite.forget([record.id for record in records])
        return sum(file.stat().st_size for file in tmp_path.glob("journal.db*"))

    sizes = [await round_trip() for _ in range(8)]
    assert max(sizes[3:]) <= 1.1 * max(sizes[:3])


async def test_only_the_owner_may_read_the_files(sqlite: SqliteJournal, tmp_path: Path) -> None:
    await sqlite.save([a_record()])
    files = list(tmp_path.glob("journal.db*"))
    assert len(files) == 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


async def test_closing_twice_is_success_and_ends_the_thread(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.db")
    await journal.save([a_record()])
    assert any(thread.name.startswith("nodeservice-journal") for thread in threading.enumerate())
    await journal.close()
    await journal.close()
    assert not any(thread.name.startswith("nodeservice-journal") for thread in threading.enumerate())
    with pytest.raises(RuntimeError):
        await journal.save([a_record()])


async def test_a_write_that_was_cancelled_while_it_waited_is_not_made_later(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.db")
    await journal.set_note("first", "1")
    gate = threading.Event()
    journal._thread.submit(lambda: gate.wait(60) and None)
    try:
        write = asyncio.create_task(journal.set_note("cancelled", "2"))
        await asyncio.sleep(0)
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write
    finally:
        gate.set()
    await journal.set_note("after", "3")
    assert await journal.get_note("cancelled") is None
    assert await journal.get_note("after") == "3"
    await journal.close()


async def test_what_comes_while_it_is_closed_is_refused_and_what_came_before_is_written(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.db")
    before = [asyncio.create_task(journal.set_note(f"before-{number}", "x")) for number in range(20)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(journal.close())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="is closed"):
        await journal.set_note("late", "x")
    await asyncio.gather(closing, *before)
    again = SqliteJournal(tmp_path / "journal.db")
    assert [await again.get_note(f"before-{number}") for number in range(20)] == ["x"] * 20
    await again.close()


FILL_AND_FREE = """
import asyncio, resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_journal import SqliteJournal, TransientError, a_record
async def main():
    journal = SqliteJournal(Path(sys.argv[1]))
    await journal.save([a_record("before")])
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
    try:
        for n in range(1000):
            await journal.save([a_record(f"kept-{n}", remarks=("x" * 20_000,))])
    except TransientError as error:
        assert error.reason == "JOURNAL_UNWRITABLE", error
        assert error.hint, error
    else:
        sys.exit("the file size limit was never met")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await journal.save([a_record("after")])
    ids = [record.id.task_id for record in await journal.load()]
    assert ids == ["before", *(f"kept-{m}" for m in range(n)), "after"], ids
    assert n > 0
    await journal.close()
asyncio.run(main())
"""


def test_a_disk_without_room_is_transient_and_the_journal_goes_on_when_there_is_room(tmp_path: Path) -> None:
    # A file size limit makes write(2) fail in mid-transaction without needing a mount.
    run = subprocess.run(
        [sys.executable, "-c", FILL_AND_FREE, tmp_path / "journal.db", Path(__file__).parent],
        check=False,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


async def test_a_place_that_cannot_be_written_is_transient(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("no directory")
    journal = SqliteJournal(blocker / "journal.db")
    with pytest.raises(TransientError, match=str(blocker)) as caught:
        await journal.save([a_record()])
    assert caught.value.reason == "JOURNAL_UNWRITABLE"
    blocker.unlink()
    await journal.save([a_record()])
    assert len(await journal.load()) == 1
    await journal.close()


async def test_a_journal_locked_by_somebody_else_is_transient(sqlite: SqliteJournal, tmp_path: Path) -> None:
    await sqlite.load()
    assert sqlite._connection is not None
    sqlite._connection.execute("PRAGMA busy_timeout = 10")
    other = sqlite3.connect(tmp_path / "journal.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(TransientError) as caught:
        await sqlite.save([a_record()])
    assert caught.value.reason == "JOURNAL_UNWRITABLE"
    other.close()
    await sqlite.save([a_record()])


@pytest.mark.parametrize("damage", ["no database", "damaged page", "truncated"])
async def test_a_damaged_file_is_a_node_fault_with_a_remedy(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "journal.db"
    journal = SqliteJournal(path)
    await journal.save([a_record(f"task-{number}", remarks=("x" * 3000,)) for number in range(50)])
    await journal.close()
    content = bytearray(path.read_bytes())
    if damage == "no database":
        content[:100] = b"\xff" * 100
    elif damage == "damaged page":
        content[4096 * 2 : 4096 * 12] = b"\xa5" * (4096 * 10)
    else:
        del content[len(content) // 2 :]
    path.write_bytes(content)
    journal = SqliteJournal(path)
    with pytest.raises(NodeFaultError, match=str(path)) as caught:
        await journal.load()
    assert caught.value.reason == "JOURNAL_CORRUPT"
    assert "move" in (caught.value.hint or "")
    await journal.close()


async def test_whatever_bit_of_the_file_flips_nothing_wrong_is_read(tmp_path: Path) -> None:
    path, damaged = tmp_path / "journal.db", tmp_path / "damaged.db"
    journal = SqliteJournal(path)
    records = [a_record(f"task-{number}", phase=Phase(1 + number % 5)) for number in range(60)]
    await journal.save(records)
    await journal.set_note("master_address", "127.0.0.1:50051")
    await journal.close()
    content, chance = path.read_bytes(), random.Random(7)
    refusals = []
    for _ in range(400):
        flipped = bytearray(content)
        flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        damaged.write_bytes(flipped)
        journal = SqliteJournal(damaged)
        try:
            assert list(await journal.load()) == records
            assert await journal.get_note("master_address") == "127.0.0.1:50051"
        except (NodeFaultError, ConfigError) as error:  # a schema version may flip into a newer one
            refusals.append(error.reason)
        finally:
            await journal.close()
            for side in tmp_path.glob("damaged.db-*"):
                side.unlink()
    assert len(refusals) > 100
    assert set(refusals) <= {"JOURNAL_CORRUPT", "CONFIG"}


async def test_a_write_that_a_power_cut_tore_is_as_if_it_had_not_been_made(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = SqliteJournal(path)
    await journal.save([a_record("first")])
    size = path.with_name("journal.db-wal").stat().st_size
    await journal.save([a_record("second")])
    copy = tmp_path / "copy.db"
    for name in ("", "-wal"):
        (tmp_path / f"copy.db{name}").write_bytes((tmp_path / f"journal.db{name}").read_bytes())
    await journal.close()
    os.truncate(copy.with_name("copy.db-wal"), size + 1000)
    torn = SqliteJournal(copy)
    assert [record.id.task_id for record in await torn.load()] == ["first"]
    await torn.save([a_record("third")])
    assert [record.id.task_id for record in await torn.load()] == ["first", "third"]
    await torn.close()


async def test_a_journal_from_before_checksums_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE schema_version (version INTEGER NOT NULL)")
        for statement in (*MIGRATIONS[0], "INSERT INTO schema_version VALUES (1)"):
            connection.execute(statement)
        connection.execute(
            "INSERT INTO attempts VALUES (1, 'task-1', 1, ?, '', ?)", (Phase.PULLING.value, encode_record(a_record()))
        )
        connection.execute("INSERT INTO notes VALUES ('key', 'value')")
    journal = SqliteJournal(path)
    assert list(await journal.load()) == [a_record()]
    assert await journal.get_note("key") == "value"
    await journal.save([a_record(phase=Phase.RUNNING)])
    assert list(await journal.load()) == [a_record(phase=Phase.RUNNING)]
    await journal.close()


async def test_a_record_that_cannot_be_read_is_named(sqlite: SqliteJournal) -> None:
    await sqlite.save([a_record("task-7", 3)])
    assert sqlite._connection is not None
    sqlite._connection.execute("UPDATE attempts SET record = '{}', checksum = NULL")
    with pytest.raises(NodeFaultError, match="task task-7, attempt 3") as caught:
        await sqlite.load()
    assert caught.value.reason == "JOURNAL_CORRUPT"


async def test_a_newer_schema_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = SqliteJournal(path)
    await journal.save([a_record()])
    await journal.close()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO schema_version (version) VALUES (999)")
    connection.close()
    journal = SqliteJournal(path)
    with pytest.raises(ConfigError, match=r"schema version 999.*newer nodeservice"):
        await journal.load()
    with pytest.raises(ConfigError):
        await journal.save([a_record("task-2")])
    await journal.close()


# ---- the lock of the state directory ----------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from nodeservice.journal.lock import StateDirLock
lock = StateDirLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_state_directory_in_use_is_refused_by_the_pid_of_its_holder_and_free_after_its_kill(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TransientError, match=f"{tmp_path}.*pid {holder.pid}") as caught:
            StateDirLock(tmp_path).acquire()
        assert caught.value.field == "state_dir"
    finally:
        holder.kill()
        holder.communicate()
    free = StateDirLock(tmp_path)
    free.acquire()
    assert (tmp_path / "node.lock").read_text() == f"{os.getpid()}\n"
    free.release()


def test_a_lock_needs_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    first = StateDirLock(tmp_path)
    first.acquire()
    with pytest.raises(TransientError, match="pid unknown"):
        StateDirLock(tmp_path).acquire()
    first.release()


@pytest.mark.parametrize(("number", "passes"), [(errno.ENOSPC, True), (errno.EIO, True), (errno.EROFS, False)])
def test_a_disk_that_is_full_or_away_is_no_wrong_configuration(number: int, passes: bool, tmp_path: Path) -> None:
    error = not_writable("results_dir", tmp_path, OSError(number, os.strerror(number)))
    assert isinstance(error, TransientError if passes else ConfigError)
    assert error.message == f"results_dir {tmp_path} cannot be written: {os.strerror(number)}"


def test_a_lock_is_held_once_and_can_be_taken_again(tmp_path: Path) -> None:
    first, second = StateDirLock(tmp_path / "state"), StateDirLock(tmp_path / "state")
    first.acquire()
    first.acquire()
    with pytest.raises(TransientError, match=str(os.getpid())):
        second.acquire()
    first.release()
    first.release()
    second.acquire()
    second.release()


def test_a_state_directory_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        StateDirLock(tmp_path / "file" / "state").acquire()
