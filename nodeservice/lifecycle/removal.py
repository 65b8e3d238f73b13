"""Removes a directory that a task filled, whatever it made there.

A task may nest directories deeper than any recursion, path or table of descriptors reaches. So a tree is taken apart from
its top: a directory that is not empty yields its files, and its subdirectories move up beside it.
"""

from __future__ import annotations

import errno
import os
from itertools import count
from pathlib import Path

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOVED = ".removing-"


def remove_tree(directory: Path) -> None:
    """Blocking. One already gone is success; raises OSError for what cannot be removed. Nobody may write there any more."""
    try:
        top = os.open(directory, _OPEN)
    except FileNotFoundError:
        return
    try:
        _empty(top, top, count())
    finally:
        os.close(top)
    os.rmdir(directory)


def _empty(outermost: int, top: int, numbers: count[int]) -> None:
    while waiting := _clear(top):
        for name in waiting:
            _take_apart(outermost, top, name, numbers)


def _clear(directory: int) -> list[str]:
    """Remove all that is no directory; the names of those that are."""
    directories: list[str] = []
    # A descriptor of a directory on btrfs never shows what came after it was opened or rewound.
    fresh = os.open(".", _OPEN, dir_fd=directory)
    try:
        with os.scandir(fresh) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.name)
                else:
                    os.unlink(entry.name, dir_fd=directory)
    finally:
        os.close(fresh)
    return directories


def _take_apart(outermost: int, top: int, name: str, numbers: count[int]) -> None:
    inner = os.open(name, _OPEN, dir_fd=top)
    is_bound = False
    try:
        for below in _clear(inner):
            try:
                os.rmdir(below, dir_fd=inner)
            except OSError:  # not empty
                moved = any(_moves(below, inner, target, numbers) for target in dict.fromkeys((outermost, top)))
                is_bound = is_bound or not moved
        if is_bound:
            _empty(outermost, inner, numbers)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=top)


def _moves(name: str, source: int, target: int, numbers: count[int]) -> bool:
    """To a name that is free, or that of an empty directory (rename(2)).

    False: it is bound to the subvolume that it is in, which any task on btrfs may make; a subvolume itself is not.
    """
    while True:
        try:
            os.rename(name, f"{_MOVED}{next(numbers)}", src_dir_fd=source, dst_dir_fd=target)
        except OSError as error:
            if error.errno == errno.EXDEV:
                return False
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return True
