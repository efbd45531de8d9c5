"""A data file in numbers: computed by hand, against an independent count, and as the page and the lines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_cases import write
from hypothesis import given
from hypothesis import strategies as st
from video_cases import write_video

from video_opd.cli import main
from video_opd.config import VideoConfig
from video_opd.convert.describe import describe, histogram, read_budget, spread
from video_opd.data.annotations import read_annotations
from video_opd.errors import UserError
from video_opd.reports.dataset import charts, render

ROWS: list[dict[str, Any]] = [
    {"id": "a", "video": "v.mp4", "query": "the cup falls", "duration": 40.0, "spans": [[10, 20]]},
    {"id": "b", "video": "v.mp4", "query": "the cup falls", "duration": 40.0, "spans": [[0, 4], [36, 50]]},
    {"id": "c", "video": "w.mp4", "query": "dog", "duration": 20.0, "spans": [[5, 10]], "source": "s"},
    {"id": "d", "video": "x.mp4", "query": "no answer", "source": "<b>"},
]


def record(folder: Path, rows: list[dict[str, Any]] = ROWS, **options: Any) -> dict[str, Any]:
    annotations = read_annotations(write(folder / "d.jsonl", rows))
    return {"data": "d.jsonl", **describe(annotations, VideoConfig(), **options)}


def test_a_file_is_described(tmp_path):
    found = record(tmp_path)
    assert {key: found[key] for key in ("rows", "videos", "unannotated", "clamped", "asked_twice")} == {
        "rows": 4,
        "videos": 3,
        "unannotated": 1,
        "clamped": 1,
        "asked_twice": 1,
    }
    assert found["without_duration"] == 1 and found["sources"] == {"–": 2, "s": 1, "<b>": 1}
    assert (found["duration_s"]["n"], found["duration_s"]["total"]) == (2, 60.0)
    assert found["span_s"]["total"] == 10 + 4 + 4 + 5 and found["span_s"]["n"] == 4
    assert found["start_share"]["mean"] == pytest.approx((0.25 + 0 + 0.9 + 0.25) / 4)
    assert found["end_share"]["max"] == 1.0 and found["span_share"]["median"] == pytest.approx(0.175)
    assert found["spans_a_row"]["mean"] == pytest.approx(4 / 3)
    assert found["queries_a_video"]["histogram"]["counts"] == (0, 2, 1)
    assert found["words_a_query"]["max"] == 3 and found["tokens"] is None


def test_tokens_of_a_given_size(tmp_path):
    """640×360 is 20×11 cells of 32 px. 20 s at 2 fps are 20 pairs of 220 cells. 40 s are 40 pairs; 220 each
    would be 8,800, so they shrink by √(640·360 / (8192/40 · 32²)) = 1.048: 19×10 cells."""
    tokens = record(tmp_path, size_px=(640, 360))["tokens"]
    assert tokens["videos"] == 2 and tokens["frames_a_video"]["max"] == 80
    assert tokens["a_video"]["min"] == 20 * 220
    assert tokens["a_video"]["max"] == 40 * 190
    assert tokens["all_videos"] == tokens["a_video"]["total"]
    assert tokens["all_rows"] == 2 * tokens["a_video"]["max"] + tokens["a_video"]["min"]


def test_tokens_of_the_videos_themselves(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(Path("v.mp4"), 100, size=(128, 256))  # 10 s; 4×8 cells are too few, the floor is 128
    write(
        Path("d.jsonl"),
        [{"id": i, "video": f"{v}.mp4", "query": "q"} for i, v in (("a", "v"), ("b", "gone"))],
    )
    words = ["data", "stats", "d.jsonl", "--json", "--workers", "1"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] is None
    for more in (["--probe"], []):  # the second time the check file is there
        assert main([*words, *more]) == 0
        tokens = json.loads(capsys.readouterr().out)["tokens"]
        assert tokens["videos"] == 1 and tokens["frames_a_video"]["max"] == 20
        assert tokens["a_video"]["max"] == tokens["all_rows"] >= 10 * 128
    assert main([*words, "--video.min_frame_tokens", "8"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert tokens["a_video"]["max"] == 10 * 4 * 8 and tokens["budget"]["min_frame_tokens"] == 8


def test_a_budget_is_changed_by_its_own_keys_only():
    assert read_budget([]) == VideoConfig()
    assert read_budget(["--video.fps", "1"]).fps == 1.0
    for words in (["--video.fsp", "1"], ["--optim.lr", "1"]):
        with pytest.raises(UserError, match="not a known key"):
            read_budget(words)


VALUES = st.lists(st.floats(0, 1e6).map(lambda x: round(x, 3)), min_size=1, max_size=60)


@given(values=VALUES, whole=st.booleans())
def test_every_value_is_in_one_bin(values, whole):
    if whole:
        values = [float(round(value)) for value in values]
    bins = histogram(np.array(values), whole=whole)
    assert sum(bins.counts) == len(values) and len(bins.edges) == len(bins.counts) + 1
    assert bins.edges[0] == 0 and len(bins.counts) <= 26
    assert bins.open_end == (max(values) > bins.edges[-1] + 1e-9)
    # counted again, value by value, away from edges where rounding decides
    step = bins.edges[1]
    for i, count in enumerate(bins.counts[:-1]):
        low, high = bins.edges[i], bins.edges[i + 1]
        clear = sum(low + 1e-6 * step < value < high - 1e-6 * step for value in values)
        near = sum(low - 1e-6 * step <= value <= high + 1e-6 * step for value in values)
        assert clear <= count <= near


def test_histograms_by_hand():
    shares = histogram(np.array([0.0, 0.05, 0.1, 0.999, 1.0]), top=1.0)
    assert shares.edges == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert shares.counts == (2, 1, 0, 0, 0, 0, 0, 0, 0, 2) and not shares.open_end
    counts = histogram(np.array([1.0, 1, 2, 3]), whole=True)
    assert counts.edges == (0.0, 1.0, 2.0, 3.0, 4.0) and counts.counts == (0, 2, 1, 1)
    # 5,000 is in the last percent: the bins are those of the rest, and it is in the last one
    tail = histogram(np.array([*range(1, 1000), 5000.0]))
    assert tail.edges[1] == 100 and len(tail.counts) == 10 and tail.open_end
    assert tail.counts[0] == 99 and tail.counts[-1] == 101
    assert histogram(np.array([0.0, 0.0])).counts[0] == 2


def test_spreads_are_numpys():
    values = list(np.random.default_rng(1).exponential(20, 200))
    found = spread(values)
    assert found is not None
    assert found["median"] == np.median(values) and found["p95"] == np.percentile(values, 95)
    assert found["total"] == pytest.approx(sum(values)) and spread([]) is None


def test_the_lines_and_the_page_show_what_there_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("d.jsonl"), ROWS)
    assert main(["data", "stats", "d.jsonl", "--size", "640x360", "--html", "out/page.html"]) == 0
    captured = capsys.readouterr()
    assert "4 rows on 3 videos" in captured.out and "1 row without spans" in captured.out
    assert "tokens: " in captured.out and "2 videos at 640x360" in captured.out
    assert "wrote out/page.html" in captured.err.replace(str(tmp_path) + "/", "")
    page = Path("out/page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert not re.search(r"(src|href)=\"?(https?:)?//", page) and "<script" not in page
    assert page.count("<svg") == len(charts(record(tmp_path, size_px=(640, 360)))) == 7


@pytest.mark.parametrize("rows", [[], ROWS[3:], ROWS[2:3]])
def test_files_with_little_in_them_are_described_too(tmp_path, rows, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("d.jsonl"), rows)
    assert main(["data", "stats", "d.jsonl"]) == 0
    assert ("tokens: not counted" if rows else "no rows in it") in capsys.readouterr().out
    assert "video-opd" in render(record(tmp_path, rows))


def test_bars_of_a_page_keep_inside_their_picture(tmp_path):
    many = [
        ROWS[2] | {"id": str(i), "video": f"{i}.mp4", "duration": 410.0 if i == 0 else 10.0 + i % 7}
        for i in range(150)
    ]
    for chart in charts(record(tmp_path, many, size_px=(64, 64))):
        for box in chart.boxes:
            assert chart.left <= box.x and box.x + box.width <= chart.right + 0.01
        assert all(chart.left <= tick.at <= chart.right for tick in chart.x_ticks)


def test_wrong_sizes_are_one_line(capsys):
    for size in ("640", "0x3", "axb", "640x360x3"):
        assert main(["data", "stats", "d.jsonl", "--size", size]) == 2
        assert "WIDTHxHEIGHT" in capsys.readouterr().err
