"""Uploads to MinIO and to a directory, beside the plain client and what disk and hash can do."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from minio import Minio

from benchmarks.rig.finding import Finding, Target, median, paired
from benchmarks.rig.scale import Scale
from benchmarks.rig.service import minio_server
from nodeservice.core.model import AttemptId, Resources, TaskSpec
from nodeservice.ports import ResultBundle, ResultStore
from nodeservice.results.file import FileResultStore
from nodeservice.results.hand_over import Bundles
from nodeservice.results.s3 import S3ResultStore
from tests.integration.minio_server import MinioServer

MIB = 1024**2
BUCKET = "uploads"
CLIENT_THREADS = 16
ABOUT = (
    "The result store's `put` of a frozen bundle, verified and with its manifest. service: to MinIO. client: minio's own "
    f"fput_object, file after file, in three parallel parts. client_threads: the same with {CLIENT_THREADS} "
    "threads over the files, where there are several. directory: the service's store in a directory, synced. collect: the "
    "service's hashing before any upload. hash and copy: sha256 of the files; a plain copy that is synced. All in turn."
)


async def measure(scale: Scale) -> Finding:
    found = Finding(about=ABOUT)
    home = scale.directory("upload")
    large = scale.large_file_bytes
    shapes = {
        f"1 × {large // MIB} MiB": (1, large, 3),
        f"{scale.pick(64, 1000)} × 1 MiB": (scale.pick(64, 1000), MIB, 3),
        f"{scale.pick(600, 20_000):,} × 4 KiB": (scale.pick(600, 20_000), 4096, 3),
    }
    best: dict[str, float] = {}
    sequential: dict[str, float] = {}
    with minio_server(home / "minio") as minio:
        for shape, (file_count, size, rounds) in shapes.items():
            bundles = _Bundles(home / "work", file_count, size)
            samples = await _rounds(bundles, minio, home, rounds)
            total = file_count * size / MIB
            for arm, seconds in samples.items():
                rates = [total / one for one in seconds]
                found.add("upload", "MiB/s", shape, arm, rates, more_is_better=True)
                if file_count > 1:
                    found.add(
                        "files", "files/s", shape, arm, [file_count / one for one in seconds], more_is_better=True
                    )
            fastest = min(samples.keys() & {"client", "client_threads"}, key=lambda arm: median(samples[arm]))
            best[shape] = median(paired(samples[fastest], samples["service"]))
            sequential[shape] = median(paired(samples["client"], samples["service"]))
            shutil.rmtree(home / "work")
    worst = min(best, key=best.__getitem__)
    small = [*shapes][-1]
    found.ratios["upload_vs_client"] = median([*best.values()])
    for name, shape in zip(("large", "medium", "small"), shapes, strict=True):
        found.ratios[f"upload_vs_client_{name}"] = best[shape]
        found.ratios[f"upload_vs_sequential_client_{name}"] = sequential[shape]
    found.targets += [
        Target(name="upload_vs_client", measured=best[worst], bound=0.9, kind="at least", case=worst),
        Target(name="small files vs sequential client", measured=sequential[small], bound=3.0, kind="at least", case=small),
    ]  # fmt: skip
    found.notes.append(
        "upload_vs_client is the median over the shapes, against the client's best way; its target is judged at the worst."
    )
    return found


async def _rounds(bundles: _Bundles, minio: MinioServer, home: Path, rounds: int) -> dict[str, list[float]]:
    s3 = S3ResultStore(minio.access(BUCKET))
    directory = FileResultStore(home / "stored")
    client = Minio(minio.endpoint, access_key=minio.access_key, secret_key=minio.secret_key, secure=False)
    if not client.bucket_exists(BUCKET):
        client.make_bucket(BUCKET)
    samples: dict[str, list[float]] = {}

    def note(arm: str, seconds: float) -> None:
        samples.setdefault(arm, []).append(seconds)

    try:
        for number in range(rounds):
            bundle, collecting = await asyncio.to_thread(bundles.freeze)
            note("collect", collecting)
            arms: list[tuple[str, Callable[[], float]]] = [
                ("client", lambda: _by_client(client, bundles, threads=1)),
                ("hash", lambda: _seconds(bundles.hash)),
                ("copy", lambda: _seconds(lambda: bundles.copy(home / "copied"))),
            ]
            if len(bundles.paths) > 1:
                arms.append(("client_threads", lambda: _by_client(client, bundles, threads=CLIENT_THREADS)))
            if number % 2:
                note("service", await _put(s3, bundle))
            for arm, work in arms:
                note(arm, await asyncio.to_thread(work))
            if not number % 2:
                note("service", await _put(s3, bundle))
            note("directory", await _put(directory, bundle))
            shutil.rmtree(home / "stored")
            shutil.rmtree(home / "copied")
            await asyncio.to_thread(_empty, client)
    finally:
        await s3.close()
        await directory.close()
    return samples


async def _put(store: ResultStore, bundle: ResultBundle) -> float:
    began = time.perf_counter()
    await store.put(bundle)
    return time.perf_counter() - began


def _by_client(client: Minio, bundles: _Bundles, *, threads: int) -> float:
    prefix = f"client-{threads}"

    def send(path: Path) -> None:
        client.fput_object(BUCKET, f"{prefix}/{path.name}", str(path))

    began = time.perf_counter()
    if threads == 1:
        for path in bundles.paths:
            send(path)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(send, bundles.paths))
    return time.perf_counter() - began


def _empty(client: Minio) -> None:
    from minio.deleteobjects import DeleteObject

    keys = [DeleteObject(str(found.object_name)) for found in client.list_objects(BUCKET, recursive=True)]
    for error in client.remove_objects(BUCKET, keys):
        raise RuntimeError(f"{error.name}: {error.message}")


class _Bundles:
    """Result files of one shape, and bundles of them, each of an attempt of its own."""

    def __init__(self, home: Path, file_count: int, size: int) -> None:
        self.home = home
        self._numbers = count(1)
        self.paths = [home / "files" / f"f{number:05d}" for number in range(file_count)]
        (home / "files").mkdir(parents=True)
        for path in self.paths:
            _fill(path, size)
        self._total = file_count * size

    def freeze(self) -> tuple[ResultBundle, float]:
        """A bundle, and how long it took to hash and freeze it."""
        number = next(self._numbers)
        work = self.home / f"attempt-{number}"
        (work / "results").mkdir(parents=True)
        for path in self.paths:
            os.link(path, work / "results" / path.name)
        spec = TaskSpec(
            id=AttemptId("upload", number), image="x", pids_limit=1, fingerprint="x",
            request=Resources(disk_bytes=2 * self._total + MIB),
        )  # fmt: skip
        bundles = Bundles(worker_id="bench", results_dir=self.home / "kept")
        began = time.perf_counter()
        return bundles.collect(spec, work, work / "log"), time.perf_counter() - began

    def hash(self) -> None:
        for path in self.paths:
            with path.open("rb") as stream:
                hashlib.file_digest(stream, "sha256")

    def copy(self, into: Path) -> None:
        into.mkdir()
        for path in self.paths:
            shutil.copyfile(path, into / path.name)
            descriptor = os.open(into / path.name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _fill(path: Path, size: int) -> None:
    with path.open("wb") as stream:
        for piece in _pieces(size):
            stream.write(piece)


def _pieces(size: int) -> Iterator[bytes]:
    block = os.urandom(min(size, 16 * MIB))
    while size > 0:
        yield block[:size]
        size -= len(block)


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
