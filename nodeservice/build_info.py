"""Which commit this program was made from."""

from __future__ import annotations

import subprocess
from importlib import resources
from pathlib import Path

UNKNOWN = "unknown"
COMMIT_FILE = "commit.txt"
"""In the package, written by the build."""
_ASK_SECONDS = 5.0
_DESCRIBE = ("describe", "--always", "--dirty=-modified", "--abbrev=12", "--exclude=*")


def commit() -> str:
    """As the build noted it; in a checkout what git tells now, with `-modified` for changes that no commit has."""
    noted = resources.files("nodeservice").joinpath(COMMIT_FILE)
    if noted.is_file():
        return noted.read_text(encoding="ascii").strip() or UNKNOWN
    return commit_of(Path(__file__).resolve().parents[1])


def commit_of(checkout: Path) -> str:
    """Unknown where that directory is no checkout, or there is no git."""
    if not (checkout / ".git").exists():
        return UNKNOWN
    try:
        asked = subprocess.run(  # noqa: S603 no outside input
            ["git", "-C", str(checkout), *_DESCRIBE],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=_ASK_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return asked.stdout.strip() or UNKNOWN
