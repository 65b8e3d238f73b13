"""Tables that fit a terminal: where it is narrow, columns are left out, the least important first, and no word is broken."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nodeservice.cli.cells import table

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

_PIPE_COLUMNS = 10_000
_TEXT_COLUMNS = 20
"""A column of text has room for so much, or for all of it, before another column is left out for it."""


def console() -> Console:
    """For standard output. A pipe has no width: what reads it gets each row in one line, and nothing is cut or left out."""
    from rich.console import Console

    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=_PIPE_COLUMNS)


@dataclass
class FittedTable:
    """`text` names the one column that may go over several lines; `spare` those that may be missing, in that order."""

    columns: Sequence[str]
    text: str
    spare: Sequence[str]
    title: str = ""
    rows: list[Sequence[str]] = field(default_factory=list)

    def add_row(self, *cells: str) -> None:
        """Cells as rich's markup."""
        self.rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        from rich.measure import Measurement
        from rich.text import Text

        texts = [Text.from_markup(row[self.columns.index(self.text)]).cell_len for row in self.rows]
        shrinks = max(0, max([len(self.text), *texts]) - _TEXT_COLUMNS)

        def fits(names: Sequence[str]) -> bool:
            wanted = Measurement.get(console, options.update(max_width=_PIPE_COLUMNS), self._table(names)).maximum
            return wanted - (shrinks if self.text in names else 0) <= options.max_width

        left_out: list[str] = []
        for name in self.spare:
            if fits(self._but(left_out)):
                break
            left_out.append(name)
        for name in reversed(left_out[:-1]):  # a narrow one may have gone before a wide one that was too much
            others = [other for other in left_out if other != name]
            if fits(self._but(others)):
                left_out = others
        made = self._table(self._but(left_out))
        if not fits(self._but(left_out)):  # nothing is left to leave out: the name of the row goes over several lines
            made.columns[0].no_wrap = False
        yield made

    def _but(self, left_out: Sequence[str]) -> list[str]:
        return [name for name in self.columns if name not in left_out]

    def _table(self, shown: Sequence[str]) -> Table:
        made = table(*shown, title=self.title)
        for column in made.columns:
            column.no_wrap = column.header != self.text
        places = [self.columns.index(name) for name in shown]
        for row in self.rows:
            made.add_row(*(row[place] for place in places))
        return made
