"""Reports: what they say is what the files say, nothing is fetched, nothing is executed."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from report_cases import rounds_run

from video_opd.config import dump_recipe, recipe_from_dict
from video_opd.errors import UserError
from video_opd.reports import charts, story, tables
from video_opd.reports.gallery import Pictures, timeline
from video_opd.reports.html import write_report
from video_opd.reports.runs import Evaluation, Run, read_run
from video_opd.reports.terminal import before_after
from video_opd.reports.tokens import Explainer

PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
NASTY = "<script>alert('x')</script> & \"the\" <b>cat</b>"


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics_row(step: int, kl: float) -> dict[str, Any]:
    return {
        "step": step,
        "reverse_kl/sampled": kl,
        "reverse_kl/analytic": None,  # not measured
        "reward/mean": -kl,
        "response/iou_mean": 0.5,
        "update/grad_norm": 1.0 + step % 3,
        "time/decode_wait_s": 0.0,
        "time/sample_s": 1.0,
        "time/update_s": 2.0,
        "time/step_s": 3.0,
    }


def metrics_record(model: str, testset: str, miou: float, half: float = 3.0) -> dict[str, Any]:
    return {
        "model": model,
        "testset": testset,
        "n": 120,
        "mIoU": miou,
        "R@0.3": 80.0,
        "R@0.5": 50.0,
        "R@0.7": 20.0,
        "ci95": {"mIoU": [miou - half, miou + half]},
        "unparsed": 1,
        "missing": 0,
        "best_constant": {"mIoU": 21.0},
        "query_swap": {"share": 91.0},
        "protocol": {"name": "paper", "deviations": {"max_new_tokens": 16} if model == "student" else {}},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with everything: the mean mIoU is base 40, student 46, teacher 50."""
    run = tmp_path / "run"
    write_rows(run / "metrics.jsonl", [metrics_row(step, 0.5 - 0.012 * step) for step in range(1, 41)])
    (run / "recipe.yaml").write_text(f'method: video-opd\noptim:\n  lr: 0.0001\nnote: "{NASTY[:20]}"\n')
    (run / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.15"}}))
    for testset, offset in (("short", 10.0), ("long", -10.0)):
        for model, miou in (("base", 40.0), ("student", 46.0), ("teacher", 50.0)):
            path = run / "eval" / f"{model}-{testset}.json"
            path.parent.mkdir(exist_ok=True)
            half = 2.0 if testset == "short" else 4.0  # only on "short" are the intervals apart
            path.write_text(json.dumps(metrics_record(model, testset, miou + offset, half)))
    rollout = {"step": 1, "id": "a", "query": NASTY, "tokens": ["1", " to\n", "<|im_end|>"]}
    rollout |= {"r": [-3.0, 0.5, None], "iou": 0.25, "truncated": True}
    write_rows(run / "rollouts.jsonl", [{**rollout, "step": step} for step in range(1, 21)])
    row: dict[str, Any] = {"id": "a", "video": "a.mp4", "query": NASTY, "duration": 10.0, "truth": [[2, 4]]}
    row |= {"answers": {"base": None, "student": [3, 5], "teacher": [2, 4]}}
    row |= {"frames": [PIXEL] * 4, "frame_times_s": [0.0, 2.0, 6.0, 9.0]}
    write_rows(run / "eval" / "timelines.jsonl", [row] * 14)
    edges = [round(-1 + 0.1 * i, 1) for i in range(21)]
    before, after = [0] * 20, [0] * 20
    before[9], before[15], after[15] = 30, 10, 10
    summary = {"strategy": "topk", "rows": 40, "candidates": 25, "selected": 10, "min_teacher_iou": 0.5}
    summary |= {"delta_before": before, "delta_after": after, "delta_edges": edges}
    (run / "select.json").write_text(json.dumps(summary))
    return run


class Page(HTMLParser):
    """The structure of a page: tags balanced, what it would load, its text, its SVG coordinates."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.outside: list[tuple[str, float]] = []
        self.box: tuple[float, float] | None = None
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = {name: value or "" for name, value in attrs}
        assert not any(name.startswith("on") for name in named)
        self.loads += [named[name] for name in ("src", "href", "data", "action") if name in named]
        if tag == "svg":
            _, _, width, height = map(float, named["viewbox"].split())
            self.box = (width, height)
        if self.box:
            for names, limit in (("x x1 x2 cx", self.box[0]), ("y y1 y2 cy", self.box[1])):
                for name in names.split():
                    if name in named and not -0.01 <= float(named[name]) <= limit + 0.01:
                        self.outside.append((f"{tag} {name}", float(named[name])))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "svg":
            self.box = None

    def handle_data(self, data: str) -> None:
        self.text += data


def page(out: Path) -> Page:
    return Page(out.read_text(encoding="utf-8"))


# --- what it says ------------------------------------------------------------------------------------


def outcome(run: Run) -> dict[str, dict[str, str]]:
    """Cells of the outcome's table by test set and column."""
    return {row[0]: dict(zip(story.OUTCOME_HEADER[1:], row[1:], strict=True)) for row in story.outcome(run)}


def tiles(run: Run) -> dict[str, str]:
    return {tile.label: f"{tile.value}; {tile.note}" for tile in story.tiles(run)}


def test_headline_and_outcome_are_computed_from_the_numbers(folder: Path) -> None:
    run = read_run(folder)
    text = story.headline(run)
    # Means over the two test sets; (46 − 40) / (50 − 40).
    assert "After 40 steps of Video-OPD" in text
    assert "by 46.0%, up from 40.0%; its teacher's by 50.0%" in text
    found = outcome(run)
    assert found["mean"] == {
        "base": "40.0",
        "student": "46.0",
        "change": "+6.0",
        "the interval says": "",
        "way to the teacher": "60%",
        "best constant": "",
    }
    assert found["short"]["base"] == "50.0 [48.0, 52.0]" and found["short"]["student"] == "56.0 [54.0, 58.0]"
    assert [found[name]["the interval says"] for name in ("short", "long")] == [
        "above the base's",
        "overlaps",
    ]
    assert found["short"]["best constant"] == "21.0"
    # First and last tenth: means of 0.488…0.452 and of 0.056…0.020.
    assert tiles(run)["Reverse KL"].startswith("0.47 → 0.038; nats a token")
    assert tiles(run)["Steps"] == "40; 2 min 00 s in all"


def test_the_headline_of_rounds_counts_the_steps_that_the_evaluated_student_saw(tmp_path: Path) -> None:
    folder = rounds_run(tmp_path / "rounds")  # three rounds of 30 steps
    text = story.headline(read_run(folder))
    assert text.startswith("After 90 steps of Video-OPD in 3 rounds the") and "not evaluated" not in text
    for file in (folder / "round-3" / "eval").iterdir():
        file.unlink()
    metrics = folder / "round-3" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:25]))
    run = read_run(folder)
    text = story.headline(run)
    assert run.student == "round 2" and text.startswith("After 60 steps of Video-OPD in 2 rounds the")
    assert text.endswith("%. Round 3 has made 25 steps and is not evaluated yet.")
    assert tiles(run)["Steps"].startswith("85;")


def test_a_run_that_made_it_worse_is_told_so(folder: Path) -> None:
    for testset in ("short", "long"):
        path = folder / "eval" / f"student-{testset}.json"
        path.write_text(json.dumps(metrics_record("student", testset, 30.0)))
    run = read_run(folder)
    assert "by 30.0%, down from 40.0%" in story.headline(run)
    assert outcome(run)["mean"]["change"] == "-10.0" and outcome(run)["mean"]["way to the teacher"] == "-100%"


def with_student(folder: Path, **mious: float) -> Run:
    """The run when the student has these scores; the base has 50 (short) and 30 (long)."""
    for testset, miou in mious.items():
        path = folder / "eval" / f"student-{testset}.json"
        path.write_text(json.dumps(metrics_record("student", testset, miou)))
    return read_run(folder)


def test_no_test_set_that_went_the_other_way_is_hidden(folder: Path) -> None:
    run = with_student(folder, short=53.0, long=29.0)
    assert "by 41.0%, up from 40.0%" in story.headline(run)
    assert {name: cells["change"] for name, cells in outcome(run).items()} == {
        "short": "+3.0",
        "long": "-1.0",
        "mean": "+1.0",
    }
    assert {cells["the interval says"] for cells in outcome(run).values()} == {"overlaps", ""}
    run = with_student(folder, short=47.0, long=31.0)
    assert "by 39.0%, down from 40.0%" in story.headline(run)
    assert [cells["change"] for cells in outcome(run).values()] == ["-3.0", "+1.0", "-1.0"]


def test_what_is_written_as_equal_is_called_so(folder: Path) -> None:
    assert "by 40.0%, as before: 40.0%" in story.headline(with_student(folder, short=50.02, long=30.02))
    write_rows(folder / "metrics.jsonl", [metrics_row(1, 0.3001), metrics_row(2, 0.3002)])
    assert tiles(read_run(folder))["Reverse KL"].startswith("0.3 → 0.3;")


def test_intervals_that_lie_below_the_bases_do_not_overlap(folder: Path) -> None:
    for path in (folder / "eval").glob("*-long.json"):
        path.unlink()
    for miou, place in ((46.0, "overlaps"), (40.0, "below the base's")):  # 43–49 and 37–43; base 48–52
        found = outcome(with_student(folder, short=miou))
        assert list(found) == ["short"] and found["short"]["the interval says"] == place


def test_a_run_without_its_base_has_a_headline_and_no_outcome(folder: Path) -> None:
    for path in (folder / "eval").glob("base-*.json"):
        path.unlink()
    run = read_run(folder)
    assert story.headline(run).startswith(
        "40 steps of Video-OPD were made; student reaches 56.0% mIoU on short"
    )
    assert story.outcome(run) == []


def test_no_way_to_the_teacher_where_there_is_no_gap() -> None:
    gap = story.Gap(testsets=["a"], base=40.0, student=45.0, teacher=40.2)
    assert gap.closed is None
    assert replace(gap, teacher=50.0).closed == pytest.approx(0.5)
    assert replace(gap, teacher=None).closed is None


def test_the_page_holds_every_part(folder: Path, tmp_path: Path) -> None:
    found = page(write_report([folder], tmp_path / "report.html"))
    for part in (
        "What it changed",
        "above the base's",
        "Before and after",
        "50.0",
        "91%",
        "Learning curves",
        "Reverse KL to the teacher",
        "Where the time goes",
        "passed the gate",
        "δ before and after",
        "Answers on real frames",
        "2 more are in eval/timelines.jsonl",
        "First steps",
        "Last steps",
        "cut off at the length limit",
        "recipe.yaml",
        "packages.torch",
    ):
        assert part in found.text, part
    assert found.text.count("How to read") >= 5
    assert found.tags.count("img") == 12 * 3


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "eval", "rollouts.jsonl", "select.json", "environment.json"]
)
def test_what_a_run_has_not_written_is_left_out(folder: Path, tmp_path: Path, missing: str) -> None:
    def remove(path: Path) -> None:
        for child in path.iterdir() if path.is_dir() else ():
            remove(child)
        path.rmdir() if path.is_dir() else path.unlink()

    remove(folder / missing)
    assert page(write_report([folder], tmp_path / "report.html")).outside == []


def test_several_runs_are_compared(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "eval").mkdir(parents=True)
    (other / "recipe.yaml").write_text("method: grpo\noptim:\n  lr: 0.0005\n")
    write_rows(other / "metrics.jsonl", [metrics_row(step, 0.9) for step in range(1, 6)])
    (other / "eval" / "student-short.json").write_text(json.dumps(metrics_record("student", "short", 61.0)))
    found = page(write_report([folder, other], tmp_path / "report.html"))
    assert "comparison of 2 runs" in found.text and "Where the recipes differ" in found.text
    comparison = tables.compare([read_run(folder), read_run(other)])
    table = dict(zip(comparison.header, zip(*comparison.rows, strict=True), strict=True))
    assert table["mIoU short"] == ("56.0 [54.0, 58.0]", "61.0 [58.0, 64.0]")
    assert table["mIoU long"] == ("36.0 [32.0, 40.0]", "–")
    assert table["method"] == ("Video-OPD", "GRPO")
    assert dict(comparison.settings)["optim.lr"] == ["0.0001", "0.0005"]


def test_the_terminal_gets_the_same_table(folder: Path) -> None:
    lines = before_after(read_run(folder))
    assert lines[0].split() == ["mIoU", "[95%]", "base", "student", "teacher", "best", "constant"]
    assert lines[1].startswith("short") and "56.0 [54.0, 58.0]" in lines[1] and lines[1].endswith("21.0")
    assert lines[3:] == ["protocol paper", "protocol paper, but max_new_tokens 16"]


def test_the_protocol_stands_beside_the_scores(folder: Path, tmp_path: Path) -> None:
    text = page(write_report([folder], tmp_path / "report.html")).text
    assert "protocol paper (base, teacher); paper, but max_new_tokens 16 (student)" in text


# --- safe and complete -------------------------------------------------------------------------------


def test_nothing_is_loaded_and_nothing_is_executed(folder: Path, tmp_path: Path) -> None:
    out = write_report([folder], tmp_path / "deep" / "report.html")
    found = page(out)
    assert found.tags.count("script") == 1 and "link" not in found.tags and "iframe" not in found.tags
    assert all(url.startswith("data:image/") for url in found.loads)
    assert not re.search(r"url\(|@import|https?:", out.read_text())
    assert NASTY in found.text  # as text
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_nothing_is_drawn_outside_of_its_picture(folder: Path, tmp_path: Path) -> None:
    rows = [{"step": 1, "reverse_kl/sampled": 2e-7}, {"step": 2, "reverse_kl/sampled": -4e5}]
    write_rows(folder / "metrics.jsonl", rows + [metrics_row(step, 0.1) for step in range(3, 900)])
    found = page(write_report([folder], tmp_path / "report.html"))
    assert "svg" in found.tags and found.outside == []


def test_reading_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from video_opd.reports.html import write_report; "
        f"write_report([{str(folder)!r}], {str(tmp_path / 'r.html')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# --- reading run folders -----------------------------------------------------------------------------


def test_a_row_that_is_being_written_is_not_an_error(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 41, "reverse_kl/sam')
    assert len(read_run(folder).metrics) == 40
    path.write_text('{"step": 1, "rev\n' + path.read_text())
    run = read_run(folder)
    assert len(run.metrics) == 40
    assert run.left_out[0].startswith("metrics.jsonl: not JSON") and run.left_out[0].endswith("(on line 1)")
    assert run.left_out[1:] == ("metrics.jsonl: a half line (on line 42)",)


def test_an_old_recipe_and_a_new_one_are_compared_as_they_are_understood(
    folder: Path, tmp_path: Path
) -> None:
    new = {"data": {"train": "a"}, "optim": {"lr": 3e-4}, "teacher": {"path": "t"}}
    other = tmp_path / "other"
    other.mkdir()
    write_rows(other / "metrics.jsonl", [metrics_row(1, 0.9)])
    text = dump_recipe(recipe_from_dict(new))
    (folder / "recipe.yaml").write_text(text)
    # Earlier versions wrote the keys of other methods, too, and lr was another here.
    old = text.replace("lr: 0.0003", "lr: 0.0001").replace("loss:", "loss:\n  kl_beta: 0.0", 1)
    (other / "recipe.yaml").write_text(old)
    settings = dict(tables.compare([read_run(folder), read_run(other)]).settings)
    assert settings == {"optim.lr": ["0.0003", "0.0001"]}


def test_a_step_that_was_repeated_counts_once(folder: Path) -> None:
    write_rows(folder / "metrics.jsonl", [metrics_row(s, kl) for s, kl in ((1, 0.5), (2, 9.0), (2, 0.4))])
    assert read_run(folder).series("reverse_kl/sampled") == ([1.0, 2.0], [0.5, 0.4])
    assert read_run(folder).series("reverse_kl/analytic") == ([], [])  # null is no number


def test_models_and_test_sets_come_in_the_order_of_the_story(folder: Path) -> None:
    run = read_run(folder)
    assert run.models == ["base", "student", "teacher"] and run.testsets == ["short", "long"]


def test_names_come_from_the_file_where_the_record_has_none(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "student-short.json").write_text('{"n": 3, "mIoU": 10.0}')
    (tmp_path / "eval" / "notes.json").write_text('{"who": "me"}')
    (only,) = read_run(tmp_path).evaluations
    assert (only.model, only.testset, only.best_constant, only.query_swap) == ("student", "short", None, None)


@pytest.mark.parametrize("content", [None, {}, {"notes.txt": "x"}])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, content: dict[str, str] | None) -> None:
    folder = tmp_path / "none"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match="run"):
        write_report([folder], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_a_report_that_cannot_be_written_names_the_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape("file/report.html")):
        write_report([folder], tmp_path / "file" / "report.html")


# --- pictures ----------------------------------------------------------------------------------------


def test_bars_and_frames_of_a_timeline_share_one_axis() -> None:
    row = {"id": "a", "query": "q", "duration": 10.0, "truth": [[2, 4], [9, 10]]}
    row |= {"answers": {"student": [3.0, 5.0], "teacher": None, "other": [8.0, 12.0]}}
    row |= {"frames": [PIXEL] * 3, "frame_times_s": [0.0, 4.0, 9.0]}
    view = timeline(row, Pictures())
    assert [lane.label for lane in view.lanes] == ["truth", "student", "teacher", "other"]
    assert view.lanes[0].spans == [(20, 20), (90, 10)]
    assert view.lanes[1].spans == [(30, 20)] and view.lanes[1].text == "3.0–5.0 s · IoU 0.33"
    assert view.lanes[2].spans == [] and view.lanes[2].text == "no span"
    assert view.lanes[3].spans == [(80, 20)]  # cut to the video
    # Each third of the video has the frame that is nearest its middle.
    assert [frame.time for frame in view.frames] == ["0.0", "4.0", "9.0"]


def test_of_many_frames_a_few_are_kept_and_fewer_where_there_is_no_room() -> None:
    times_s = [i * 0.5 for i in range(20)]  # 0 to 9.5 of 10 s
    film = Pictures().film([f"uri{i}" for i in range(20)], times_s, 10.0)
    # The middles of eighths: 0.625, 1.875, 3.125, 4.375, …
    assert [frame.time for frame in film] == ["0.5", "2.0", "3.0", "4.5", "5.5", "7.0", "8.0", "9.5"]
    kept = {
        name: [i for i, f in enumerate(film) if name in f.classes.split()]
        for name in ("of-4", "of-3", "of-2")
    }
    assert kept == {"of-4": [1, 3, 5, 7], "of-3": [1, 4, 6], "of-2": [2, 6]}
    (only,) = Pictures().film(["uri"], [3.0], 10.0)
    assert only.classes == "of-4 of-3 of-2" and only.uri == "data:image/jpeg;base64,uri"


def test_a_page_takes_no_more_pictures_than_fit() -> None:
    pictures = Pictures(most_bytes=100)
    assert len(pictures.film(["x" * 40] * 2, [1.0, 2.0], 3.0)) == 2
    assert pictures.film(["x" * 40], [1.0], 3.0) == []
    assert len(pictures.film(["x" * 20], [1.0], 3.0)) == 1


def test_tokens_are_coloured_by_sign_and_size_of_r(folder: Path) -> None:
    early, late = Explainer().rollouts(read_run(folder))
    assert [view.step for view in early] == list(range(1, 9))
    assert [view.step for view in late] == list(range(13, 21))
    first, second, third = early[0].tokens
    assert (first.sign, first.strength) == ("down", 1.0)  # |r| above 2 has the full colour
    assert (second.sign, second.strength, second.text) == ("up", 0.25, " to⏎")
    assert (third.strength, third.text) == (0.0, "<|im_end|>")


FINITE = st.floats(-1e9, 1e9, allow_nan=False, width=32)


@given(FINITE, FINITE)
@example(0.0, 1e-45)  # rounding must not make one of two ticks
@example(0.3, math.nextafter(0.3, 1))
@example(2.0**53, 2.0**53)  # half more or less is rounded away
@example(-1e100, -1e100)
def test_ticks_are_round_and_cover_the_values(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    found = charts.ticks(low, high)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert found[0] <= low + slack and found[-1] >= high - slack
    assert 2 <= len(found) <= 9
    steps = {round((y - x) / (found[-1] - found[0]), 6) for x, y in pairwise(found)}
    assert len(steps) == 1
    if high - low > 1e-3:
        leading = (found[1] - found[0]) / 10 ** math.floor(math.log10(found[1] - found[0]) + 1e-9)
        assert min(abs(leading - round_step) for round_step in (1, 2, 2.5, 5, 10)) < 1e-3


@given(st.lists(FINITE, min_size=1, max_size=1500))
def test_binning_keeps_the_mean_and_the_order(ys: list[float]) -> None:
    xs = [float(i) for i in range(len(ys))]
    bx, by = charts.bins(xs, ys)
    assert len(bx) == len(by) == min(len(ys), charts.MOST_POINTS)
    assert bx == sorted(bx) and min(ys) - 1 <= min(by) and max(by) <= max(ys) + 1
    assert len(charts.smooth(by)) == len(by)


def test_smoothing_keeps_a_line_and_does_not_lag() -> None:
    ramp = [float(i) for i in range(100)]
    assert charts.smooth(ramp)[10:90] == pytest.approx(ramp[10:90])


def test_a_curve_ends_where_its_last_value_lies() -> None:
    series = charts.Series(label="a", colour="student", xs=[1, 2, 3], ys=[0.0, 5.0, 10.0])
    chart = charts.line_chart("t", "h", [series])
    assert chart is not None
    (line,) = chart.lines
    ticks = {tick.label: tick.at for tick in chart.y_ticks}
    assert line.end == (chart.right, ticks["10"])
    assert line.raw.startswith(f"M{chart.left:g},{ticks['0']:g}L")
    empty = charts.Series(label="a", colour="x", xs=[], ys=[])
    assert charts.line_chart("t", "h", [empty]) is None


def test_stacked_parts_add_up_to_the_whole() -> None:
    parts = [
        charts.Series(label=name, colour="x", xs=list(range(1, 121)), ys=[value] * 120)
        for name, value in (("a", 1.0), ("b", 3.0))
    ]
    chart = charts.stack_chart("t", "h", parts)
    assert chart is not None
    at = {tick.label: tick.at for tick in chart.y_ticks}
    columns: dict[float, list[charts.Box]] = {}
    for box in chart.boxes:
        columns.setdefault(box.x, []).append(box)
    assert len(columns) == charts.MOST_COLUMNS
    for low, high in columns.values():
        assert low.y == high.y + high.height  # no gap, no overlap
        assert low.y + low.height == at["0"] and high.y == pytest.approx(at["4"], abs=0.02)
        assert high.height == pytest.approx(3 * low.height, abs=0.05)


def test_a_histogram_shows_shares_of_each_group() -> None:
    chart = charts.histogram("t", "h", "δ", [-1.0, 0.0, 1.0], [("all", "a", [30, 10]), ("few", "b", [0, 5])])
    assert chart is not None
    at = {tick.label: tick.at for tick in chart.y_ticks}
    heights = [box.height for box in chart.boxes]
    whole = at["0%"] - at["100%"]
    assert heights == pytest.approx([0.75 * whole, 0.25 * whole, 0, whole], abs=0.02)
    assert charts.histogram("t", "h", "δ", [-1.0, 0.0, 1.0], [("all", "a", [0, 0])]) is None


def test_an_interval_is_told_only_where_it_is_known() -> None:
    known = Evaluation(
        model="a", testset="t", n=1, scores={"mIoU": 50.04}, ci95={"mIoU": (40, 60)}, record={}
    )
    assert story.interval(known) == "50.0 [40.0, 60.0]"
    assert story.interval(replace(known, ci95={})) == "50.0"
