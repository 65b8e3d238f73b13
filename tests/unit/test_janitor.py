"""The node in memory, and what it leaves on its host: images, orphans, old results, half-made files."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from nodeservice.core.model import AttemptId, Outcome, Phase, PullPolicy, Reason, StopCause, StopRequest
from nodeservice.errors import NodeFaultError, RequestError, TransientError
from nodeservice.lifecycle.janitor import Janitor
from nodeservice.lifecycle.orphans import Orphans
from nodeservice.lifecycle.retention import Retention
from nodeservice.lifecycle.steps import create
from nodeservice.ports import ContainerSpec, Room, labels
from nodeservice.results.file import FileResultStore
from nodeservice.results.folder import ResultsFolder
from nodeservice.testing.fake_images import full_name
from nodeservice.testing.fake_runtime import FakeImage, FakeRuntime
from tests.unit.node_harness import ENGINE_ROOT, LiveNode, World, living, spec

T = AttemptId("t")
IMAGES = ("a", "b", "c")
HOUR = timedelta(hours=1)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.runtime.images["demo"] = FakeImage(output=b"hello")
    return world


# ---- images -----------------------------------------------------------------------------------------------------------


class Shelf:
    """An engine's disk of 100 bytes on which each present image takes 30."""

    def __init__(self, world: World, *, images: dict[str, FakeImage] | None = None) -> None:
        world.runtime = FakeRuntime(images=images or {name: FakeImage(is_local=False) for name in IMAGES})
        self.runtime = world.runtime
        self.others_bytes = 0
        world.free_space.rooms[ENGINE_ROOT] = self.room

    def room(self) -> Room:
        used_bytes = self.others_bytes + 30 * len(self.present)
        return Room(used_bytes=used_bytes, free_bytes=100 - used_bytes)

    @property
    def present(self) -> set[str]:
        return {name for name in self.runtime.images if self.runtime.has_image(name)}


async def run(node: LiveNode, image: str, task_id: str | None = None) -> None:
    task = spec(task_id or f"uses-{image}-{len(node.driver.finished())}", image=image)
    await node.assign(task)
    await node.until_finished(task.id)


async def look(node: LiveNode) -> None:
    await node.context.images.make_room(node.driver.live)


async def test_past_the_high_mark_the_least_recently_used_images_go_down_to_the_low_one(world: World) -> None:
    shelf = Shelf(world)
    async with living(world) as node:
        for image in ("a", "b", "c", "a"):
            await run(node, image)
        await look(node)
        assert shelf.present == {"a", "c"}
        await run(node, "b")
        assert shelf.present == {"a", "b", "c"}
        await look(node)
        assert shelf.present == {"a", "b"}


async def test_below_the_high_mark_no_image_goes(world: World) -> None:
    shelf = Shelf(world, images={"a": FakeImage(is_local=False), "b": FakeImage(is_local=False)})
    shelf.others_bytes = 25
    async with living(world) as node:
        await run(node, "a")
        await run(node, "b")
        await look(node)
        assert shelf.present == {"a", "b"}


async def test_an_image_that_was_here_before_or_got_another_name_is_never_removed(world: World) -> None:
    images = {
        "theirs": FakeImage(),
        "named": FakeImage(is_local=False, other_tags=("docker.io/library/precious:1",)),
        "ours": FakeImage(is_local=False),
    }
    shelf = Shelf(world, images=images)
    async with living(world) as node:
        for image in images:
            await run(node, image)
        shelf.others_bytes = 10
        with capture_logs() as logs:
            await look(node)
            await look(node)
        assert shelf.present == {"theirs", "named"}
        (removed,) = [line for line in logs if line["event"] == "image.removed"]
        assert removed["image"] == (full_name("ours"),)
        assert node.tally.removed_image_bytes == removed["size_bytes"] > 0


async def test_an_image_of_a_running_task_stays_however_full_the_disk_is(world: World) -> None:
    shelf = Shelf(world, images={"runs": FakeImage(is_local=False, holds=True), "idle": FakeImage(is_local=False)})
    async with living(world) as node:
        await node.assign(spec("t", image="runs"))
        await node.until(lambda: bool(world.runtime.running))
        await run(node, "idle")
        shelf.others_bytes = 39
        await look(node)
        assert shelf.present == {"runs"}
        world.runtime.finish(world.runtime.running[0])
        await node.until_finished(T)


async def test_an_image_whose_container_is_yet_to_be_made_stays(world: World) -> None:
    shelf = Shelf(world, images={"a": FakeImage(is_local=False)})
    shelf.others_bytes = 60
    async with living(world) as node:
        for _ in range(3):
            world.runtime.fail_next("create", TransientError("away", reason="ENGINE_UNAVAILABLE"))
        await node.assign(spec("t", image="a"))
        await node.until(lambda: node.phase(T) is Phase.CREATING)
        await look(node)
        assert shelf.present == {"a"}
        await node.until_finished(T)
        await look(node)
        assert shelf.present == set()


async def test_what_was_pulled_and_when_it_was_used_outlives_a_restart(world: World) -> None:
    shelf = Shelf(world)
    async with living(world) as node:
        for image in ("a", "b"):
            await run(node, image)
    async with living(world) as node:
        shelf.others_bytes = 40
        await look(node)
        assert shelf.present == {"b"}


async def test_a_note_that_cannot_be_read_leaves_all_images_alone(world: World) -> None:
    shelf = Shelf(world)
    async with living(world) as node:
        await run(node, "a")
    await world.journal.set_note("images", '{"x": 1}')
    async with living(world) as node:
        shelf.others_bytes = 60
        await look(node)
        assert shelf.present == {"a"}


async def test_a_removal_that_the_engine_refuses_or_fails_is_no_error(world: World) -> None:
    shelf = Shelf(world)
    async with living(world) as node:
        await run(node, "a")
        await run(node, "b")
        shelf.others_bytes = 38
        world.runtime.refuse_removal_of(full_name("a"))
        await look(node)
        assert shelf.present == {"a"}
        world.runtime.fail_next("list_images", NodeFaultError("broken", reason="ENGINE_ERROR"))
        janitor = asyncio.create_task(Janitor(node.context, node.driver).run())
        await asyncio.sleep(0.01)
        assert not janitor.done()
        janitor.cancel()


async def test_a_dry_run_says_which_image_would_go_and_leaves_it(world: World) -> None:
    shelf = Shelf(world)
    world.dry_run = True
    async with living(world) as node:
        await run(node, "a")
        shelf.others_bytes = 60
        with capture_logs() as logs:
            await look(node)
        assert shelf.present == {"a"}
        assert [line["image"] for line in logs if line["event"] == "image.would_be_removed"] == [(full_name("a"),)]


async def test_the_look_at_images_is_taken_without_anybody_asking(world: World) -> None:
    shelf = Shelf(world)
    world.sweep_seconds = 0.01
    async with living(world) as node:
        await run(node, "a")
        shelf.others_bytes = 60
        await node.until(lambda: not shelf.present)


# ---- an image that vanishes -------------------------------------------------------------------------------------------


class Thief(FakeRuntime):
    """Somebody removes the image just before each of the next creates."""

    thefts = 0

    async def create(self, wanted: ContainerSpec) -> str:
        if self.thefts:
            self.thefts -= 1
            self.drop_image("demo")
        return await super().create(wanted)


@pytest.mark.parametrize("thefts", [1, 2])
async def test_an_image_removed_between_pull_and_create_is_pulled_again(world: World, thefts: int) -> None:
    world.runtime = Thief(images={"demo": FakeImage(is_local=False)})
    world.runtime.thefts = thefts
    async with living(world) as node:
        await node.assign(spec())
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.outcome is Outcome.SUCCEEDED
    assert world.runtime.pull_counts["demo"] == 1 + thefts


async def test_a_cancel_waits_for_no_second_pull(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create, "_STOP_LOOK_SECONDS", 0.01)
    world.runtime = Thief(images={"demo": FakeImage(pull_holds=True)})
    world.runtime.thefts = 1
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: world.runtime.pull_counts["demo"] == 1)
        await node.driver.request_stop(T, StopRequest(cause=StopCause.CANCELLED, requested_at=node.clock.now()))
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.outcome is Outcome.CANCELLED
    assert world.runtime.specs == []


async def test_an_image_that_vanishes_again_and_again_is_given_up(world: World) -> None:
    world.runtime = Thief(images={"demo": FakeImage(is_local=False)})
    world.runtime.thefts = 1000
    async with living(world) as node:
        await node.assign(spec())
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.reason is Reason.IMAGE_NOT_FOUND
    assert world.runtime.pull_counts["demo"] == 3


async def test_an_image_that_must_not_be_pulled_is_not_pulled_when_it_vanishes(world: World) -> None:
    world.runtime = Thief(images={"demo": FakeImage()})
    world.runtime.thefts = 1
    async with living(world) as node:
        await node.assign(spec(pull_policy=PullPolicy.NEVER))
        record = await node.until_finished(T)
    assert record.verdict is not None
    assert record.verdict.reason is Reason.IMAGE_NOT_FOUND
    assert world.runtime.pull_counts["demo"] == 0


# ---- orphans ----------------------------------------------------------------------------------------------------------


def stray(task_id: str, *, story: str = "not a record") -> ContainerSpec:
    id_ = AttemptId(task_id)
    named = {labels.TASK_ID: task_id, labels.ATTEMPT: "1", labels.SPEC: task_id, labels.RECORD: story}
    return ContainerSpec(
        name=labels.container_name(id_), image="demo", argv=None, shell=None, env=(), labels=named, cpu_milli=1,
        memory_bytes=2**23, pids_limit=1, mounts=(), gpu_uuids=(), log_max_bytes=1, grace_seconds=0,
    )  # fmt: skip


async def strays(world: World, node: LiveNode) -> Path:
    """A container, a work directory and a log of attempts that nobody knows."""
    await asyncio.sleep(0.05)  # what sweeps at the start has swept
    await world.runtime.create(stray("stray"))
    directory = node.dirs.state_dir / "tasks" / "lost.1"
    (directory / "results").mkdir(parents=True)
    (node.dirs.state_dir / "tasks" / "not ours").mkdir()
    node.dirs.log(AttemptId("lost")).parent.mkdir(parents=True, exist_ok=True)
    node.dirs.log(AttemptId("lost")).write_text("old")
    return directory


async def test_what_nobody_claims_goes_when_it_was_seen_twice(world: World) -> None:
    async with living(world) as node:
        await node.assign(spec())
        await node.until_finished(T)
        directory = await strays(world, node)
        orphans = Orphans(node.context, node.driver)
        await orphans.sweep()
        assert directory.exists()
        assert len(await world.runtime.list_owned("node")) == 1
        await orphans.sweep()
        assert not directory.exists()
        assert not node.dirs.log(AttemptId("lost")).exists()
        assert await world.runtime.list_owned("node") == []
        assert (node.dirs.state_dir / "tasks" / "not ours").is_dir()
        assert node.dirs.log(T).exists(), "the log of a remembered attempt stays"


async def test_the_directory_of_a_task_that_still_waits_for_its_image_is_somebodys(world: World) -> None:
    world.runtime = FakeRuntime(images={"demo": FakeImage(is_local=False, pull_holds=True)})
    async with living(world) as node:
        await node.assign(spec())
        await node.until(node.dirs.results(T).is_dir)
        orphans = Orphans(node.context, node.driver)
        for _ in range(3):
            await orphans.sweep()
        assert await world.runtime.list_owned("node") == []
        assert node.dirs.results(T).is_dir()


async def test_two_looks_too_close_to_each_other_do_not_count_as_two(world: World) -> None:
    world.orphan_grace_seconds = 3600
    async with living(world) as node:
        directory = await strays(world, node)
        orphans = Orphans(node.context, node.driver)
        for _ in range(5):
            await orphans.sweep()
        assert directory.exists()


async def test_the_directory_of_a_container_that_nobody_claims_waits_for_its_end(world: World) -> None:
    async with living(world) as node:
        await asyncio.sleep(0.05)  # what sweeps at the start has swept
        await world.runtime.create(stray("stray"))
        node.dirs.prepare(AttemptId("stray"))
        orphans = Orphans(node.context, node.driver)
        await orphans.sweep()
        world.runtime.fail_next("remove", NodeFaultError("no", reason="ENGINE_ERROR"))
        await orphans.sweep()
        assert node.dirs.root(AttemptId("stray")).exists()
        await orphans.sweep()
        for _ in range(2):
            await orphans.sweep()
        assert not node.dirs.root(AttemptId("stray")).exists()


async def test_a_dry_run_removes_no_orphan(world: World) -> None:
    world.dry_run = True
    async with living(world) as node:
        directory = await strays(world, node)
        orphans = Orphans(node.context, node.driver)
        with capture_logs() as logs:
            for _ in range(3):
                await orphans.sweep()
        assert directory.exists()
        kinds = {line["kind"] for line in logs if line["event"] == "orphan.would_be_removed"}
        assert kinds == {"container", "directory", "log"}


async def test_sweeping_without_a_pause_harms_no_task(world: World) -> None:
    world.sweep_seconds = 0.001
    async with living(world) as node:
        tasks = [spec(f"t{number}") for number in range(20)]
        for task in tasks:
            await node.until(lambda: len(node.driver.live()) < 4)
            await node.assign(task)
        for task in tasks:
            record = await node.until_finished(task.id)
            assert record.verdict is not None
            assert record.verdict.outcome is Outcome.SUCCEEDED
    assert len(world.uplink.reports) == 20


# ---- results ----------------------------------------------------------------------------------------------------------


def age(path: Path, seconds: float) -> None:
    at = datetime.now(UTC).timestamp() - seconds
    os.utime(path, (at, at), follow_symlinks=False)


def old_results(root: Path, task_id: str, attempt: int = 1, *, manifest_of: str | None = None) -> Path:
    directory = root / task_id / str(attempt)
    (directory / "deep").mkdir(parents=True)
    (directory / "deep" / "file").write_text("x")
    document = {"version": 1, "task_id": manifest_of or task_id, "attempt": attempt, "files": [], "skipped": []}
    (directory / "manifest.json").write_text(json.dumps(document))
    age(directory / "manifest.json", 7200)
    return directory


async def test_results_older_than_the_policy_go_and_all_else_stays(world: World, tmp_path: Path) -> None:
    world.keeps_in_the_store = True
    world.results_retention_seconds = 3600
    root = tmp_path / "results"
    old = old_results(root, "old")
    moved = root / "moved" / "2"
    moved.mkdir(parents=True)
    (moved / "MOVED").write_text("s3://there\n")
    age(moved / "MOVED", 7200)
    elsewhere = tmp_path / "elsewhere"
    old_results(elsewhere, "linked")
    kept = [
        old_results(root, "young"),
        old_results(root, "foreign", manifest_of="another"),
        root / "no-number" / "notes",
        root / "bare" / "1",
        root / "moved-and-more" / "1",
    ]
    age(kept[0] / "manifest.json", 60)
    for directory in kept[2:]:
        directory.mkdir(parents=True)
        (directory / "file").write_text("x")
        age(directory / "file", 7200)
    (kept[4] / "MOVED").write_text("s3://there\n")
    age(kept[4] / "MOVED", 7200)
    (root / "linked").symlink_to(elsewhere / "linked")
    (root / "link-inside").mkdir()
    (root / "link-inside" / "1").symlink_to(elsewhere / "linked" / "1")
    async with living(world) as node:
        await node.until(lambda: not (old.parent.exists() or moved.exists()))
    assert [directory for directory in kept if not directory.exists()] == []
    assert (elsewhere / "linked" / "1" / "deep" / "file").exists()


@pytest.mark.parametrize("keep_seconds", [None, 3600.0])
async def test_age_is_what_passed_whoever_set_the_clock_and_nothing_goes_without_a_policy(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_seconds: float | None
) -> None:
    world.keeps_in_the_store = True
    world.results_retention_seconds = world.salvage_retention_seconds = keep_seconds
    directories = [old_results(tmp_path / "results", "t"), tmp_path / "state" / "salvage" / "t.1"]
    age(directories[0] / "manifest.json", 60)
    directories[1].mkdir(parents=True)
    async with living(world) as node:
        retention = Retention(node.context, node.driver)
        now, elapsed = node.clock.now, node.clock.elapsed
        monkeypatch.setattr(node.clock, "now", lambda: now() + 2 * HOUR)
        await retention.sweep()
        assert [directory.exists() for directory in directories] == [True, True]
        monkeypatch.setattr(node.clock, "elapsed", lambda: elapsed() + 2 * HOUR.total_seconds())
        for dry_run in (True, False):
            object.__setattr__(node.context.settings, "janitor_dry_run", dry_run)
            await retention.sweep()
            assert [directory.exists() for directory in directories] == [dry_run or keep_seconds is None] * 2
        monkeypatch.undo()


async def test_results_of_an_attempt_that_is_not_finished_are_never_old(world: World, tmp_path: Path) -> None:
    world.keeps_in_the_store = True
    world.results_retention_seconds = 3600
    world.sweep_seconds = 0.01
    world.uplink.down = True
    stored = old_results(tmp_path / "results", "t")
    async with living(world) as node:
        await node.assign(spec())
        await node.until(lambda: node.phase(T) is Phase.REPORTING)
        await asyncio.sleep(0.05)
        assert stored.exists()
        world.uplink.down = False
        await node.until(lambda: not stored.exists())


async def test_beside_another_store_only_pointers_grow_old(world: World, tmp_path: Path) -> None:
    world.results_retention_seconds = 3600
    kept = old_results(tmp_path / "results", "kept-for-good")
    moved = tmp_path / "results" / "moved" / "1"
    moved.mkdir(parents=True)
    (moved / "MOVED").write_text("s3://there\n")
    age(moved / "MOVED", 7200)
    async with living(world) as node:
        await node.until(lambda: not moved.exists())
    assert kept.exists()


async def test_salvage_goes_by_its_own_policy_and_links_are_not_followed(world: World, tmp_path: Path) -> None:
    world.salvage_retention_seconds = 0.05
    salvaged = tmp_path / "state" / "salvage" / "t.1"
    salvaged.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    (salvaged / "link").symlink_to(outside)
    (tmp_path / "state" / "salvage" / "x.1").symlink_to(outside)
    world.sweep_seconds = 0.02
    async with living(world) as node:
        await node.until(lambda: not salvaged.exists())
    assert (outside / "file").exists()
    assert (tmp_path / "state" / "salvage" / "x.1").is_symlink()


async def test_half_made_results_of_a_finished_attempt_go_and_those_of_others_stay(
    world: World, tmp_path: Path
) -> None:
    root = tmp_path / "results"
    ours, removed = root / "t" / ".1.0a1b2c3d.partial", root / "t" / ".1.0a1b2c3d.removed"
    anothers = root / "of-another-node" / ".1.0a1b2c3d.partial"
    for directory in (ours, removed, anothers):
        directory.mkdir(parents=True)
        (directory / "piece").write_text("x")
    async with living(world) as node:
        await node.assign(spec())
        await node.until_finished(T)
        await node.driver.settled()
    async with living(world) as node:
        await node.until(lambda: not ours.exists() and not removed.exists())
    assert anothers.exists()


async def test_a_store_is_told_once_of_results_that_will_never_reach_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> int:
        raise TransientError("away", reason="STORE_UNREACHABLE")

    world.store.fail_next(1, RequestError("too large", reason="RESULT_TOO_LARGE"))
    kept = FileResultStore(world.path / "results")
    world.kept = kept  # type: ignore[assignment]
    async with living(world) as node:
        await node.assign(spec())
        await node.until_finished(T)
        await node.assign(spec("stored"))
        await node.until_finished(AttemptId("stored"))
        retention = Retention(node.context, node.driver)
        with monkeypatch.context() as patch:
            patch.setattr(world.store, "drop_leftovers", away)
            await retention.sweep()
        for dry_run, dropped in ((True, []), (False, [T]), (False, [T])):
            object.__setattr__(node.context.settings, "janitor_dry_run", dry_run)
            await retention.sweep()
            assert world.store.dropped == dropped
    await kept.close()


def test_a_removal_that_was_cut_off_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_results(tmp_path, "t")
    folder = ResultsFolder(tmp_path)
    before = datetime.now(UTC) - timedelta(hours=1)
    assert folder.stored_before(before) == [T]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda _path: (_ for _ in ()).throw(OSError("cut off")))
        with pytest.raises(OSError, match="cut off"):
            folder.remove(T)
    assert folder.stored_before(before) == []
    [(id_, path)] = folder.leftovers()
    assert id_ == T
    folder.remove_leftover(path)
    folder.remove(T)
    assert list(tmp_path.iterdir()) == []
