"""Tables for people, and what stands in their cells: amounts, states, and texts from elsewhere, which may be hostile."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_COLORS = {
    "SUCCEEDED": "green",
    "FAILED": "red",
    "REJECTED": "red",
    "CANCELLED": "yellow",
    "LOST": "yellow",
    "RUNNING": "cyan",
    "ACTIVE": "green",
    "INACTIVE": "red",
    "WELL": "green",
    "SUSPECT": "yellow",
    "FAULTY": "red",
}
_NUMBERS = frozenset({"SECONDS", "LOAD", "PEAK", "MEMORY", "ENERGY", "THROTTLED", "USED", "TEMP"})
"""Columns that are read from the right."""


def table(*columns: str, header: bool = True, title: str = "") -> Table:
    """The first column is never folded: it names the row."""
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(
        box=SIMPLE if header else None,
        show_header=header,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=title or None,
        title_justify="left",
        title_style="bold",
    )
    for index, column in enumerate(columns):
        made.add_column(column, overflow="fold", no_wrap=index == 0, justify="right" if column in _NUMBERS else "left")
    return made


def printable(value: object) -> str:
    """Words without control characters."""
    words = "" if value is None else str(value)
    return "".join(character if character.isprintable() else "�" for character in words)


def text(value: object) -> str:
    """Likewise, and nothing in it is read as markup."""
    from rich.markup import escape

    return escape(printable(value))


def state(word: str | None) -> str:
    color = _COLORS.get(word or "")
    return f"[{color}]{word}[/]" if color else text(word)


def color_of(word: str | None) -> str:
    return _COLORS.get(word or "", "")


def bytes_ratio(part: int, whole: int) -> str:
    """`0.5/22.4 GiB`: both in the unit of the whole."""
    amount, unit = bytes_text(whole).split()
    factor = whole / float(amount) if whole else 1.0
    return f"{part / factor:.3g}/{amount} {unit}"


def bytes_text(count: int) -> str:
    """`64 MiB`, `1.5 GiB`."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(amount) < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.4g} {unit}"
