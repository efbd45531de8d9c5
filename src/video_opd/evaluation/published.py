"""What the paper reports, to stand beside what was measured here, and never among it. No torch.

Source: Video-OPD, arXiv 2602.02994. R@0.3, R@0.5 and R@0.7 are of table 1. Table 1 has no mIoU; where the
same row stands in table 4 or 5 with one, it is taken from there. All are percent, on TimeLens' corrected
annotations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SOURCE = "Video-OPD, arXiv 2602.02994"
DATA_SETS = ("Charades-TimeLens", "ActivityNet-TimeLens", "QVHighlights-TimeLens")

Scores = tuple[float, float, float, float | None]  # R@0.3, R@0.5, R@0.7, mIoU


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A row of the paper. ``reproduced``: its authors ran this model themselves (an asterisk there)."""

    name: str
    tables: str  # of the paper
    scores: Mapping[str, Scores]  # by DATA_SETS
    reproduced: bool = False


def _row(
    name: str,
    charades: Scores,
    activitynet: Scores,
    qvhighlights: Scores,
    tables: str = "1",
    reproduced: bool = False,
) -> PublishedRow:
    scores = dict(zip(DATA_SETS, (charades, activitynet, qvhighlights), strict=True))
    return PublishedRow(name=name, tables=tables, scores=scores, reproduced=reproduced)


ROWS = (
    _row("GPT-4o", (60.6, 44.5, 23.5, None), (55.2, 41.4, 25.8, None), (69.0, 54.8, 38.5, None)),
    _row("GPT-5", (59.3, 42.0, 22.0, None), (57.4, 44.9, 30.4, None), (72.4, 60.4, 46.4, None)),
    _row("Gemini-2.0-Flash", (66.4, 53.5, 27.1, None), (62.9, 54.0, 37.7, None), (76.2, 66.4, 48.3, None)),
    _row("Gemini-2.5-Flash", (68.7, 56.1, 30.6, None), (66.8, 57.5, 41.3, None), (78.2, 69.4, 55.0, None)),
    _row("Gemini-2.5-Pro", (74.1, 61.1, 34.0, None), (72.3, 64.2, 47.1, None), (84.1, 75.9, 61.1, None)),
    _row("VideoChat-Flash-7B", (60.2, 37.9, 17.8, None), (35.5, 21.8, 10.5, None), (45.2, 30.6, 16.7, None)),
    _row(
        "Qwen2.5-VL-7B",
        (58.1, 35.1, 18.2, None),
        (47.2, 32.5, 20.2, None),
        (55.0, 41.7, 29.3, None),
        reproduced=True,
    ),
    _row("VideoChat-R1-7B", (51.9, 30.8, 11.7, None), (35.0, 23.9, 11.3, None), (29.3, 19.1, 9.4, None)),
    _row("Time-R1-7B", (57.9, 32.0, 16.9, None), (44.8, 31.0, 19.0, None), (65.8, 51.5, 36.1, None)),
    _row(
        "TVG-R1-7B",
        (44.5, 23.6, 12.4, None),
        (46.7, 31.0, 18.6, None),
        (55.8, 41.2, 28.0, None),
        reproduced=True,
    ),
    _row(
        "VideoChat-R1.5-7B",
        (46.4, 24.0, 10.4, None),
        (40.6, 25.3, 16.4, None),
        (62.2, 44.5, 28.3, None),
        reproduced=True,
    ),
    _row("MiMo-VL-7B", (57.9, 42.6, 20.5, None), (49.3, 38.7, 22.4, None), (57.1, 42.6, 28.4, None)),
    _row(
        "Qwen3-VL-8B-Instruct",
        (61.7, 41.5, 23.1, 42.9),
        (41.2, 30.7, 20.0, 30.4),
        (46.6, 38.2, 29.5, 36.9),
        tables="1, 4",
        reproduced=True,
    ),
    _row(
        "OP-RKD [Qwen3-VL-8B]", (67.3, 47.0, 27.8, None), (59.1, 44.9, 30.6, None), (70.7, 57.4, 44.5, None)
    ),
    _row(
        "OP-FKD [Qwen3-VL-8B]", (66.9, 47.3, 27.6, None), (58.6, 44.2, 30.5, None), (71.2, 58.9, 46.5, None)
    ),
    _row(
        "GRPO [Qwen3-VL-8B]",
        (72.7, 44.4, 27.6, 49.6),
        (58.6, 42.7, 32.1, 44.7),
        (69.8, 53.0, 41.5, 54.3),
        tables="1, 5",
    ),
    _row(
        "Video-OPD [Qwen3-VL-8B]",
        (73.1, 45.8, 32.4, 52.0),
        (60.5, 45.6, 35.8, 47.3),
        (73.8, 60.3, 50.4, 61.0),
        tables="1, 4",
    ),
)


def published_name(name: str) -> str | None:
    """Which of the paper's data sets a name means ("charades-timelens", "Charades_TimeLens test"), or None.

    The names without "TimeLens" are the original annotations: another data set.
    """
    plain = "".join(filter(str.isalnum, name.lower()))
    return next((known for known in DATA_SETS if known.lower().replace("-", "") in plain), None)


def published_columns(names: Iterable[str]) -> dict[str, str]:
    """The paper's name for each of the data sets that it reports."""
    return {name: known for name in names if (known := published_name(name)) is not None}
