"""Lines, tables and bars on a terminal: what the ``terminal.py`` of each room prints with. No torch."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_EIGHTHS = ("", *"▏▎▍▌▋▊▉")


# Control characters (escape sequences begin with one), separators of lines, marks that turn the direction of
# writing, and halves of surrogate pairs, as which a file name that is not UTF-8 is read.
_UNSAFE = re.compile("[\0-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def visible(text: str, keep: str = "") -> str:
    """Returns ``text`` with what could act on a terminal as its escape: ``\\x1b``, ``\\u202e``.

    ``keep`` are characters that stay, such as ``"\\n"``. Everything from files, models and arguments that is
    printed goes through here: in the functions below, in ``progress.log``, in the last line of an error, and,
    for what libraries say, in :func:`escape_libraries` and :class:`Escaping`.
    """

    def escaped(found: re.Match[str]) -> str:
        character = found.group()
        if character in keep:
            return character
        code = ord(character)
        return _SHORT.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")

    return _UNSAFE.sub(escaped, text)


def stdout() -> Console:
    from rich.console import Console

    return Console()


def say(console: Console, line: str) -> None:
    """Prints a line that is not wrapped: nothing in it is markup, and control characters are visible."""
    console.print(visible(line), markup=False, highlight=False, emoji=False, soft_wrap=True)


def print_lines(lines: Iterable[str], console: Console | None = None) -> None:
    """Prints each line as it is, to stdout by default."""
    console = console or stdout()
    for line in lines:
        say(console, line)


def print_line(line: str) -> None:
    """Prints one line to stdout."""
    print(visible(line))


def print_text(text: str) -> None:
    """Prints a text of several lines to stdout."""
    print(visible(text, keep="\n\t"))


class Escaping(io.TextIOBase):
    """A stream for what a library prints: all of it goes to ``stream``, with only ends of lines acting."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._stream.write(visible(text, keep="\n\t"))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


class _VisibleRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return visible(super().getMessage(), keep="\n\t")


def escape_libraries() -> None:
    """Makes what any library logs or warns of visible text: it quotes files and models of other people.

    A library that has put its own records around these keeps them.
    """
    if logging.getLogRecordFactory() is logging.LogRecord:
        logging.setLogRecordFactory(_VisibleRecord)
    warnings.formatwarning = _visible_warning


def _visible_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return visible(_format_warning(message, category, filename, lineno, line), keep="\n\t")


_format_warning = warnings.formatwarning


def print_rows(console: Console, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Prints a table on a terminal that is wide enough; elsewhere a line a row, ``name: column cell, …``,
    without empty cells."""
    if console.is_terminal:
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(Text(visible(cell)) for cell in row))
        if shows_whole(console, table, (cell for row in rows for cell in row[1:])):
            console.print(table)
            return
    for name, *cells in rows:
        named = ", ".join(f"{key} {cell}" for key, cell in zip(header[1:], cells, strict=True) if cell)
        say(console, f"{name.strip()}: {named}")


def shows_whole(console: Console, table: Table, cells: Iterable[str]) -> bool:
    """Whether no word of ``cells``, such as a figure, is cut in two or lost on a console of this width."""
    lines = console.render_lines(table)
    shown = "\n".join("".join(segment.text for segment in line) for line in lines)
    return Counter(word for cell in cells for word in visible(cell, keep="\n").split()) <= Counter(
        re.split(r"[\s│┃]+", shown)
    )


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
