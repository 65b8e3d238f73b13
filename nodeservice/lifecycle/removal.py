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
        numbers = count()
        while waiting := _clear(top):
            for name in waiting:
                _take_apart(top, name, numbers)
    finally:
        os.close(top)
    os.rmdir(directory)


def _clear(directory: int) -> list[str]:
    """Remove all that is no directory; the names of those that are."""
    directories: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                directories.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=directory)
    return directories


def _take_apart(top: int, name: str, numbers: count[int]) -> None:
    inner = os.open(name, _OPEN, dir_fd=top)
    try:
        for below in _clear(inner):
            try:
                os.rmdir(below, dir_fd=inner)
            except OSError:  # not empty
                _move(below, inner, top, numbers)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=top)


def _move(name: str, source: int, top: int, numbers: count[int]) -> None:
    """To a name that is free, or that of an empty directory (rename(2))."""
    while True:
        try:
            os.rename(name, f"{_MOVED}{next(numbers)}", src_dir_fd=source, dst_dir_fd=top)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
