"""Standard streams that are closed, full, or that nobody reads any more."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO


def open_missing() -> None:
    """Give a process that was started with closed standard streams (`>&-`) ones that take nothing.

    Otherwise the next file or socket to be opened becomes standard output, and `sys.stdout` is None.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # the lowest free number, hence this one; writing to it fails
    if sys.stdout is None:
        sys.stdout = _stream(1)
    if sys.stderr is None:
        sys.stderr = _stream(2)


def flushed() -> bool:
    """Whether standard output took all that was written to it. What it did not take is dropped."""
    try:
        sys.stdout.flush()
    except OSError:
        to_nowhere(1)
        return False
    finally:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
    return True


def takes_more() -> bool:
    """Whether standard output takes another, empty line: to find out, after an error, whether it was the culprit."""
    try:
        os.write(1, b"\n")
    except OSError:
        return False
    return True


def to_nowhere(number: int) -> None:
    """What is still buffered would fail again when the interpreter ends, which then exits with 120."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def _stream(number: int) -> TextIO:
    return open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
