"""Pages to read: text and tables, as markdown in a file and with rich on a terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """head: column names; rows: the same number of cells each. Cells after the first are aligned right."""

    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table in markdown."""
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# paragraphs (markdown) and tables, in reading order
Page = list["str | Table"]


def markdown(page: Page | str) -> str:
    """The page as the text of a README.md."""
    if isinstance(page, str):
        return page
    return "\n\n".join(part.markdown() if isinstance(part, Table) else part for part in page) + "\n"


def show(page: Page | str) -> None:
    """Prints the page: rich tables on a terminal where rich is installed, markdown otherwise."""
    console = _console() if sys.stdout.isatty() else None
    if console is None or isinstance(page, str):
        print(markdown(page))
        return
    from rich.markdown import Markdown
    from rich.table import Table as RichTable

    for part in page:
        if isinstance(part, str):
            console.print(Markdown(part))
            continue
        table = RichTable()
        for i, name in enumerate(part.head):
            table.add_column(name, justify="right" if i else "left")
        for row in part.rows:
            table.add_row(*(cell.replace("**", "").replace("`", "") for cell in row))
        console.print(table)


def _console():
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console()
