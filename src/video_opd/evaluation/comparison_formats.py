"""A comparison as a table: models × (R@0.3, R@0.5, R@0.7, mIoU) of each data set, as in the paper's table 1.

One :class:`Table` of plain cells, and a writer for each format of a file: plain lines, Markdown, LaTeX.
The rows that were measured and those that were published stand in sections of their own, and every published
name has a dagger. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from video_opd.errors import UserError
from video_opd.evaluation.comparison import Comparison, Result
from video_opd.evaluation.metrics import Difference, Metrics
from video_opd.evaluation.notes import (
    count_notes,
    deviation_lines,
    interval_text,
    protocol_line,
    rule_notes,
    swap_note,
)
from video_opd.evaluation.published import (
    AVERAGE_RECALL,
    AVERAGE_RECALL_IS,
    average_recall,
    published,
    published_columns,
)
from video_opd.evaluation.rows import METRICS
from video_opd.terminal import visible

SUFFIXES = {".md": "markdown", ".tex": "latex", ".json": "json", ".txt": "text"}
DAGGER = "†"
NONE = "–"
_AVERAGE_KEY = AVERAGE_RECALL.replace(" ", "_")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure, and its interval where it has one."""

    value: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".strip()


@dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    cells: Mapping[str, tuple[Cell, ...]]  # data set -> a cell for each of METRICS

    def figures(self, data_set: str) -> tuple[Cell, ...]:
        """Returns the cells of a data set, dashes if the row has none."""
        return self.cells.get(data_set, (Cell(value=NONE),) * len(METRICS))


@dataclass(frozen=True, kw_only=True)
class Average:
    """A model's average recall; ``source`` says where a published one is from, and "measured" of another."""

    name: str
    value: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """``measured`` are rows of this evaluation, ``published`` those of the paper; ``notes`` stand below.

    ``averages`` have a section of their own, because an average recall is another number than an mIoU.
    """

    data_sets: tuple[str, ...]
    measured: tuple[Row, ...]
    published: tuple[Row, ...]
    notes: tuple[str, ...]
    averages: tuple[Average, ...] = ()

    @property
    def published_title(self) -> str:
        return f"{DAGGER} published in {published().source}; not measured here"

    @property
    def averages_title(self) -> str:
        return f"{AVERAGE_RECALL}: {AVERAGE_RECALL_IS}; {DAGGER} not measured here"


def make_table(comparison: Comparison, *, with_published: bool = False, intervals: bool = True) -> Table:
    """Makes the cells.

    Raises :class:`UserError` if ``with_published`` finds none of the data sets that the paper reports.
    """
    rows: list[Row] = []
    for model, results in comparison.results.items():
        rows.append(Row(name=model, cells={n: _figures(r.metrics, intervals) for n, r in results.items()}))
        rises = {n: r.difference for n, r in results.items() if r.difference is not None}
        if rises:
            name = f"{model} − {comparison.baseline}"
            rows.append(Row(name=name, cells={n: _rise(rise, intervals) for n, rise in rises.items()}))
    constants = {n: c for n, c in comparison.constants.items() if c is not None}
    if constants:
        cells = {n: tuple(Cell(value=f"{c.values[m]:.1f}") for m in METRICS) for n, c in constants.items()}
        rows.append(Row(name="best constant answer", cells=cells))
    return Table(
        data_sets=comparison.data_sets,
        measured=tuple(rows),
        published=published_rows(comparison.data_sets) if with_published else (),
        notes=tuple(_notes(comparison)),
        averages=_averages(comparison) if with_published else (),
    )


def _averages(comparison: Comparison) -> tuple[Average, ...]:
    measured = [
        Average(name=name, value=f"{value:.1f}", source="measured")
        for name, value in measured_averages(comparison).items()
    ]
    theirs = [
        Average(name=f"{a.name}{DAGGER}", value=f"{a.value:.1f}", source=a.source)
        for a in published().averages
    ]
    return (*measured, *theirs)


def measured_averages(comparison: Comparison) -> dict[str, float]:
    """Returns the average recall of each model that has results on all three data sets of TimeLens-Bench."""
    found = {}
    for model, results in comparison.results.items():
        scores = {name: [r.metrics.values[metric] for metric in METRICS] for name, r in results.items()}
        if (value := average_recall(scores)) is not None:
            found[model] = value
    return found


def published_rows(data_sets: Sequence[str]) -> tuple[Row, ...]:
    """Returns the paper's rows for the data sets that it reports."""
    columns = published_columns(data_sets)
    if not columns:
        raise UserError(
            f"--published: none of the data sets ({', '.join(data_sets)}) is one of the paper's; if one is, "
            "name it: --data Charades-TimeLens=FILE"
        )
    return tuple(
        Row(
            name=f"{row.name}{DAGGER}",
            cells={
                mine: tuple(Cell(value=NONE if x is None else f"{x:.1f}") for x in row.scores[paper])
                for mine, paper in columns.items()
            },
        )
        for row in published().rows
    )


def _figures(metrics: Metrics, intervals: bool) -> tuple[Cell, ...]:
    def cell(name: str) -> Cell:
        interval = interval_text(metrics.ci95[name]) if intervals else ""
        return Cell(value=f"{metrics.values[name]:.1f}", interval=interval)

    return tuple(map(cell, METRICS))


def _rise(rise: Mapping[str, Difference], intervals: bool) -> tuple[Cell, ...]:
    def cell(name: str) -> Cell:
        interval = interval_text(rise[name].ci95, "+") if intervals else ""
        return Cell(value=f"{rise[name].value:+.1f}", interval=interval)

    return tuple(map(cell, METRICS))


def _notes(comparison: Comparison) -> list[str]:
    """Returns the protocol, then the facts of each model on each data set."""
    everything = [result for results in comparison.results.values() for result in results.values()]
    lines = [protocol_line(everything[0].metrics.protocol or {})]
    for model, results in comparison.results.items():
        for name, result in results.items():
            lines.append(f"{model}, {name}: {_facts(result)}")
    return lines


def _facts(result: Result) -> str:
    metrics = result.metrics
    facts = [f"{metrics.n} rows", *count_notes(metrics), *rule_notes(metrics)]
    if result.swap is not None:
        facts.append(swap_note(result.swap))
    return "; ".join([*facts, *deviation_lines(metrics.protocol or {})])


# --- writers -----------------------------------------------------------------------------------------


_MARKDOWN = "\\|<`[]"  # characters by which a name could end its cell, or become HTML, code or a link


def as_markdown(table: Table) -> str:
    """Returns a table of the measured rows, one of the published rows, and the notes."""
    parts = [_markdown_rows(table, table.measured)]
    if table.published:
        parts.append(f"{table.published_title}:\n\n{_markdown_rows(table, table.published)}")
    if table.averages:
        lines = [f"| | {AVERAGE_RECALL} | |", "|---|---|---|"]
        lines += [f"| {_escaped(a.name, _MARKDOWN)} | {a.value} | {a.source} |" for a in table.averages]
        parts.append(f"{table.averages_title}:\n\n" + "\n".join(lines))
    parts.append("\n".join(f"- {_escaped(note, '|<`')}" for note in table.notes))
    return "\n\n".join(parts) + "\n"


def _markdown_rows(table: Table, rows: Sequence[Row]) -> str:
    header = [
        f"{_escaped(n, _MARKDOWN)} {m}" if m == METRICS[0] else m for n in table.data_sets for m in METRICS
    ]
    lines = ["| | " + " | ".join(header) + " |", "|---|" + "---|" * len(header)]
    for row in rows:
        cells = [str(cell) for name in table.data_sets for cell in row.figures(name)]
        lines.append(f"| {_escaped(row.name, _MARKDOWN)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def as_latex(table: Table) -> str:
    """Returns a ``tabular`` for the package booktabs; the notes are comments below it."""
    width = len(METRICS)
    columns = 1 + width * len(table.data_sets)
    spans = [rf"\multicolumn{{{width}}}{{c}}{{{_latex(name)}}}" for name in table.data_sets]
    rules = [rf"\cmidrule(lr){{{2 + width * i}-{1 + width * (i + 1)}}}" for i in range(len(table.data_sets))]
    lines = [
        rf"\begin{{tabular}}{{l{'c' * (columns - 1)}}}",
        r"\toprule",
        " & " + " & ".join(spans) + r" \\",
        "".join(rules),
        "Model & " + " & ".join(METRICS * len(table.data_sets)) + r" \\",
        r"\midrule",
        *(_latex_row(table, row) for row in table.measured),
    ]
    if table.published:
        title = rf"\multicolumn{{{columns}}}{{l}}{{\textit{{{_latex(table.published_title)}}}}} \\"
        lines += [r"\midrule", title, *(_latex_row(table, row) for row in table.published)]
    if table.averages:
        title = rf"\multicolumn{{{columns}}}{{l}}{{\textit{{{_latex(table.averages_title)}}}}} \\"
        lines += [r"\midrule", title, *(_latex_average(average, columns - 1) for average in table.averages)]
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, *(f"% {visible(note)}" for note in table.notes)]) + "\n"


def _latex_row(table: Table, row: Row) -> str:
    def text(cell: Cell) -> str:
        value = _latex(cell.value)
        return f"{value} {{\\scriptsize ${cell.interval}$}}" if cell.interval else value

    cells = [text(cell) for name in table.data_sets for cell in row.figures(name)]
    return " & ".join([_latex(row.name), *cells]) + r" \\"


def _latex_average(average: Average, columns: int) -> str:
    said = _latex(f"{average.value} ({average.source})")
    return rf"{_latex(average.name)} & \multicolumn{{{columns}}}{{l}}{{{said}}} \\"


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "[": "{[}",  # after a line break it would be an argument
    DAGGER: r"$^\dagger$",
    "−": "$-$",
    NONE: "--",
}


def _latex(text: str) -> str:
    # A sign is set as mathematics: "-3.1" would begin with a hyphen.
    if text[:1] in ("+", "-") and text[1:2].isdigit():
        return f"${text}$"
    return "".join(_LATEX.get(character, character) for character in visible(text))


def as_text(table: Table) -> str:
    """Returns a line for each model and data set, then the notes."""
    lines = []
    for rows, mark in ((table.measured, ""), (table.published, " (published)")):
        for row in rows:
            for name in row.cells:
                figures = zip(METRICS, row.figures(name), strict=True)
                said = ", ".join(f"{metric} {cell}" for metric, cell in figures)
                lines.append(visible(f"{row.name}{mark}, {name}: {said}"))
    if table.published:
        lines.append(table.published_title)
    if table.averages:
        lines += map(visible, average_lines(table))
    return "\n".join([*lines, *map(visible, table.notes)]) + "\n"


def average_lines(table: Table) -> list[str]:
    """Returns a line for each average recall, then what an average recall is."""
    lines = [f"{a.name}: {AVERAGE_RECALL} {a.value} ({a.source})" for a in table.averages]
    return [*lines, table.averages_title]


def _escaped(text: str, characters: str) -> str:
    return "".join(f"\\{character}" if character in characters else character for character in visible(text))


def as_json(comparison: Comparison, *, with_published: bool = False) -> dict[str, Any]:
    """Returns the record. The published rows have a key of their own, with their source."""
    record = comparison.to_json()
    if with_published:
        columns = published_columns(comparison.data_sets)
        record["published"] = {
            "source": published().source,
            "note": "not measured here",
            "models": {
                row.name: {
                    "tables": row.tables,
                    "reproduced_by_its_authors": row.reproduced,
                    **{
                        mine: dict(zip(METRICS, row.scores[paper], strict=True))
                        for mine, paper in columns.items()
                    },
                }
                for row in published().rows
            },
        }
        record["published"][_AVERAGE_KEY] = {
            "definition": AVERAGE_RECALL_IS,
            "models": {
                a.name: {"value": round(a.value, 1), "source": a.source} for a in published().averages
            },
        }
        record[_AVERAGE_KEY] = measured_averages(comparison)
    return record
