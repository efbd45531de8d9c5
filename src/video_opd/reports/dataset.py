"""One self-contained HTML page about a data file, from the record of ``data stats``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.files import write_text
from video_opd.reports.charts import Chart, histogram, number
from video_opd.reports.html import environment

# Key of the record, title, how to read it, the axis, what is counted.
CHARTS: tuple[tuple[str, str, str, str, str], ...] = (
    ("duration_s", "Duration of the videos", "Each video once.", "seconds", "videos"),
    ("span_s", "Length of the spans", "What is to be found, in seconds.", "seconds", "spans"),
    (
        "span_share",
        "Length of the spans, relative",
        "As a share of the video. Long ones are found by answering the whole video.",
        "share of the duration",
        "spans",
    ),
    (
        "queries_a_video",
        "Queries a video",
        "A video is decoded once for neighbouring rows.",
        "queries",
        "videos",
    ),
    ("words_a_query", "Words a query", "White space divides them.", "words", "queries"),
)
_SPREADS = (
    ("duration_s", "duration of a video, s"),
    ("span_s", "length of a span, s"),
    ("span_share", "length of a span, share of the duration"),
    ("start_share", "begin of a span, share"),
    ("end_share", "end of a span, share"),
    ("spans_a_row", "spans a row"),
    ("annotation_iou", "IoU of a span with the true one"),
    ("queries_a_video", "queries a video"),
    ("words_a_query", "words a query"),
)


def write_page(record: Mapping[str, Any], out: str | Path) -> Path:
    """Writes the page of a record. Raises UserError if the file cannot be written."""
    return write_text(out, render(record))


def render(record: Mapping[str, Any]) -> str:
    """Returns the page as text; the template engine escapes everything from data."""
    tokens = record["tokens"]
    spreads = [(label, record[key]) for key, label in _SPREADS if record[key]]
    if tokens:
        spreads.append(("tokens of a video", tokens["a_video"]))
        spreads.append(("frames of a video", tokens["frames_a_video"]))
    return (
        environment()
        .get_template("dataset.html.j2")
        .render(
            name=Path(str(record["data"])).name,
            record=record,
            tiles=_tiles(record),
            charts=charts(record),
            spreads=[[label, *(number(s[key]) for key in _COLUMNS)] for label, s in spreads],
            sources=[
                [source, f"{rows:,}", f"{100 * rows / record['rows']:.1f}%"]
                for source, rows in record["sources"].items()
            ],
            columns=_COLUMNS,
        )
    )


_COLUMNS = ("min", "p5", "median", "mean", "p95", "max")


def charts(record: Mapping[str, Any]) -> list[Chart]:
    """Draws a histogram of each quantity that the record has."""
    found = [
        _chart(title, help, axis, [(counted, "student", record[key])])
        for key, title, help, axis, counted in CHARTS
        if record[key]
    ]
    if record["start_share"]:
        where = [("begin", "student", record["start_share"]), ("end", "teacher", record["end_share"])]
        help = "Where spans lie in their videos. A peak is a prior that a model learns without looking."
        found.insert(3, _chart("Position of the spans", help, "share of the duration", where))
    if record["tokens"]:
        help = f"Under the budget of {record['tokens']['budget']['max_video_tokens']:,} tokens a video."
        found.append(
            _chart(
                "Tokens of the videos", help, "tokens", [("videos", "student", record["tokens"]["a_video"])]
            )
        )
    return [chart for chart in found if chart is not None]


def _chart(
    title: str, help: str, axis: str, groups: Sequence[tuple[str, str, Mapping[str, Any]]]
) -> Chart | None:
    bins = groups[0][2]["histogram"]
    if bins["open_end"]:
        help = f"{help} The last bar holds all that is more, up to {number(groups[0][2]['max'])}.".strip()
    return histogram(
        title, help, axis, bins["edges"], [(n, c, s["histogram"]["counts"]) for n, c, s in groups]
    )


def _tiles(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, note) of the figures on top."""
    tiles = [
        ("rows", f"{record['rows']:,}", f"{record['unannotated']:,} without spans"),
        ("videos", f"{record['videos']:,}", f"{len(record['sources'])} sources"),
    ]
    if record["duration_s"]:
        hours = record["duration_s"]["total"] / 3600
        tiles.append(("hours of video", f"{hours:,.1f}", "each video once"))
    if record["tokens"]:
        millions = record["tokens"]["all_rows"] / 1e6
        tiles.append(("million video tokens", f"{millions:,.2f}", "every row read once"))
    return tiles
