"""Reads the rows that papers report (``published.yaml``), to stand beside measured rows. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TypeAlias

AVERAGE_RECALL = "average recall"
AVERAGE_RECALL_IS = "the mean of R@0.3, R@0.5 and R@0.7 over the three data sets of TimeLens-Bench"

Scores: TypeAlias = tuple[float, float, float, float | None]  # R@0.3, R@0.5, R@0.7, mIoU


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A row of the paper. ``reproduced``: its authors ran this model themselves (an asterisk there)."""

    name: str
    tables: str  # the paper's tables that print the row
    scores: Mapping[str, Scores]  # data set -> scores in percent
    reproduced: bool = False


@dataclass(frozen=True, kw_only=True)
class PublishedAverage:
    """The average recall of a model, in percent, and where it is printed or computed from."""

    name: str
    value: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """The rows of ``source``. They are copied, not measured, and are never shown among measured rows.

    ``averages`` are average recalls: first those of ``rows``, computed, then those that another source
    prints alone.
    """

    source: str
    data_sets: tuple[str, ...]
    rows: tuple[PublishedRow, ...]
    averages: tuple[PublishedAverage, ...]


@cache
def published() -> Published:
    """Reads ``published.yaml``."""
    import yaml

    text = resources.files("video_opd.evaluation").joinpath("published.yaml").read_text("utf-8")
    record = yaml.safe_load(text)
    data_sets = tuple(record["data_sets"])
    rows = []
    for row in record["rows"]:
        scores = {name: tuple(s) for name, s in zip(data_sets, row.pop("scores"), strict=True)}
        rows.append(PublishedRow(**row, scores=scores))
    averages = [
        PublishedAverage(name=row.name, value=average, source=f"{record['source']}, table {row.tables}")
        for row in rows
        if (average := _mean_recall(row.scores.values())) is not None
    ]
    alone = record["averages"]
    averages += [
        PublishedAverage(name=name, value=value, source=alone["source"])
        for name, value in alone["rows"].items()
    ]
    return Published(source=record["source"], data_sets=data_sets, rows=tuple(rows), averages=tuple(averages))


def average_recall(scores: Mapping[str, Sequence[float | None]]) -> float | None:
    """Returns the average recall of a model: the mean of its R@0.3, R@0.5 and R@0.7 on the three data sets.

    ``scores`` holds, by the name of a data set, the recalls and the mIoU; the mIoU does not count. None
    unless each of the paper's data sets is named exactly once.
    """
    columns = published_columns(scores)
    if sorted(columns.values()) != sorted(published().data_sets):
        return None
    return _mean_recall(scores[name] for name in columns)


def _mean_recall(scores: Iterable[Sequence[float | None]]) -> float | None:
    recalls = [recall for row in scores for recall in row[:-1]]
    known = [recall for recall in recalls if recall is not None]
    return sum(known) / len(known) if len(known) == len(recalls) else None


def published_name(name: str) -> str | None:
    """Finds which of the paper's data sets a name means ("charades-timelens", "Charades_TimeLens test").

    Names without "TimeLens" are the original annotations, which are another data set: None.
    """
    plain = "".join(filter(str.isalnum, name.lower()))
    return next((known for known in published().data_sets if known.lower().replace("-", "") in plain), None)


def published_columns(names: Iterable[str]) -> dict[str, str]:
    """Returns the paper's name for each of the data sets that it reports."""
    return {name: known for name in names if (known := published_name(name)) is not None}
