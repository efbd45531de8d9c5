"""Several models on several data sets: figures, differences by hand, formats, and the paper's rows."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from video_opd.cli.evaluate import named_files
from video_opd.errors import UserError
from video_opd.evaluation import comparison_formats
from video_opd.evaluation.comparison import Comparison, by_source, compare
from video_opd.evaluation.predictions import ModelPredictions, PredictionsFile
from video_opd.evaluation.protocols import PROTOCOLS
from video_opd.evaluation.published import average_recall, published, published_name
from video_opd.evaluation.rows import METRICS
from video_opd.evaluation.terminal import print_table
from video_opd.types import Prediction, Sample

PAPER = PROTOCOLS["paper"]


def samples(name: str, videos: int = 6, queries: int = 2) -> list[Sample]:
    return [
        Sample(
            id=f"{name}-{v}-{q}",
            video=Path(f"{name}{v}.mp4"),
            query=f"query {q}",
            duration_s=30.0,
            spans=((10.0 * q, 10.0 * q + 8.0),),
            source=f"s{v % 2}",
        )
        for v in range(videos)
        for q in range(queries)
    ]


def model_predictions(name: str, *files: Mapping[str, tuple[float, float] | None]) -> ModelPredictions:
    return ModelPredictions(
        name=name,
        files=tuple(
            PredictionsFile(
                path=f"{name}-{number}.jsonl",
                predictions={
                    i: Prediction(id=i, responses=(), spans=(span,), rules=("given",))
                    for i, span in file.items()
                },
                provenance=None,
            )
            for number, file in enumerate(files)
        ),
    )


def shifted(rows: list[Sample], by_s: float) -> dict[str, tuple[float, float] | None]:
    return {s.id: (s.spans[0][0] + by_s, s.spans[0][1] + by_s) for s in rows}


A, B = samples("a"), samples("b")
SETS = {"Charades-TimeLens": A, "mine": B}


def compared() -> Comparison:
    """The student is 1 s off, the base 4 s, and 2 s on the second set; the other answered one set only."""
    base = model_predictions("base", shifted(A, 4.0), shifted(B, 2.0))
    student = model_predictions("student", shifted(A, 1.0) | shifted(B, 1.0))
    return compare(SETS, [student, model_predictions("other", shifted(B, 0.0))], PAPER, base)


def test_models_times_data_sets_by_hand() -> None:
    found = compared()
    assert list(found.results) == ["base", "student", "other"]
    assert list(found.results["other"]) == ["mine"]
    # Spans of 8 s, x s off: IoU (8 − x) / (8 + x).
    for model, name, x in (
        ("base", "Charades-TimeLens", 4),
        ("base", "mine", 2),
        ("student", "mine", 1),
        ("other", "mine", 0),
    ):
        assert found.results[model][name].metrics.miou == pytest.approx(100 * (8 - x) / (8 + x))
        assert found.results[model][name].metrics.missing == 0
    rise = found.results["student"]["Charades-TimeLens"].difference
    assert rise is not None
    assert rise["mIoU"].value == pytest.approx(100 * (7 / 9 - 4 / 12))
    assert rise["mIoU"].ci95 == pytest.approx((rise["mIoU"].value,) * 2)  # every row rose by the same
    assert (rise["R@0.3"].value, rise["R@0.7"].value) == (0.0, 100.0)
    assert found.results["base"]["mine"].difference is None


def test_a_difference_is_drawn_in_pairs_over_videos() -> None:
    """The interval equals that of resampling the videos' differences one by one."""
    rng = np.random.default_rng(3)
    rows = samples("r", videos=30, queries=3)
    before = {s.id: (s.spans[0][0], s.spans[0][1] + float(rng.uniform(0, 8))) for s in rows}
    after = {i: (start, end - float(rng.uniform(-2, 4))) for i, (start, end) in before.items()}
    found = compare(
        {"r": rows}, [model_predictions("after", after)], PAPER, model_predictions("before", before)
    )
    difference = found.results["after"]["r"].difference
    assert difference is not None
    values = {}
    for name, given in (("before", before), ("after", after)):
        single = compare({"r": rows}, [model_predictions(name, given)], PAPER).results[name]["r"]
        assert single.metrics.miou == pytest.approx(found.results[name]["r"].metrics.miou)
        values[name] = single.metrics.miou
    assert difference["mIoU"].value == pytest.approx(values["after"] - values["before"])

    def iou(span: tuple[float, float], true: tuple[float, float]) -> float:
        shared = min(span[1], true[1]) - max(span[0], true[0])
        return max(shared, 0) / (max(span[1], true[1]) - min(span[0], true[0]))

    rises = np.array([iou(after[s.id], s.spans[0]) - iou(before[s.id], s.spans[0]) for s in rows])
    by_video = rises.reshape(30, 3)  # all videos have three queries: a mean of means
    slow = [by_video[rng.integers(0, 30, 30)].mean() for _ in range(4000)]
    assert difference["mIoU"].ci95 == pytest.approx(100 * np.percentile(slow, [2.5, 97.5]), abs=0.6)


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(UserError, match=r"a-0-0.*one.*two"):
        compare({"one": A, "two": A}, [model_predictions("m", shifted(A, 0))], PAPER)
    with pytest.raises(UserError, match=r"'m'.*NAME="):
        compare(
            {"one": A}, [model_predictions("m", shifted(A, 0)), model_predictions("m", shifted(A, 1))], PAPER
        )
    with pytest.raises(UserError, match=r"m-0\.jsonl.*made from this data"):
        compare({"one": A}, [model_predictions("m", shifted(B, 0))], PAPER)
    with pytest.raises(UserError, match=r"m-1\.jsonl.*m-0\.jsonl"):
        compare({"one": A}, [model_predictions("m", shifted(A, 0), shifted(A, 0))], PAPER)


def test_a_file_without_any_answer_counts_as_missing() -> None:
    found = compare({"one": A}, [model_predictions("m", {})], PAPER).results["m"]["one"].metrics
    assert (found.missing, found.miou) == (12, 0.0)


def test_sources_as_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    plain = Sample(id="x", video=Path("x"), query="x")
    spanned = replace(plain, id="y", spans=((1.0, 2.0),))
    sets = by_source({"one": A, "two": [*B, plain, spanned]})
    assert {name: len(rows) for name, rows in sets.items()} == {"s0": 12, "s1": 12, "none": 2}
    assert capsys.readouterr().err == ""
    assert list(by_source({"one": A, "two": [plain]})) == ["s0", "s1"]
    assert "source none: none of its 1 rows is annotated" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"none: no row of the data is annotated"):
        compare(by_source({"one": [plain]}), [model_predictions("m", {"x": (1.0, 2.0)})], PAPER)
    with pytest.raises(UserError, match=r"a-0-0.*one.*two"):
        by_source({"one": A, "two": A})


def test_a_data_set_without_annotations_is_named() -> None:
    plain = [replace(row, spans=()) for row in B]
    model = model_predictions("m", shifted(A, 0.0) | shifted(B, 0.0))
    for sets in ({"two": plain}, {"one": A, "two": plain}):
        with pytest.raises(UserError, match=r"^two: no row of the data is annotated"):
            compare(sets, [model], PAPER)


def test_names_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_files(["runs/a/p.jsonl", "q.jsonl"], "--x") == {"p": ["runs/a/p.jsonl"], "q": ["q.jsonl"]}
    assert list(named_files(["a/p.jsonl", "b/p.jsonl"], "--x")) == ["a/p.jsonl", "b/p.jsonl"]
    assert named_files(["m=a/p.jsonl", "m=b/p.jsonl"], "--x") == {"m": ["a/p.jsonl", "b/p.jsonl"]}
    assert named_files(["runs/lr=1/p.jsonl"], "--x") == {"p": ["runs/lr=1/p.jsonl"]}
    Path("lr=1.jsonl").touch()
    assert named_files(["lr=1.jsonl"], "--x") == {"lr=1": ["lr=1.jsonl"]}
    for word in ("=p.jsonl", "m=", ""):
        with pytest.raises(UserError, match="NAME=FILE"):
            named_files([word], "--x")


# --- formats


def cells(line: str, between: str) -> list[str]:
    return [cell.strip() for cell in line.split(between)]


def test_markdown_holds_every_figure() -> None:
    text = comparison_formats.as_markdown(comparison_formats.make_table(compared(), with_published=True))
    measured, printed_rows, notes = text.split("\n\n", 1)[0], text.split("not measured here:\n\n")[1], text
    lines = measured.splitlines()
    assert cells(lines[0], "|")[1:-1] == [
        "",
        "Charades-TimeLens R@0.3",
        *METRICS[1:],
        "mine R@0.3",
        *METRICS[1:],
    ]
    assert {line.count("|") for line in lines} == {10}
    rows = {cells(line, "|")[1]: cells(line, "|")[2:-1] for line in lines[2:]}
    models = ["base", "student", "student − base", "other", "other − base"]
    assert list(rows) == [*models, "best constant answer"]
    assert rows["base"][3] == "33.3 [33.3, 33.3]"
    assert rows["student − base"][3] == "+44.4 [+44.4, +44.4]"
    assert rows["other"] == ["–"] * 4 + ["100.0 [100.0, 100.0]"] * 4
    # The paper's own rows stand apart, and have figures only for its own data sets.
    assert "†" not in measured and all("†" in line for line in printed_rows.split("\n\n")[0].splitlines()[2:])
    line = next(line for line in printed_rows.splitlines() if line.startswith("| Video-OPD"))
    assert cells(line, "|")[2:-1] == ["73.1", "45.8", "32.4", "52.0", *"––––"]
    assert (
        "- protocol paper: prompt paper" in notes
        and "- student, mine: 12 rows; parse rules given 12" in notes
    )


def test_latex_is_a_whole_tabular() -> None:
    table = comparison_formats.make_table(compared(), with_published=True)
    text = comparison_formats.as_latex(table)
    body = text[text.index(r"\begin{tabular}{lcccccccc}") : text.index(r"\end{tabular}")]
    rows = [line for line in body.splitlines() if line.endswith(r" \\") and r"\multicolumn" not in line]
    assert {line.count("&") for line in rows} == {8}
    assert len(rows) == 1 + len(table.measured) + len(published().rows)
    assert r"student $-$ base & $+0.0$" in body
    assert r"33.3 {\scriptsize $[33.3, 33.3]$}" in body
    assert r"\multicolumn{9}{l}{\textit{$^\dagger$ published in" in body
    assert all(line.startswith("% ") for line in text.split("\\end{tabular}\n")[1].splitlines())
    assert "†" not in body and "–" not in body and "−" not in body


@pytest.mark.parametrize(
    ("name", "written"),
    [("a_b & 50%", r"a\_b \& 50\%"), ("[x]", "{[}x]"), ("-3.1", "$-3.1$"), ("re-run", "re-run")],
)
def test_latex_names_are_escaped(name: str, written: str) -> None:
    assert comparison_formats._latex(name) == written


def test_no_name_ends_its_place_in_any_format() -> None:
    odd = "a\n% b\r| <script> `x` [l](u) \x1b[31m \\input"
    cells = (comparison_formats.Cell(value="1"),) * 4
    row = comparison_formats.Row(name=odd, cells={odd: cells})
    table = comparison_formats.Table(data_sets=(odd,), measured=(row,), published=(), notes=(odd,))
    plain = replace(table, measured=(replace(row, name="m"),), data_sets=("d",), notes=("n",))
    for write in (comparison_formats.as_markdown, comparison_formats.as_latex, comparison_formats.as_text):
        text = write(table)
        assert text.count("\n") == write(plain).count("\n")
        assert "\r" not in text and "\x1b" not in text
    markdown = comparison_formats.as_markdown(table)
    assert not re.search(r"(?<!\\)<script|(?<!\\)`x", markdown)
    latex = comparison_formats.as_latex(table)
    assert r"\input" not in "\n".join(line for line in latex.splitlines() if not line.startswith("%"))


def test_json_keeps_published_rows_apart() -> None:
    record = json.loads(json.dumps(comparison_formats.as_json(compared(), with_published=True)))
    assert set(record["models"]) == {"base", "student", "other"}
    student = record["models"]["student"]["mine"]
    assert student["difference"]["mIoU"]["value"] == pytest.approx(100 * (7 / 9 - 6 / 10))
    assert {"n", *METRICS, "ci95", "rules", "protocol", "unparsed", "missing"} <= set(student)
    assert record["protocol"]["name"] == "paper" and record["baseline"] == "base"
    theirs = record["published"]
    assert theirs["note"] == "not measured here" and "2602.02994" in theirs["source"]
    assert theirs["models"]["Video-OPD [Qwen3-VL-8B]"]["Charades-TimeLens"]["R@0.7"] == 32.4
    assert "mine" not in theirs["models"]["Video-OPD [Qwen3-VL-8B]"]
    assert "published" not in comparison_formats.as_json(compared())


def printed(width: int, terminal: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, color_system=None)
    print_table(comparison_formats.make_table(compared(), with_published=True), console)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


def test_a_wide_terminal_shows_one_table_a_narrow_one_a_table_a_data_set() -> None:
    wide, narrow = printed(200), printed(90)
    assert wide.count("┏") == 1 and narrow.count("┏") == 2
    for text in (wide, narrow):
        assert "…" not in text
        assert "GPT-4o†" in text and "not measured here" in text and "protocol paper" in text


@pytest.mark.parametrize("width", range(20, 90, 7))
def test_every_figure_is_whole_on_a_narrow_terminal(width: int) -> None:
    """A table whose columns would cut one in two is printed as lines, which the terminal wraps."""
    text = printed(width)
    assert "…" not in text and ("┏" in text) == (width > 50)
    for figure in ("[100.0,", "33.3]", "60.6", "44.5", "23.5"):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", text), figure


def test_no_terminal_shows_lines() -> None:
    lines = printed(80, terminal=False).splitlines()
    assert lines[0] == (
        "base, Charades-TimeLens: R@0.3 100.0 [100.0, 100.0], R@0.5 0.0 [0.0, 0.0], R@0.7 0.0 [0.0, 0.0], "
        "mIoU 33.3 [33.3, 33.3]"
    )
    assert "GPT-4o† (published), Charades-TimeLens: R@0.3 60.6, R@0.5 44.5, R@0.7 23.5, mIoU –" in lines


def test_figures_alone_on_request() -> None:
    assert (
        "["
        not in comparison_formats.as_markdown(
            comparison_formats.make_table(compared(), intervals=False)
        ).split("\n\n")[0]
    )


# --- what the paper printed


def test_published_rows_are_whole_and_plausible() -> None:
    rows = published().rows
    assert len(rows) == 22 == len({row.name for row in rows})
    for row in rows:
        assert tuple(row.scores) == published().data_sets
        for r3, r5, r7, miou in row.scores.values():
            assert 0 < r7 < r5 < r3 < 100 and (miou is None or r7 < miou < r3)
    # Two rows of table 1, and the mIoU of table 4, read off again.
    base = next(row for row in rows if row.name == "Qwen3-VL-8B-Instruct")
    assert base.reproduced and base.scores["QVHighlights-TimeLens"] == (46.6, 38.2, 29.5, 36.9)
    gemini = next(row for row in rows if row.name == "Gemini-2.5-Pro")
    assert gemini.scores["ActivityNet-TimeLens"] == (72.3, 64.2, 47.1, None)


def test_average_recalls_are_means_of_nine_recalls() -> None:
    """Those of the paper are computed; the four that were printed alone are as printed (arXiv 2609.34581)."""
    found = {average.name: average for average in published().averages}
    assert len(found) == len(published().averages) == 26
    nine = [73.1, 45.8, 32.4, 60.5, 45.6, 35.8, 73.8, 60.3, 50.4]  # Video-OPD in table 1
    assert found["Video-OPD [Qwen3-VL-8B]"].value == pytest.approx(sum(nine) / 9)
    assert found["Video-OPD [Qwen3-VL-8B]"].source == "Video-OPD, arXiv 2602.02994, table 1, 4"
    alone = {name: average.value for name, average in found.items() if "2609.34581" in average.source}
    assert alone == {"OPD": 52.8, "Video-OPD": 53.1, "RAL-AD": 53.3, "CAPD": 55.1}
    # What fixes the definition: both papers' figures for the same model.
    assert round(found["Video-OPD [Qwen3-VL-8B]"].value, 1) == alone["Video-OPD"]
    # No row of theirs is a row of figures on a data set: there would be an mIoU in it.
    assert not {row.name for row in published().rows} & set(alone)


def test_an_average_recall_needs_all_three_data_sets_once_and_no_miou() -> None:
    names = ("charades-timelens", "activitynet-timelens", "qvhighlights-timelens")
    scores = {name: (60.0 + i, 40.0, 20.0, 99.0) for i, name in enumerate(names)}
    assert average_recall(scores) == pytest.approx((60 + 61 + 62) / 9 + 60 / 3)
    assert average_recall(scores | {"mine": (1.0, 1.0, 1.0, 1.0)}) == average_recall(scores)
    assert average_recall(dict(list(scores.items())[:2])) is None
    assert average_recall(scores | {"charades-timelens-2": (1.0, 1.0, 1.0, 1.0)}) is None
    assert average_recall(scores | {names[0]: (60.0, None, 20.0, 99.0)}) is None


def test_average_recalls_have_a_section_of_their_own_in_every_format() -> None:
    sets = {f"{name}-TimeLens": samples(name) for name in ("Charades", "ActivityNet", "QVHighlights")}
    one_off = {i: span for rows in sets.values() for i, span in shifted(rows, 1.0).items()}  # IoU 7/9
    four_off = {i: span for rows in sets.values() for i, span in shifted(rows, 4.0).items()}  # IoU 1/3
    some = model_predictions("some", shifted(sets["Charades-TimeLens"], 1.0))
    found = compare(
        sets, [model_predictions("near", one_off), model_predictions("far", four_off), some], PAPER
    )
    table = comparison_formats.make_table(found, with_published=True)
    assert [(a.name, a.value) for a in table.averages[:2]] == [("near", "100.0"), ("far", "33.3")]
    assert "some" not in {a.name for a in table.averages}
    record = comparison_formats.as_json(found, with_published=True)
    assert record["average_recall"] == {"near": 100.0, "far": pytest.approx(100 / 3)}
    assert record["published"]["average_recall"]["models"]["CAPD"] == {
        "value": 55.1,
        "source": "CAPD, arXiv 2609.34581",
    }
    markdown = comparison_formats.as_markdown(table)
    assert "| far | 33.3 | measured |" in markdown
    assert "| CAPD† | 55.1 | CAPD, arXiv 2609.34581 |" in markdown
    assert r"CAPD$^\dagger$ & \multicolumn{12}{l}{55.1 (CAPD, arXiv 2609.34581)} \\" in (
        comparison_formats.as_latex(table)
    )
    text = comparison_formats.as_text(table).splitlines()
    assert "CAPD†: average recall 55.1 (CAPD, arXiv 2609.34581)" in text
    assert "near: average recall 100.0 (measured)" in text
    for written in (markdown, "\n".join(text)):  # the name stands in no row of figures
        assert sum("CAPD†" in line for line in written.splitlines()) == 1
    plain = comparison_formats.make_table(found)
    assert plain.averages == () and "average recall" not in comparison_formats.as_text(plain)


def test_published_names_mean_the_corrected_annotations_only() -> None:
    assert published_name("charades-timelens") == "Charades-TimeLens"
    assert published_name("QVHighlights_TimeLens test") == "QVHighlights-TimeLens"
    assert published_name("charades_sta_test") is None and published_name("activitynet") is None
    with pytest.raises(UserError, match="--data Charades-TimeLens=FILE"):
        comparison_formats.published_rows(("charades_sta_test",))
