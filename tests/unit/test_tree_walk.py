"""What a walk finds, and what it can't be led to, in trees of a hostile making."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nodeservice.lifecycle.removal import remove_tree
from nodeservice.limits import tree_walk
from nodeservice.limits.tree_walk import walk

DEEP = 2_000
"""Past PATH_MAX (with names of 10 bytes), the recursion limit and the usual table of descriptors."""


def nest(place: Path, depth: int, *, leaf: str = "leaf") -> None:
    """Directories in one another, and a file in the last."""
    descriptor = os.open(place, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 10, dir_fd=descriptor)
        inner = os.open("d" * 10, os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = inner
    os.close(os.open(leaf, os.O_CREAT | os.O_WRONLY, dir_fd=descriptor))
    os.close(descriptor)


def open_files(below: Path) -> int:
    """Of this process in that directory: threads that other tests left may open and close some elsewhere."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{number}").startswith(str(below))
        except OSError as error:  # closed meanwhile, or deeper than the kernel can tell
            count += error.errno == errno.ENAMETOOLONG
    return count


def test_a_walk_comes_to_the_bottom_of_any_depth_with_few_descriptors(tmp_path: Path) -> None:
    nest(tmp_path, DEEP)
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/file").touch()
    before, most, names = open_files(tmp_path), 0, []
    for entry in walk(tmp_path):
        most = max(most, open_files(tmp_path) - before)
        names.append(entry.name)
    assert sorted(set(names)) == ["beside", "d" * 10, "file", "leaf"]
    assert len(names) == DEEP + 3
    assert most < 64
    assert open_files(tmp_path) == before
    remove_tree(tmp_path)


def test_a_walk_follows_no_link_and_can_be_left_early(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").touch()
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    nest(inside, 3)
    before = open_files(tmp_path)
    assert {entry.name for entry in walk(inside)} == {"link", "d" * 10, "leaf"}
    cut = walk(inside)
    next(cut)
    cut.close()
    assert open_files(tmp_path) == before
    assert list(walk(inside / "link")) == []


def test_a_directory_that_is_moved_during_the_walk_does_not_lead_it_astray(tmp_path: Path) -> None:
    tree, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    tree.mkdir()
    elsewhere.mkdir()
    (elsewhere / "foreign").touch()
    nest(tree, 100)
    for n in range(3):
        (tree / f"more{n}").mkdir()
        (tree / f"more{n}/file").touch()
    names = []
    for entry in walk(tree):
        names.append(entry.name)
        if entry.name == "leaf":  # the way back up from here leads out of the tree now
            deep = tree.joinpath(*["d" * 10] * 60)
            deep.rename(elsewhere / "moved")
    assert "foreign" not in names
    assert {f"more{n}" for n in range(3)} <= set(names)


def test_removal_takes_any_tree_apart(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    nest(tree, DEEP)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (tree / "link").symlink_to(kept)
    os.mkfifo(tree / "pipe")
    for name in (".removing-0", ".removing-1", "a/b/c"):  # names that removal uses itself
        (tree / name).mkdir(parents=True)
        (tree / name / "file").touch()
    (tree / ".removing-2").mkdir()
    before = open_files(tmp_path)
    remove_tree(tree)
    remove_tree(tree)
    assert not tree.exists()
    assert (kept / "file").exists()
    assert open_files(tmp_path) == before


def test_removal_takes_apart_subvolumes_of_btrfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a descriptor shows what was there when it was opened, and only a subvolume leaves the one that it is in."""
    tree = tmp_path / "tree"
    subvolumes = set()
    for below in ("", "s/d/e/", "s/d/e/s/d/e/"):
        (tree / below / "s/d/e").mkdir(parents=True)
        (tree / below / "s/d/e/file").touch()
        subvolumes.add((tree / below / "s").stat().st_ino)
    open_, scandir, rename = os.open, os.scandir, os.rename
    shown: dict[int, list[str]] = {}

    def opening(path: str, flags: int, *, dir_fd: int | None = None) -> int:
        fd = open_(path, flags, dir_fd=dir_fd)
        shown[fd] = os.listdir(fd)
        return fd

    @contextlib.contextmanager
    def listing(fd: int) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scandir(fd) as entries:
            yield (entry for entry in entries if entry.name in shown[fd])

    def holder(fd: int) -> int:
        place = Path(os.readlink(f"/proc/self/fd/{fd}"))
        return next((number for up in (place, *place.parents) if (number := up.stat().st_ino) in subvolumes), 0)

    def renaming(name: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        is_free = os.stat(name, dir_fd=src_dir_fd).st_ino in subvolumes
        if not is_free and holder(src_dir_fd) != holder(dst_dir_fd):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(name, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    before = open_files(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", opening)
        patched.setattr(os, "scandir", listing)
        patched.setattr(os, "rename", renaming)
        remove_tree(tree)
    assert not tree.exists()
    assert open_files(tmp_path) == before


def test_a_walk_enters_subvolumes_of_btrfs_and_no_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have a device number of their own; any task may make the former, to hide there what it writes."""
    for name in ("sub", "mounted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"file of {name}").touch()

    def disguised(status: os.stat_result, path: str) -> os.stat_result:
        device = next(
            (number for number, name in enumerate(("sub", "mounted"), 1) if f"/{name}" in path), status.st_dev
        )
        return os.stat_result((*status[:2], device, *status[3:]))

    class Found:
        def __init__(self, entry: os.DirEntry[str], directory: str) -> None:
            self.name = entry.name
            self._seen = disguised(entry.stat(follow_symlinks=False), f"{directory}/{entry.name}")

        def stat(self, *, follow_symlinks: bool) -> os.stat_result:
            return self._seen

    def place(fd: int) -> str:
        return os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(tmp_path))

    fstat, scandir = os.fstat, os.scandir

    @contextlib.contextmanager
    def listing(fd: int) -> Iterator[list[Found]]:
        with scandir(fd) as entries:
            yield [Found(entry, place(fd)) for entry in entries]

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", lambda fd: disguised(fstat(fd), place(fd)))
        patched.setattr(os, "scandir", listing)
        patched.setattr(tree_walk, "_mount_of", lambda level: place(level.descriptor).replace("/sub", ""))
        assert [entry.name for entry in walk(tmp_path)] == [".", "file of sub"]
