"""Lines, tables and bars on a terminal: what the ``terminal.py`` of each room prints with. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_EIGHTHS = ("", *"▏▎▍▌▋▊▉")


def stdout() -> Console:
    from rich.console import Console

    return Console()


def say(console: Console, line: str) -> None:
    """Prints a line as it is: it is not wrapped, and nothing in it is markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_lines(lines: Iterable[str], console: Console | None = None) -> None:
    """Prints each line as it is, to stdout by default."""
    console = console or stdout()
    for line in lines:
        say(console, line)


def print_rows(console: Console, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Prints a table on a terminal; elsewhere a line a row, ``name: column cell, …``, without empty cells."""
    if console.is_terminal:
        from rich.table import Table
        from rich.text import Text

        table = Table(*header)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
        return
    for name, *cells in rows:
        named = ", ".join(f"{key} {cell}" for key, cell in zip(header[1:], cells, strict=True) if cell)
        say(console, f"{name.strip()}: {named}")


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns rows of cells as aligned lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def bar(share: float, width: int) -> str:
    """Returns a bar of ``share`` of ``width`` characters, in eighths of a character."""
    whole, eighths = divmod(round(share * width * 8), 8)
    return "█" * whole + _EIGHTHS[eighths]
