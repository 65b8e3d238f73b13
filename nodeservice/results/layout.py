"""Where a collected file is stored, and where it lies in the attempt's work directory.

The work directory holds `results/` (mounted into the container), `stdout.log` (written by the node) and, once collected,
`manifest.json`. The stored tree has `stdout.log` and `manifest.json` at its top, and `MOVED` once it was kept on this host
and is elsewhere now. So a task's own entries of these names, and of the name `_task` itself, move below `_task/`. The
mapping is one to one: two files never meet.
"""

from __future__ import annotations

import re
from pathlib import Path

RESULTS_DIR = "results"
LOG_NAME = "stdout.log"
MANIFEST_NAME = "manifest.json"
TASK_DIR = "_task"
MOVED_NAME = "MOVED"
"""What stays of a kept directory once the store has taken it: a file with the new location."""

_RESERVED = frozenset({LOG_NAME, MANIFEST_NAME, MOVED_NAME, TASK_DIR})

MAX_PATH_BYTES = 700
"""Longest stored path in UTF-8. An S3 key has at most 1,024 bytes, prefix and task id included (Amazon S3 user guide)."""


MAX_ENTRY_COUNT = 100_000
"""Files, directories and all else in the results of one attempt. Each costs this service memory (1.6 KB, measured) and the
store a request, and a task may make as many as its disk limit has blocks."""

MAX_NAMES_LENGTH = 16 * 1024**2
"""Of all their paths together, written in ASCII: what costs memory with long names, most of all with some outside of it."""


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def is_reserved(path: str) -> bool:
    """True for a task's path whose first component is a name that the stored tree needs for itself."""
    return path.split("/", 1)[0] in _RESERVED


def stored_path(path: str) -> str:
    """The stored path of a task's own file, given relative to the results directory."""
    return f"{TASK_DIR}/{path}" if is_reserved(path) else path


def source_path(work_dir: Path, stored: str) -> Path:
    """Where the file with this stored path lies in the work directory; the inverse of `stored_path`."""
    if stored == LOG_NAME:
        return work_dir / LOG_NAME
    return work_dir / RESULTS_DIR / stored.removeprefix(f"{TASK_DIR}/")


def path_fault(path: str) -> str | None:
    """Why this relative path must not be stored, or None. Stored names are text, so control characters are refused."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "the name is not valid UTF-8"
    if _CONTROL.search(path):
        return "the name contains control characters"
    if "\ufffe" in path or "\uffff" in path:
        return "the name contains a character that XML, and so S3, cannot carry"
    if len(encoded) > MAX_PATH_BYTES:
        return f"the path is longer than {MAX_PATH_BYTES} bytes"
    if not path or any(part in ("", ".", "..") for part in path.split("/")):
        return "the path is empty, absolute or has a dot component"
    return None


def refused_name(path: str) -> str | None:
    """Why a store would refuse this path though nothing is wrong with it, and all of the attempt's results with it."""
    # MinIO takes back slashes for slashes, and strips spaces, to find dot components (its `hasBadPathComponent`).
    if any(part.strip(" ") in (".", "..") for part in path.replace("\\", "/").split("/")):
        return "stores take a part of the name for a dot component"
    return None


def printable(path: str) -> str:
    """The path for a list that people read: undecodable bytes and control characters escaped, cut to a bound."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return text if len(text) <= MAX_PATH_BYTES else text[:MAX_PATH_BYTES] + "…"
