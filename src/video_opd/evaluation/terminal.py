"""Results for people: a table on a terminal, one plain line a row elsewhere. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from video_opd.evaluation.metrics import METRICS, ConstantPrediction, Difference, Metrics, QuerySwap

if TYPE_CHECKING:
    from rich.console import Console


def evaluation_record(
    metrics: Metrics, constant: ConstantPrediction | None = None, swap: QuerySwap | None = None
) -> dict[str, Any]:
    """The record of ``evaluate --json``: the metrics, and beside them what they are worth."""
    return {
        **metrics.to_json(),
        "best_constant": None if constant is None else constant.to_json(),
        "query_swap": None if swap is None else swap.to_json(),
    }


def print_metrics(
    results: Mapping[str, Metrics],
    *,
    constant: ConstantPrediction | None = None,
    swaps: Mapping[str, QuerySwap | None] | None = None,
    differences: Mapping[str, Difference] | None = None,
    console: Console | None = None,
) -> None:
    """Prints each result by its name (its sources below it), then the controls, to stdout by default.

    ``differences`` is the rise from the first result to the last.
    """
    console = console or stdout()
    rows: list[tuple[str, ...]] = []
    for name, metrics in results.items():
        rows.append(_metrics_row(name, metrics))
        rows += [_metrics_row(f"  {source}", part) for source, part in (metrics.by_source or {}).items()]
    if differences is not None:
        rows.append(("rise", *(_signed(differences[name]) for name in METRICS), "", ""))
    if constant is not None:
        where = f"best constant ({constant.start_fraction:.0%} to {constant.end_fraction:.0%})"
        rows.append((where, *(f"{constant.values[name]:.1f}" for name in METRICS), str(constant.n), ""))
    print_rows(console, ("", *METRICS, "rows", "notes"), rows)
    for name, swap in (swaps or {}).items():
        if swap is not None:
            say(
                console,
                f"{name}: query swap {swap.share:.1f}% [{swap.ci95[0]:.1f}, {swap.ci95[1]:.1f}] "
                f"(chance 50%), the same answer to both queries {swap.same_answer:.1f}%, "
                f"{swap.comparisons} comparisons",
            )
    told: list[str] = []
    for name, metrics in results.items():
        if metrics.rules:
            say(console, f"{name}: {_rules(metrics)}")
        if metrics.protocol is not None:
            first, *others = protocol_lines(metrics.protocol)
            told += [line for line in (*(f"{name}: {other}" for other in others), first) if line not in told]
    for line in sorted(told, key=lambda line: not line.startswith("protocol ")):
        say(console, line)


def protocol_lines(protocol: Mapping[str, Any]) -> list[str]:
    """What a result's ``protocol`` says, in a line; a second one says what the answers were made with
    otherwise, or that nobody knows."""
    video = protocol["video"]
    lines = [
        f"protocol {protocol['name']}: prompt {protocol['prompt']}; {video['fps']:g} fps, at most "
        f"{video['max_frames']} frames and {video['max_video_tokens']} video tokens; at most "
        f"{protocol['max_new_tokens']} new tokens, {protocol['decoding']}; parser {protocol['parser']}, "
        f"rounding {protocol['rounding']}; 95% by {protocol['ci95']}"
    ]
    deviations = protocol.get("deviations")
    if deviations is None:
        return [*lines, "how its answers were made is not known: there is no note beside the file"]
    if deviations:
        said = (f"{key} {value} (protocol: {_asked(protocol, key)})" for key, value in deviations.items())
        lines.append(f"made with other settings: {', '.join(said)}")
    return lines


def _asked(protocol: Mapping[str, Any], key: str) -> Any:
    """What a protocol's record says about a key of its deviations."""
    section, _, name = key.rpartition(".")
    if section == "video":
        return protocol["video"][name]
    return {"prompt.style": protocol["prompt"], "prompt.thinking": False, "temperature": 0}.get(
        key, protocol.get(key)
    )


def notes_of(metrics: Metrics) -> list[str]:
    """Counts that are not 0, and how many answers each rule of the parser read."""
    counts = {
        "unparsed": metrics.unparsed,
        "missing": metrics.missing,
        "unannotated": metrics.unannotated,
    }
    notes = [f"{count} {what}" for what, count in counts.items() if count]
    return [*notes, _rules(metrics)] if metrics.rules else notes


def _rules(metrics: Metrics) -> str:
    return "parse rules " + ", ".join(f"{rule} {count}" for rule, count in metrics.rules.items())


def _metrics_row(name: str, metrics: Metrics) -> tuple[str, ...]:
    cells = [
        f"{metrics.values[key]:.1f} [{metrics.ci95[key][0]:.1f}, {metrics.ci95[key][1]:.1f}]"
        for key in METRICS
    ]
    notes = ", ".join(note for note in notes_of(metrics) if not note.startswith("parse rules"))
    return (name, *cells, str(metrics.n), notes)


def _signed(difference: Difference) -> str:
    low, high = difference.ci95
    return f"{difference.value:+.1f} [{low:+.1f}, {high:+.1f}]"


def print_rows(console: Console, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table on a terminal; elsewhere a line a row, ``name: column cell, …`` with what is empty left out."""
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


def say(console: Console, line: str) -> None:
    """One line as it is: not wrapped, nothing in it read as markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def stdout() -> Console:
    from rich.console import Console

    return Console()
