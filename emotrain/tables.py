"""The one table: for a terminal, for a plain stream, for Markdown. (For HTML: the template of
`emotrain.report`.) And the one CSV, and short names."""

from __future__ import annotations

import csv
import io
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Table:
    """Rows of text under a header. Names and notes are aligned to the left, numbers between them
    to the right. Cells are plain text, never markup."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1
    """How many first columns hold names."""
    notes: int = 0
    """How many last columns hold notes."""

    def text(self) -> str:
        """For stdout: a drawn table where it is a terminal that is wide enough, else plain
        columns."""
        if not sys.stdout.isatty():
            return self.plain()
        from rich.console import Console

        console = Console()
        unbounded = console.options.update(width=10_000)
        if console.measure(self.rich(), options=unbounded).minimum > console.width:
            return self.plain()  # rich would cut columns off
        with console.capture() as capture:
            console.print(self.rich())
        return capture.get().rstrip()

    def plain(self) -> str:
        """Columns with two spaces between them, below the title, which is folded at 100."""
        lines = [tuple(map(_on_one_line, row)) for row in (self.header, *self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        columns = [
            "  ".join(
                cell.ljust(width) if self.is_text(i) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*textwrap.wrap(self.title, 100), *columns])

    def markdown(self) -> str:
        lines = [
            self.header,
            tuple(":--" if self.is_text(i) else "--:" for i in range(len(self.header))),
            *self.rows,
        ]
        cells = (
            " | ".join(_on_one_line(cell).replace("|", "\\|") for cell in line) for line in lines
        )
        return "\n".join([f"**{self.title}**", "", *(f"| {line} |" for line in cells), ""])

    def rich(self) -> rich.table.Table:
        from rich import box
        from rich.cells import cell_len
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=Text(self.title) if self.title else None,
            box=box.SIMPLE,
            title_justify="left",
            pad_edge=False,
            collapse_padding=True,
        )
        for index, (name, *cells) in enumerate(zip(self.header, *self.rows, strict=True)):
            # Cells and the words of the header stay whole, so that a narrow terminal folds headers
            # and loses no name. Notes fold.
            whole = index < len(self.header) - self.notes
            width = max(map(cell_len, [*name.split(), *cells]), default=0) if whole else None
            table.add_column(
                Text(name), justify="left" if self.is_text(index) else "right", min_width=width
            )
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def is_text(self, column: int) -> bool:
        """Whether a column holds names or notes, and no numbers."""
        return column < self.names or column >= len(self.header) - self.notes


def _on_one_line(cell: str) -> str:
    return cell if cell.isprintable() else " ".join(cell.split())


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated values with a header; None is an empty cell. Text that a spreadsheet would
    take for a formula has an apostrophe before it; numbers stay as they are."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([_no_formula(cell) for cell in row] for row in (header, *rows))
    return stream.getvalue()


def _no_formula(cell: Any) -> Any:
    """OWASP, "CSV Injection": names of domains and tasks are anybody's."""
    if not isinstance(cell, str):
        return cell
    # A carriage return alone is not quoted by the csv module, and ends a line for its reader.
    plain = cell.replace("\r", "\n")
    if not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return plain
    try:
        float(cell)
    except ValueError:
        return f"'{plain}"
    return cell


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """What tables call paths: the last parts of each, as few as tell it from the others; of JSON
    without the ending, where that leaves them apart."""
    resolved = [Path(path).resolve() for path in paths]
    labels = []
    for path in resolved:
        others = [other for other in resolved if other != path]
        length = 1
        while length < len(path.parts) and any(
            other.parts[-length:] == path.parts[-length:] for other in others
        ):
            length += 1
        labels.append("/".join(path.parts[-length:]))
    shorter = [label.removesuffix(".json") for label in labels]
    return shorter if len(set(shorter)) == len(set(labels)) else labels
