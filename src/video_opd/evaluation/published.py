"""Reads the rows that the paper reports (``published.yaml``), to stand beside measured rows. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TypeAlias

Scores: TypeAlias = tuple[float, float, float, float | None]  # R@0.3, R@0.5, R@0.7, mIoU


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A row of the paper. ``reproduced``: its authors ran this model themselves (an asterisk there)."""

    name: str
    tables: str  # the paper's tables that print the row
    scores: Mapping[str, Scores]  # data set -> scores in percent
    reproduced: bool = False


@dataclass(frozen=True, kw_only=True)
class Published:
    """The rows of one source. They are copied, not measured, and are never shown among measured rows."""

    source: str
    data_sets: tuple[str, ...]
    rows: tuple[PublishedRow, ...]


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
    return Published(source=record["source"], data_sets=data_sets, rows=tuple(rows))


def published_name(name: str) -> str | None:
    """Finds which of the paper's data sets a name means ("charades-timelens", "Charades_TimeLens test").

    Names without "TimeLens" are the original annotations, which are another data set: None.
    """
    plain = "".join(filter(str.isalnum, name.lower()))
    return next((known for known in published().data_sets if known.lower().replace("-", "") in plain), None)


def published_columns(names: Iterable[str]) -> dict[str, str]:
    """Returns the paper's name for each of the data sets that it reports."""
    return {name: known for name in names if (known := published_name(name)) is not None}
