"""From a data file and a scores file to a selected file: what is kept, counted, written and said."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from rich.console import Console

from video_opd.config import SelectionConfig
from video_opd.curriculum.score_files import read_scores
from video_opd.curriculum.terminal import print_explanation, print_summary, warning_lines
from video_opd.curriculum.tvdf import explain, explain_file, histogram, histogram_edges, select_file
from video_opd.data.annotations import read_samples
from video_opd.errors import UserError
from video_opd.types import Score, Strategy


def topk(k: int, **more: Any) -> SelectionConfig:
    return SelectionConfig(k=k, **more)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_row(identity: str, **more: Any) -> dict[str, Any]:
    row = {"id": identity, "video": f"videos/{identity}.mp4", "query": f"q {identity}", "duration": 20.0}
    return {**row, "spans": [[1.0, 2.0]], **more}


def score_row(identity: str, teacher: float | None, student: float | None, **more: Any) -> dict[str, Any]:
    return {"id": identity, "teacher_iou": teacher, "student_iou": student, "teacher_spans": [], **more}


DATA = [
    data_row("a", source="x", note="kept"),
    data_row("b", source="x"),
    data_row("c", source="y"),
    data_row("d", source="y"),
    data_row("e"),
    data_row("f"),
    data_row("g", spans=[]),
    data_row("h"),
]
SCORES = [
    score_row("a", 0.9, 0.1, reverse_kl=0.5),
    score_row("b", 0.6, 0.5, reverse_kl=2.5),
    score_row("c", 0.4, 0.0, reverse_kl=3.0),  # fails the gate
    score_row("d", 0.8, None),  # the student was not measured
    score_row("e", 0.7, 0.7, reverse_kl=1.0),
    # f has no score
    score_row("g", None, None, reverse_kl=9.0),  # not annotated
    score_row("h", None, 0.3),  # the teacher was not measured
    score_row("stranger", 1.0, 0.0),
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "d.jsonl", DATA), write(tmp_path / "s.jsonl", SCORES)


def test_rows_carry_the_block_of_a_selected_file(files: tuple[Path, Path], tmp_path: Path) -> None:
    rows, summary = select_file(*files, topk(2), out=tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["a", "b"]
    tvdf = rows[0].pop("tvdf")
    assert rows[0] == DATA[0]
    assert tvdf == {
        "delta": pytest.approx(0.8),
        "teacher_iou": 0.9,
        "student_iou": 0.1,
        "reverse_kl": 0.5,
        "strategy": "topk",
        "rank": 1,
    }
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["tvdf"]["rank"] for row in written] == [1, 2]
    assert (summary.selected, summary.shortfall, summary.candidates) == (2, 0, 3)
    assert [sample.id for sample in read_samples(tmp_path / "out.jsonl")] == ["a", "b"]


def test_every_row_is_accounted_for(files: tuple[Path, Path]) -> None:
    _, summary = select_file(*files, topk(10), exclude={"b"})
    assert summary.rows == 8
    assert (summary.used_before, summary.unannotated, summary.unscored) == (1, 1, 1)
    assert (summary.unmeasured, summary.failed_gate, summary.candidates) == (2, 1, 2)
    assert summary.unknown_scores == 1
    assert (summary.selected, summary.shortfall) == (2, 8)
    assert {s: (c.rows, c.candidates, c.selected) for s, c in summary.by_source.items()} == {
        "none": (4, 1, 1),
        "x": (2, 1, 1),
        "y": (2, 0, 0),
    }


def test_the_gate_is_on_for_tvdf_and_off_for_the_baselines(files: tuple[Path, Path]) -> None:
    def chosen(strategy: Strategy, **more: Any) -> set[str]:
        return {row["id"] for row in select_file(*files, topk(10, strategy=strategy, **more))[0]}

    assert chosen("topk") == chosen("gwds") == chosen("bbds") == chosen("dsus") == {"a", "b", "e"}
    assert chosen("topk", min_teacher_iou=0.65) == {"a", "e"}
    assert chosen("topk", min_teacher_iou=0.0) == chosen("random") == {"a", "b", "c", "e"}
    assert chosen("random", min_teacher_iou=0.5) == {"a", "b", "e"}
    assert chosen("gaussian") == {"a", "b", "c", "e", "h"}  # needs the student's IoU alone
    assert chosen("gaussian", min_teacher_iou=0.5) == {"a", "b", "e"}
    assert chosen("topk", rank_by="reverse_kl") == {"a", "b", "e"}
    ungated = chosen("topk", rank_by="reverse_kl", min_teacher_iou=0)
    assert ungated == {"a", "b", "c", "e", "g"}  # g is not annotated


def test_unmeasured_values_are_null_in_the_block(files: tuple[Path, Path]) -> None:
    rows, _ = select_file(*files, topk(1, rank_by="reverse_kl", min_teacher_iou=0))
    assert rows[0]["id"] == "g"
    assert rows[0]["tvdf"]["delta"] is None and rows[0]["tvdf"]["teacher_iou"] is None


def test_video_paths_follow_to_another_folder(tmp_path: Path) -> None:
    data = write(
        tmp_path / "in" / "d.jsonl", [data_row("a"), data_row("b"), data_row("c", video="/abs/c.mp4")]
    )
    scores = write(tmp_path / "s.jsonl", [score_row(i, 0.9, 0.1) for i in "abc"])
    (tmp_path / "in" / "videos").mkdir()
    (tmp_path / "in" / "videos" / "a.mp4").touch()
    out = tmp_path / "far" / "away" / "out.jsonl"
    rows, _ = select_file(data, scores, topk(3), out=out)
    videos = {row["id"]: row["video"] for row in rows}
    assert videos == {"a": "../../in/videos/a.mp4", "b": "videos/b.mp4", "c": "/abs/c.mp4"}
    assert os.path.samefile(read_samples(out)[0].video, tmp_path / "in" / "videos" / "a.mp4")
    rooted, _ = select_file(data, scores, topk(3), out=out, video_root=tmp_path / "in")
    assert rooted[0]["video"] == "videos/a.mp4"  # the root will be given again


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"teacher_iou": 1.0}, '"id"'),
        (score_row("a", 0.5, 0.5), "second score"),
        (score_row("z", 54.0, 0.5), "percent"),
        (score_row("z", -0.1, 0.5), "between 0 and 1"),
        (score_row("z", 0.5, 0.5, reverse_kl="high"), "reverse_kl"),
        ({"id": "z", "teacher_iou": True}, "number"),
    ],
)
def test_wrong_scores_are_refused_with_their_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "s.jsonl", [score_row("a", 0.5, 0.5), row])
    with pytest.raises(UserError, match=message) as error:
        read_scores(path)
    assert "s.jsonl:2" in str(error.value)


def test_scores_that_are_missing_or_not_finite_are_nan(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(
        '{"id": "a"}\n{"id": "b", "teacher_iou": NaN, "student_iou": null, "reverse_kl": Infinity}\n'
    )
    for score in read_scores(path).values():
        assert math.isnan(score.teacher_iou) and math.isnan(score.student_iou) and score.reverse_kl is None


@pytest.mark.parametrize(
    "row", [{"responses": ["1 to 2"], "spans": [[1, 2]]}, {"video": "v.mp4", "query": "q"}]
)
def test_a_file_without_any_score_is_no_scores_file(
    files: tuple[Path, Path], tmp_path: Path, row: dict[str, Any]
) -> None:
    path = write(tmp_path / "p.jsonl", [{"id": i, **row} for i in "ab"])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"p\.jsonl: .* video-opd score"):
        select_file(files[0], path, topk(1), out=tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="video-opd score"):
        explain_file(files[0], path, 1)
    assert sorted(tmp_path.iterdir()) == before
    # One row that was measured makes it one; so do values that are null.
    write(path, [{"id": "a", **row}, {"id": "b", "student_iou": None}])
    assert set(read_scores(path)) == {"a", "b"}


def test_histogram_holds_lower_edges() -> None:
    edges = histogram_edges()
    assert (edges[0], edges[10], edges[-1]) == (-1.0, 0.0, 1.0)
    for i, edge in enumerate(edges[:-1]):
        assert histogram([edge]).index(1) == i
    assert histogram([1.0]).index(1) == 19
    assert histogram([0.8 - 0.5]).index(1) == 13  # 0.30000000000000004 or a step below 0.3
    assert sum(histogram([0.1, math.nan, -0.35])) == 2


def test_explain_shows_what_each_gate_leaves() -> None:
    scores = [Score(id=f"{i}", teacher_iou=i / 10, student_iou=0.4) for i in range(11)]
    table = {row.min_teacher_iou: row for row in explain(scores, 4)}
    assert [row.passed for row in table.values()] == [11, 10, 9, 8, 7, 6, 5, 4, 3, 2]
    assert table[0.0].mean_delta == pytest.approx(0.1)
    assert table[0.5].positive == 6
    assert table[0.7].kth_delta == pytest.approx(0.3)
    assert math.isnan(table[0.8].kth_delta)


def test_what_is_printed(files: tuple[Path, Path]) -> None:
    file = io.StringIO()
    console = Console(file=file, width=60)
    _, summary = select_file(*files, topk(5, strategy="bbds"))
    print_summary(summary, console)
    print_explanation(explain(read_scores(files[1]).values(), 3), 3, console)
    text = file.getvalue()
    assert "8 rows → 3 candidates (teacher IoU ≥ 0.5) → 3 selected" in text
    assert "1 without annotation" in text and "1 where the teacher failed the gate" in text
    assert "2 fewer than the 5 asked for" in text
    assert "+0.8 to +0.9        1" in text or "+0.7 to +0.8        1" in text
    assert "x     2 rows, 2 candidates, 2 selected" in text
    assert "too few" in text
    json.dumps(summary.to_json(), allow_nan=False)


def test_a_ranking_by_a_reverse_kl_that_nothing_measured_is_refused(tmp_path: Path) -> None:
    files = (
        write(tmp_path / "d.jsonl", [data_row("a"), data_row("b")]),
        write(tmp_path / "s.jsonl", [score_row("a", 0.9, 0.1), score_row("b", 0.9, 0.1, reverse_kl=None)]),
    )
    with pytest.raises(UserError, match=r"s\.jsonl: no row has reverse_kl, .*--reverse-kl"):
        select_file(*files, topk(1, rank_by="reverse_kl"), out=tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert select_file(*files, topk(1))[1].selected == 1
    write(tmp_path / "s.jsonl", [score_row("a", 0.9, 0.1), score_row("b", 0.9, 0.1, reverse_kl=0.0)])
    assert [row["id"] for row in select_file(*files, topk(2, rank_by="reverse_kl"))[0]] == ["b"]


def test_a_selection_that_teaches_little_is_told(files: tuple[Path, Path]) -> None:
    def warnings(settings: SelectionConfig) -> list[str]:
        rows, summary = select_file(*files, settings)
        return list(warning_lines(summary, rows))

    # δ of a, b and e: 0.8, 0.1 and 0.
    told = ["1 of 3 selected rows have δ ≤ 0: the student is already as good there; lower --k"]
    assert warnings(topk(3)) == told and warnings(topk(2)) == []
    assert warnings(topk(3, strategy="dsus")) == warnings(topk(3, rank_by="reverse_kl")) == []
    assert warnings(topk(3, min_teacher_iou=0.95)) == [
        "nothing is selected: of 8 rows of the pool, 1 without annotation, 1 without a score, 2 with a score "
        "that is missing or not finite, 4 where the teacher failed the gate"
    ]


def test_selecting_costs_the_same_for_each_of_many_rows_and_no_torch(tmp_path: Path) -> None:
    """Calls of functions are counted, Python's own included: a row of many costs what one of few does."""
    small, large = (calls_a_row(tmp_path, n) for n in (2_000, 16_000))
    assert large < 1.2 * small
    assert large < 200


def calls_a_row(folder: Path, n: int) -> float:
    write(folder / "d.jsonl", [data_row(f"{i}", source=f"s{i % 5}") for i in range(n)])
    write(folder / "s.jsonl", [score_row(f"{i}", (i * 37 % 101) / 100, (i * 53 % 97) / 97) for i in range(n)])
    code = (
        "import sys\n"
        "from video_opd.config import SelectionConfig\n"
        "from video_opd.curriculum.tvdf import select_file\n"
        "from video_opd.curriculum.terminal import print_summary\n"
        "settings = SelectionConfig(strategy='gwds', k=250)\n"
        "calls = 0\n"
        "def count(frame, event, argument):\n"
        "    global calls\n"
        "    calls += event in ('call', 'c_call')\n"
        "sys.setprofile(count)\n"
        "rows, summary = select_file(sys.argv[1], sys.argv[2], settings, out=sys.argv[3])\n"
        "sys.setprofile(None)\n"
        "print_summary(summary)\n"
        "assert len(rows) == 250 and 'torch' not in sys.modules\n"
        "print(calls)"
    )
    names = [str(folder / name) for name in ("d.jsonl", "s.jsonl", "o.jsonl")]
    run = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, env=os.environ | PYTHONPATH
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout.splitlines()[-1]) / n


PYTHONPATH = {"PYTHONPATH": str(ROOT / "src")}


def test_how_right_the_annotations_are_is_told_where_true_spans_are_known(tmp_path: Path) -> None:
    rows = [
        data_row("a", true_spans=[[1.0, 2.0]]),  # IoU 1
        data_row("b", true_spans=[[1.0, 3.0]]),  # 1/2
        data_row("c", true_spans=[[5.0, 6.0], [1.0, 5.0]]),  # 1/4, the better of two
        data_row("d", true_spans=[[1.0, "x"]]),  # no pair of numbers
        data_row("e"),
    ]
    scores = [
        score_row(row["id"], tau, 0.1) for row, tau in zip(rows, (0.9, 0.8, 0.2, 1.0, 0.7), strict=True)
    ]
    files = write(tmp_path / "d.jsonl", rows), write(tmp_path / "s.jsonl", scores)
    _, summary = select_file(*files, topk(2))
    found = summary.to_json()["annotation_iou"]
    assert found == {"rows": pytest.approx(7 / 12), "candidates": pytest.approx(3 / 4), "selected": 1.0}
    text = io.StringIO()
    print_summary(summary, Console(file=text, width=200))
    assert "with the true spans: 0.58 rows, 0.75 candidates, 1.00 selected" in text.getvalue()
    _, summary = select_file(write(tmp_path / "d.jsonl", rows[3:]), files[1], topk(2))
    assert summary.annotation_iou is None


def test_neither_the_data_nor_the_scores_are_replaced(tmp_path: Path) -> None:
    data, scores = write(tmp_path / "d.jsonl", DATA), write(tmp_path / "s.jsonl", SCORES)
    for path, name in ((data, "data"), (scores, "scores")):
        before = path.read_bytes()
        with pytest.raises(UserError, match=f"is also {name}: it would be replaced"):
            select_file(data, scores, topk(2), out=path)
        assert path.read_bytes() == before
