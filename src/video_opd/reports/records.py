"""Checks the records of a run folder. Each function returns what is usable and notes what it left out.

What they return can be drawn: numbers are finite and within :data:`MOST`, spans do not end before they begin,
lists that belong together are of one length, and text holds no control characters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from video_opd.evaluation import rows
from video_opd.reports.run_files import Note
from video_opd.terminal import visible

MOST = 1e100  # largest size of a number; sums and products of such numbers are still finite
MOST_STEP = 2**53
MOST_DURATION_S = 1e7
MOST_TEXT = 10_000  # characters
MOST_NAME = 200
MOST_FRAMES = 100
MOST_VALUES, MOST_LEVELS = 10_000, 30  # values and levels of a tree
METRICS = tuple(sorted(rows.METRICS, key=lambda name: name != "mIoU"))  # mIoU first
_PICTURE = re.compile(r"(data:image/(jpeg|png|gif|webp);base64,)?[A-Za-z0-9+/=]+")


def number(value: Any, low: float = -MOST, high: float = MOST) -> float | int | None:
    """``value`` if it is a number from ``low`` to ``high``, else None. NaN is no number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and low <= value <= high else None


def count(value: Any, least: int = 0) -> int | None:
    whole = number(value, least, MOST_STEP)
    return int(whole) if whole is not None and whole == int(whole) else None


def text(value: Any, most: int = MOST_TEXT) -> str | None:
    """``value`` if it is a text, without control characters and not longer than ``most``, else None."""
    return visible(value[:most], keep="\n\t") if isinstance(value, str) and value else None


def span(value: Any) -> tuple[float, float] | None:
    """``[start_s, end_s]`` as a span, or None. A model's prediction may begin and end at one time."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    start_s, end_s = (number(time_s, 0, MOST_DURATION_S) for time_s in value)
    if start_s is None or end_s is None or start_s > end_s:
        return None
    return float(start_s), float(end_s)


def metrics_row(row: Mapping[str, Any], note: Note) -> dict[str, Any] | None:
    """The step and the metrics of a row that are numbers; a metric that was not measured is null."""
    step = count(row.get("step"), 1)
    if step is None:
        note("a row without a step")
        return None
    kept: dict[str, Any] = {"step": step}
    for key, value in row.items():
        if key == "step" or value is None:
            continue
        known = number(value, 0.0 if key.startswith("time/") else -MOST)
        if known is None:
            note(f"{key[:MOST_NAME]} is no usable number")
        else:
            kept[key] = known
    return kept


def timeline_row(row: Mapping[str, Any], note: Note) -> dict[str, Any] | None:
    """A row of timelines.jsonl. A value that is no span is left out; null is a model without a prediction."""
    duration_s = number(row.get("duration"), 1e-6, MOST_DURATION_S)
    if duration_s is None:
        note("a row whose duration is not a number of seconds above 0")
        return None
    if not isinstance(row.get("truth"), list) or not isinstance(row.get("answers"), dict):
        note("a row without truth or answers")
        return None
    truth = [found for value in row["truth"] if (found := span(value)) and found[0] < found[1]]
    if len(truth) < len(row["truth"]):
        note("a true span that is none")
    answers = {text(model, MOST_NAME) or "": span(value) for model, value in row["answers"].items()}
    wrong = [model for model, value in row["answers"].items() if value is not None and span(value) is None]
    for model in wrong:
        note("an answer that is no span")
        del answers[text(model, MOST_NAME) or ""]
    frames, times_s = film(row, duration_s)
    if row.get("frames") and not frames:
        note("frames that do not fit their times")
    return {
        "id": text(row.get("id"), MOST_NAME) or "",
        "query": text(row.get("query")) or "",
        "duration": float(duration_s),
        "truth": truth,
        "answers": answers,
        "frames": frames,
        "frame_times_s": times_s,
    }


def film(row: Mapping[str, Any], duration_s: float) -> tuple[list[str], list[float]]:
    """The pictures of a row with their times, in order; none if the two do not belong together."""
    frames, given = row.get("frames") or [], row.get("frame_times_s") or []
    if not isinstance(frames, list) or not isinstance(given, list) or len(frames) != len(given):
        return [], []
    times_s = [time_s for value in given if (time_s := number(value, 0, duration_s)) is not None]
    pictures = [uri for uri in frames if isinstance(uri, str) and _PICTURE.fullmatch(uri)]
    if not len(pictures) == len(times_s) == len(frames) <= MOST_FRAMES or sorted(times_s) != times_s:
        return [], []
    return pictures, [float(time_s) for time_s in times_s]


def metrics_record(record: Mapping[str, Any], note: Note) -> dict[str, Any] | None:
    """A metrics file: percentages, their intervals, counts and controls; None if it is some other record."""
    if "mIoU" not in record:
        return None
    scores = {key: number(record.get(key), 0, 100) for key in METRICS}
    if scores["mIoU"] is None:
        note("mIoU is no percentage")
        return None
    kept: dict[str, Any] = {key: float(value) for key, value in scores.items() if value is not None}
    for key in METRICS:
        if scores[key] is None and record.get(key) is not None:
            note(f"{key} is no percentage")
    kept["ci95"] = _intervals(record.get("ci95"), note)
    for key in ("n", "unparsed", "missing"):
        kept[key] = count(record.get(key)) or 0
        if record.get(key) is not None and count(record[key]) is None:
            note(f"{key} is no count")
    for key, figure in (("best_constant", "mIoU"), ("query_swap", "share")):
        value = record.get(key)
        value = value.get(figure) if isinstance(value, Mapping) else value
        kept[key] = number(value, 0, 100)
        if value is not None and kept[key] is None:
            note(f"{key} is no percentage")
    for key in ("model", "testset"):
        kept[key] = text(record.get(key), MOST_NAME)
        if record.get(key) and kept[key] is None:
            note(f"{key} is no text")
    kept["protocol"] = _protocol(record.get("protocol"), note)
    return kept


def _intervals(value: Any, note: Note) -> dict[str, tuple[float, float]]:
    if value is not None and not isinstance(value, Mapping):
        note("ci95 is no record of intervals")
    kept = {}
    for key, pair in (value if isinstance(value, Mapping) else {}).items():
        if key not in METRICS or pair is None:
            continue
        ends = [number(end, 0, 100) for end in pair] if isinstance(pair, list) else []
        low, high = ends if len(ends) == 2 else (None, None)
        if low is None or high is None or low > high:
            note(f"the interval of {key} is none")
        else:
            kept[key] = (float(low), float(high))
    return kept


def _protocol(value: Any, note: Note) -> dict[str, Any] | None:
    if not isinstance(value, Mapping):
        if value is not None:
            note("protocol is no record")
        return None
    deviations = value.get("deviations") or {}
    if not isinstance(deviations, Mapping):
        note("the protocol's deviations are no record")
        deviations = {}
    kept = {visible(str(key)[:MOST_NAME]): visible(str(item)[:MOST_NAME]) for key, item in deviations.items()}
    return {"name": text(value.get("name"), MOST_NAME) or "", "deviations": kept}


def selection(record: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """select.json: its facts, which are texts and numbers, and the two histograms if they fit their edges."""
    lists = ("delta_edges", "delta_before", "delta_after")
    kept: dict[str, Any] = {}
    for key, value in record.items():
        if key in lists or isinstance(value, dict | list) or value is None:
            continue
        usable = value if isinstance(value, bool) else text(value) or number(value)
        if usable is None and value != "":
            note(f"{key[:MOST_NAME]} is no usable value")
        else:
            kept[key] = usable
    for key in _COUNTS:
        if key in kept and count(kept[key]) is None:
            note(f"{key} is no count")
            del kept[key]
    kept["by_source"] = _by_source(record.get("by_source"), note)
    edges, before, after = (record.get(key) for key in lists)
    if edges is None and before is None and after is None:
        return kept
    if _is_histogram(edges, before, after):
        kept |= {"delta_edges": edges, "delta_before": before, "delta_after": after}
    else:
        note("the histograms of δ do not fit together")
    return kept


def _by_source(value: Any, note: Note) -> dict[str, dict[str, int]]:
    kept: dict[str, dict[str, int]] = {}
    for source, counts in (value if isinstance(value, Mapping) else {}).items():
        found = {
            key: count(counts.get(key)) if isinstance(counts, Mapping) else None
            for key in ("candidates", "selected")
        }
        if None in found.values():
            note("counts of a source are none")
        elif len(kept) < MOST_VALUES:
            kept[visible(source[:MOST_NAME])] = {key: n for key, n in found.items() if n is not None}
    if value is not None and not isinstance(value, Mapping):
        note("by_source is no record of sources")
    return kept


_COUNTS = (
    "rows",
    "used_before",
    "unannotated",
    "unscored",
    "not_asked",
    "failed_gate",
    "candidates",
    "selected",
    "filled",
)


def _is_histogram(edges: Any, *counts: Any) -> bool:
    if not isinstance(edges, list) or len(edges) < 2 or any(number(edge) is None for edge in edges):
        return False
    if any(b <= a for a, b in pairwise(edges)):
        return False
    return all(
        isinstance(group, list) and len(group) == len(edges) - 1 and all(count(n) is not None for n in group)
        for group in counts
    )


def rounds_record(record: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """rounds.json: for each round the means of δ."""
    rounds = record.get("rounds")
    if not isinstance(rounds, list):
        note("no list of rounds")
        return {"rounds": []}
    kept = []
    for entry in rounds:
        round_number = count(entry.get("round"), 1) if isinstance(entry, Mapping) else None
        if round_number is None:
            note("a round without its number")
            continue
        delta = entry.get("delta")
        delta = delta if isinstance(delta, Mapping) else {}
        parts = {name: delta.get(name) for name in ("scored", "selected")}
        means = {
            name: {"mean": number(part.get("mean")) if isinstance(part, Mapping) else None}
            for name, part in parts.items()
        }
        kept.append({"round": round_number, "delta": means})
    return {"rounds": kept}


def tree(value: Mapping[str, Any], note: Note) -> dict[str, Any]:
    """A tree of facts, such as environment.json, without what is too deep or too much to be shown."""
    left = [MOST_VALUES]

    def kept(node: Any, level: int) -> Any:
        left[0] -= 1
        if level > MOST_LEVELS or left[0] < 0:
            raise ValueError
        if isinstance(node, Mapping):
            return {visible(str(key)[:MOST_NAME]): kept(item, level + 1) for key, item in node.items()}
        if isinstance(node, list):
            return [kept(item, level + 1) for item in node]
        return visible(node[:MOST_TEXT], keep="\n\t") if isinstance(node, str) else node

    try:
        result: dict[str, Any] = kept(value, 0)
    except ValueError:
        note(f"more than {MOST_VALUES} values or {MOST_LEVELS} levels")
        return {}
    return result
