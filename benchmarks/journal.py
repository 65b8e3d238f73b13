"""Synced appends of the journal, in batches of several sizes, beside what the disk itself does for the same bytes."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.rig.finding import Finding
from benchmarks.rig.records import record
from benchmarks.rig.scale import Scale
from nodeservice.core.model import TaskRecord
from nodeservice.journal.codec import encode_record
from nodeservice.journal.sqlite import SqliteJournal

ABOUT = (
    "Records per second that are durable when the call returns. service: the journal (SQLite, WAL, full sync), one call "
    "per batch. disk: the same records as bytes, appended to a file and synced (fdatasync) once per batch. In turn. "
    "callers: so many tasks save one record each at the same time, and share transactions. size: of the journal's files "
    "after so many tasks were saved, and forgotten as a node does, which keeps the last 2,000."
)

_KEPT = 2_000
_AT_ONCE = 500


async def measure(scale: Scale) -> Finding:
    found = Finding(about=ABOUT)
    home = scale.directory("journal")
    seconds = scale.pick(0.2, 1.0)
    records = [record(f"j-{number}") for number in range(2048)]
    journal = SqliteJournal(home / "journal.sqlite")
    ratios: dict[int, list[float]] = {}
    try:
        for size in (1, 16, 128, 512):
            samples: dict[str, list[float]] = {"service": [], "disk": [], "callers": []}
            await _journal_rate(journal, records, size, 0.1)
            for _ in range(scale.pick(3, 5)):
                samples["service"].append(await _journal_rate(journal, records, size, seconds))
                samples["disk"].append(await asyncio.to_thread(_disk_rate, home / "plain", records, size, seconds))
                samples["callers"].append(await _callers_rate(journal, records, size, seconds))
            for arm, rates in samples.items():
                found.add("durable records", "records/s", f"{size} at once", arm, rates, x=size, more_is_better=True)
            ratios[size] = samples["service"]
            found.ratios[f"journal_vs_disk_at_{size}"] = sorted(
                mine / theirs for mine, theirs in zip(samples["service"], samples["disk"], strict=True)
            )[len(samples["disk"]) // 2]
    finally:
        await journal.close()
    await _sizes(found, home / "long.sqlite", counts=scale.pick((4_000, 10_000), (10_000, 100_000, 300_000)))
    return found


async def _sizes(found: Finding, path: Path, *, counts: tuple[int, ...]) -> None:
    journal = SqliteJournal(path)
    like = record("j")
    sizes: list[float] = []
    try:
        for number in range(0, counts[-1], _AT_ONCE):
            ids = [like.id._replace(task_id=f"j-{number + offset}") for offset in range(_AT_ONCE)]
            await journal.save([replace(like, spec=replace(like.spec, id=id_)) for id_ in ids])
            await journal.forget([like.id._replace(task_id=f"j-{old}") for old in _as_old(number)])
            if number + _AT_ONCE in counts:
                sizes.append(sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 2**20)
                found.add(
                    "journal's size", "MiB", f"{number + _AT_ONCE:,} tasks", "size", sizes[-1:], x=number + _AT_ONCE
                )
    finally:
        await journal.close()
    found.ratios["journal_size_growth"] = sizes[-1] / sizes[0]


def _as_old(number: int) -> range:
    return range(max(0, number - _KEPT), max(0, number - _KEPT + _AT_ONCE))


async def _journal_rate(journal: SqliteJournal, records: list[TaskRecord], size: int, seconds: float) -> float:
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        batch = records[done % len(records) :][:size] or records[:size]
        await journal.save([_changed(one) for one in batch])
        done += len(batch)
    return done / spent


async def _callers_rate(journal: SqliteJournal, records: list[TaskRecord], size: int, seconds: float) -> float:
    began, done = time.perf_counter(), 0

    async def call(number: int) -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await journal.save([_changed(records[number])])
            done += 1

    await asyncio.gather(*(call(number) for number in range(size)))
    return done / (time.perf_counter() - began)


def _disk_rate(path: Path, records: list[TaskRecord], size: int, seconds: float) -> float:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        began, done = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < seconds:
            batch = records[done % len(records) :][:size] or records[:size]
            os.write(descriptor, "".join(encode_record(_changed(one)) for one in batch).encode())
            os.fdatasync(descriptor)
            done += len(batch)
        return done / spent
    finally:
        os.close(descriptor)
        path.unlink()


def _changed(one: TaskRecord) -> TaskRecord:
    return replace(one, started_at=datetime.now(UTC))
