"""Annotation noise: its kinds and shares, and what it leaves alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl
from video_opd.world.annotation_noise import annotate
from video_opd.world.make import make_world, rows
from video_opd.world.scene import compose

SCENES = [compose("train", 5, i) for i in range(600)]  # 2,500 rows


def all_rows(level: float) -> list[dict[str, Any]]:
    return [row for scene in SCENES for row in rows(scene, annotation_noise=level)]


def overlap(a: list[float], b: list[float]) -> float:
    both = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return both / (a[1] - a[0] + b[1] - b[0] - both)


def test_level_0_is_exact():
    assert all(row["spans"] == row["true_spans"] and row["annotation"] == "exact" for row in all_rows(0))


@pytest.mark.parametrize(("level", "mean_iou"), [(1, 0.55), (0.5, 0.78)])
def test_shares_and_the_mean_iou_with_the_truth(level: float, mean_iou: float) -> None:
    found = all_rows(level)
    counts = Counter(row["annotation"] for row in found)
    for kind, share in {"widened": 0.5, "another event": 0.1, "shifted": 0.15}.items():
        expected = share * level
        error = math.sqrt(expected * (1 - expected) / len(found))
        # Videos with one event have no other one: a few shifted rows more.
        assert abs(counts[kind] / len(found) - expected) < 4 * error + 0.01, kind
    mean = sum(overlap(row["spans"][0], row["true_spans"][0]) for row in found) / len(found)
    assert mean == pytest.approx(mean_iou, abs=0.03)


def test_each_kind_is_what_it_says():
    outside, shifts = [], []
    for scene in SCENES:
        true = [list(q.span) for q in scene.questions]
        for row in rows(scene, annotation_noise=1):
            (start, end), (s, e) = row["spans"][0], row["true_spans"][0]
            assert 0 <= start < end <= scene.duration_s
            length = e - s
            if row["annotation"] == "exact":
                assert (start, end) == (s, e)
            elif row["annotation"] == "widened":
                assert start <= s and e <= end
                outside += [(s - start) / length] if start > 0 else []
            elif row["annotation"] == "another event":
                assert [start, end] in true and [start, end] != [s, e]
            else:
                assert row["annotation"] == "shifted" and end - start == pytest.approx(length, abs=0.011)
                shifts += [(start - s) / length] if 0 < start < scene.duration_s - length - 0.01 else []
    # |N(0, 0.8)| and N(0, 0.7), but for those that the video's ends cut.
    assert sum(outside) / len(outside) == pytest.approx(0.8 * math.sqrt(2 / math.pi), rel=0.1)
    assert math.sqrt(sum(x * x for x in shifts) / len(shifts)) == pytest.approx(0.7, rel=0.1)
    assert abs(sum(shifts) / len(shifts)) < 0.15


def test_rows_that_are_wrong_stay_wrong_in_the_same_way_at_higher_levels():
    wrong = 0
    for scene in SCENES:
        for half, whole in zip(annotate(scene, 0.5), annotate(scene, 1), strict=True):
            if half.kind != "exact":
                wrong += 1
                assert half == whole
    assert wrong > 500


def test_only_training_rows_are_noisy_and_another_level_renders_nothing(tmp_path: Path) -> None:
    videos = {"train": 3, "short": 1}

    def make(level: float) -> dict[str, list[dict[str, Any]]]:
        files = make_world(tmp_path, videos=videos, seed=5, annotation_noise=level, workers=1)
        return {split: [row for _, row in read_jsonl(path)] for split, path in files.items()}

    exact = make(0)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").iterdir()}
    noisy = make(1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").iterdir()} == times
    assert noisy["short"] == exact["short"]
    assert noisy["train"] == [row for scene in SCENES[:3] for row in rows(scene, annotation_noise=1)]
    assert any(row["spans"] != row["true_spans"] for row in noisy["train"])
    changed = {"spans", "annotation"}
    for a, b in zip(exact["train"], noisy["train"], strict=True):
        assert {k: v for k, v in a.items() if k not in changed} == {
            k: v for k, v in b.items() if k not in changed
        }


@pytest.mark.parametrize("level", [-0.1, 1.01, math.nan, math.inf])
def test_another_level_is_refused(level: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be from 0"):
        make_world(tmp_path, videos={"train": 1}, annotation_noise=level)
