"""Results on a terminal: tables there, one plain line a row elsewhere. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from video_opd.evaluation.best_constant import ConstantPrediction
from video_opd.evaluation.bootstrap import Interval95
from video_opd.evaluation.comparison_formats import Row, Table, as_text, average_lines
from video_opd.evaluation.metrics import Difference, Metrics
from video_opd.evaluation.notes import (
    count_notes,
    deviation_lines,
    interval_text,
    protocol_line,
    rule_notes,
    swap_note,
)
from video_opd.evaluation.query_swap import QuerySwap
from video_opd.evaluation.rows import METRICS
from video_opd.terminal import print_lines, print_rows, say, shows_whole, stdout, visible

if TYPE_CHECKING:
    from rich.console import Console


def print_metrics(
    results: Mapping[str, Metrics],
    *,
    constant: ConstantPrediction | None = None,
    swaps: Mapping[str, QuerySwap | None] | None = None,
    differences: Mapping[str, Difference] | None = None,
    intervals: bool = True,
    console: Console | None = None,
) -> None:
    """Prints each result by its name (its sources below it), then the controls, to stdout by default.

    ``differences`` is the rise from the first result to the last. ``intervals`` says whether those of the
    metrics and of the rise are shown.
    """
    console = console or stdout()

    def figure(value: str, interval: Interval95, sign: str = "") -> str:
        return f"{value} {interval_text(interval, sign) if intervals else ''}".strip()

    def metrics_row(name: str, metrics: Metrics) -> tuple[str, ...]:
        cells = [figure(f"{metrics.values[key]:.1f}", metrics.ci95[key]) for key in METRICS]
        return (name, *cells, str(metrics.n), ", ".join(count_notes(metrics)))

    rows: list[tuple[str, ...]] = []
    for name, metrics in results.items():
        rows.append(metrics_row(name, metrics))
        rows += [metrics_row(f"  {source}", part) for source, part in (metrics.by_source or {}).items()]
    if differences is not None:
        rises = ((f"{differences[name].value:+.1f}", differences[name].ci95) for name in METRICS)
        rows.append(("rise", *(figure(value, interval, "+") for value, interval in rises), "", ""))
    if constant is not None:
        where = f"best constant ({constant.start_fraction:.0%} to {constant.end_fraction:.0%})"
        rows.append((where, *(f"{constant.values[name]:.1f}" for name in METRICS), str(constant.n), ""))
    print_rows(console, ("", *METRICS, "rows", "notes"), rows)
    for name, swap in (swaps or {}).items():
        if swap is not None:
            say(
                console,
                f"{name}: {swap_note(swap)}, the same answer to both queries {swap.same_answer:.1f}%, "
                f"{swap.comparisons} comparisons",
            )
    protocols = {name: m.protocol for name, m in results.items() if m.protocol is not None}
    print_lines((f"{name}: {note}" for name, m in results.items() for note in rule_notes(m)), console)
    print_lines(dict.fromkeys(map(protocol_line, protocols.values())), console)
    print_lines((f"{name}: {line}" for name, p in protocols.items() for line in deviation_lines(p)), console)


def print_table(table: Table, console: Console) -> None:
    """Prints a table on a terminal, one a data set if one for all is too wide; plain lines if these are too
    wide as well, and elsewhere."""
    parts = _parts(table, console) if console.is_terminal else []
    if not parts:
        print_lines(as_text(table).removesuffix("\n").split("\n"), console)
        return
    for part in parts:
        console.print(part)
    if table.averages:
        print_lines(average_lines(table), console)
    print_lines(table.notes, console)


def _parts(table: Table, console: Console) -> list[Any]:
    """The tables that show everything on this console; none if it is too narrow for them."""
    whole = _rich_table(table, table.data_sets)
    options = console.options.update(max_width=10_000)  # how wide it would like to be
    if console.measure(whole, options=options).maximum <= console.width:
        return [whole]
    parts = {name: _rich_table(table, (name,)) for name in table.data_sets}
    for name, part in parts.items():
        rows = [*(row for row in table.measured if name in row.cells), *table.published]
        if not shows_whole(console, part, (cell for row in rows for cell in _cells(row, (name,)))):
            return []
    return list(parts.values())


def _rich_table(table: Table, data_sets: Sequence[str]) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text

    alone = len(data_sets) == 1
    shown = RichTable(
        title=Text(visible(data_sets[0])) if alone else None,
        caption=table.published_title if table.published else None,
    )
    shown.add_column("", overflow="fold")
    for name in data_sets:
        for metric in METRICS:
            above = visible(name) if metric == METRICS[0] else ""
            heading = Text(metric if alone else f"{above}\n{metric}")
            shown.add_column(heading, justify="right", overflow="fold")
    for row in table.measured:
        if any(name in row.cells for name in data_sets):
            shown.add_row(Text(visible(row.name)), *_rich_cells(row, data_sets))
    if table.published:
        shown.add_section()
        for row in table.published:
            shown.add_row(Text(row.name), *_rich_cells(row, data_sets))
    return shown


def _rich_cells(row: Row, data_sets: Sequence[str]) -> list[Any]:
    from rich.text import Text

    return [Text(cell) for cell in _cells(row, data_sets)]


def _cells(row: Row, data_sets: Sequence[str]) -> list[str]:
    """A figure, with its interval below it."""
    return [
        "\n".join(filter(None, (cell.value, cell.interval)))
        for name in data_sets
        for cell in row.figures(name)
    ]
