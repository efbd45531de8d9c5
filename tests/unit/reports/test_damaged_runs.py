"""Reports about run folders as crashes leave them: each is read as far as it can be, and says the rest.

Every case damages one file of a whole run. The report must be written, and both the page and stderr must name
the file that was damaged.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from video_opd.errors import UserError
from video_opd.reports.html import write_report
from video_opd.reports.run_files import MOST_FILES
from video_opd.reports.runs import read_run

EDGES = [round(-1 + 0.5 * i, 1) for i in range(5)]
RECORDS: dict[str, dict[str, Any]] = {
    "environment.json": {"python": "3.11", "packages": {"torch": "2"}},
    "select.json": {
        "strategy": "topk",
        "rows": 40,
        "selected": 10,
        "delta_edges": EDGES,
        "delta_before": [1, 2, 3, 4],
        "delta_after": [0, 0, 0, 4],
        "min_teacher_iou": 0.5,
        "by_source": {"s": {"candidates": 3, "selected": 2}, "t": {"candidates": 2, "selected": 0}},
    },
    "rounds.json": {"rounds": [{"round": 1, "delta": {"scored": {"mean": 0.1}}}]},
    **{
        f"eval/{model}-short.json": {
            "model": model,
            "testset": "short",
            "n": 12,
            "mIoU": miou,
            "R@0.5": 50.0,
            "ci95": {"mIoU": [miou - 2, miou + 2]},
            "unparsed": 1,
            "missing": 0,
            "best_constant": {"mIoU": 21.0},
            "query_swap": {"share": 91.0},
            "protocol": {"name": "paper", "deviations": {"max_new_tokens": 16}},
        }
        for model, miou in (("base", 40.0), ("student", 46.0))
    },
}
TOKENS: dict[str, Any] = {
    "student_logprobs": [-0.1, -0.5, None],
    "teacher_logprobs": [-3.1, 0.0, None],
    "student_top": [[["1", -0.1], ["2", -3.0]]] * 3,
    "teacher_top": [[["2", -0.1], ["1", -3.1]]] * 3,
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "metrics.jsonl": [
        {"step": step, "reverse_kl/sampled": 0.5 / step, "reward/mean": None, "time/step_s": 3.0}
        for step in range(1, 6)
    ],
    "rollouts.jsonl": [
        {
            "step": step,
            "id": "a",
            "query": "the cat",
            "tokens": ["1", " to", "2"],
            "r": [-3.0, 0.5, None],
            "advantage": [1.0, 1.0, 1.0],
            "iou": 0.25,
            "truncated": False,
            **TOKENS,
        }
        for step in range(1, 6)
    ],
    "eval/annotations-short.jsonl": [
        {
            "id": i,
            "video": f"{i}.mp4",
            "query": "the cat",
            "duration": 20.0,
            "spans": [[0, 10]],
            "source": "s",
        }
        for i in "ab"
    ],
    # They give the mIoU of the records.
    "eval/base-short.jsonl": [
        {"id": i, "query": "the cat", "responses": ["0 to 4"], "spans": [[0, 4]], "rules": ["exact"]}
        for i in "ab"
    ],
    "eval/student-short.jsonl": [
        {"id": i, "query": "the cat", "responses": ["0 to 4.6"], "spans": [[0, 4.6]], "rules": ["exact"]}
        for i in "ab"
    ],
    "eval/failures-short.jsonl": [
        {
            "id": i,
            "frames": ["data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="],
            "frame_times_s": [1.0],
            "tokens": ["1", " to", "2"],
            "r": [-3.0, 0.5, None],
            **TOKENS,
        }
        for i in "ab"
    ],
    "scores.jsonl": [{"id": i, "teacher_iou": 0.75, "student_iou": 0.5} for i in "abc"],
    "selected.jsonl": [{"id": i, "video": "v.mp4", "query": "q", "tvdf": {"delta": 0.25}} for i in "ab"],
    "eval/timelines.jsonl": [
        {
            "id": "a",
            "query": "the cat",
            "duration": 10.0,
            "truth": [[2, 4]],
            "answers": {"base": None, "student": [3, 5]},
            "frames": ["data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="],
            "frame_times_s": [1.0],
        }
    ]
    * 3,
}
RECIPE = 'method: video-opd\noptim:\n  lr: 0.0001\nnote: "abc"\n'
FILES = ["recipe.yaml", *RECORDS, *ROWS]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "eval").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    for name, record in RECORDS.items():
        (folder / name).write_text(json.dumps(record))
    for name, rows in ROWS.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def damaged_report(run: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """The page, and what stderr says was left out; the page must say the same."""
    page = unescape(write_report([run], out).read_text(encoding="utf-8"))
    told = re.findall(r": left out: (.*)", capsys.readouterr().err)
    for line in told:
        assert f"<li>{line}</li>" in page
    assert not re.search(r"\b(nan|inf)\b|Infinity", page)
    return page, told


def test_a_whole_run_leaves_nothing_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, told = damaged_report(run, tmp_path / "r.html", capsys)
    assert told == [] and "What could not be read" not in page
    assert "by 46.0%, up from 40.0%" in page and "5 steps" in page


# --- whole files --------------------------------------------------------------------------------------


def flipped(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 0x80  # no longer UTF-8
    path.write_bytes(blob)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


WHOLE: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-4]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zeros at the end": lambda path: path.write_bytes(path.read_bytes()[:-9] + bytes(9)),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": flipped,
    "a list": lambda path: path.write_text("[]\n"),
    "null": lambda path: path.write_text("null\n"),
    "a text": lambda path: path.write_text('"text"\n'),
    "UTF-16": lambda path: path.write_bytes(path.read_text().encode("utf-16")),
    "a folder": replaced(Path.mkdir),
    "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
    "a link to nothing": replaced(lambda path: path.symlink_to("nowhere")),
    "a pipe": replaced(os.mkfifo),
    "a device without end": replaced(lambda path: path.symlink_to("/dev/zero")),
    "brackets": lambda path: path.write_text("[" * 100_000),
    "repeated keys": lambda path: path.write_text('{"step": 1, "step": 2}\n'),
    "digits": lambda path: path.write_text('{"step": ' + "9" * 5000 + "}\n"),
}


# Files of rows are read alike: every damage is tried on three of them, and a few on the others.
EVERY = {"metrics.jsonl", "rollouts.jsonl", "eval/timelines.jsonl"}
FEW = ("cut", "zeros", "one bit", "a link to itself")
CASES = [(name, damage) for name in FILES for damage in (FEW if name in {*ROWS} - EVERY else WHOLE)]


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_damaged_file_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    WHOLE[damage](run / name)
    page, told = damaged_report(run, tmp_path / "r.html", capsys)
    assert told and all(line.startswith(f"{name}: ") for line in told)
    if name == "eval/base-short.json":
        assert "5 steps of Video-OPD were made; student reaches 46.0%" in page
    if name in ("environment.json", "rollouts.jsonl", "eval/timelines.jsonl"):
        assert "by 46.0%, up from 40.0%" in page


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_no_damage(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (run / name).unlink()
    assert damaged_report(run, tmp_path / "r.html", capsys)[1] == []


# --- values -------------------------------------------------------------------------------------------

HUGE = 10**400
NO_NUMBERS: tuple[Any, ...] = (
    math.nan,
    math.inf,
    -math.inf,
    HUGE,
    -HUGE,
    1e308,
    "nan",
    "inf",
    "3",
    True,
    [],
    {},
    [1],
)


SOME: tuple[Any, ...] = (math.nan, HUGE, "3", True, {}, [1])


def some(*keys: str, also: tuple[Any, ...] = ()) -> list[tuple[str, Any]]:
    return [(key, value) for key in keys for value in (*SOME, *also)]


def values(*keys: str, also: tuple[Any, ...] = ()) -> list[tuple[str, Any]]:
    return [(key, value) for key in keys for value in (*NO_NUMBERS, *also)]


VALUES: dict[str, list[tuple[str, Any]]] = {
    "metrics.jsonl": [
        *values("step", also=(None, -1, 0, 1.5, 2**60)),
        *values("reverse_kl/sampled"),
        *values("time/step_s", also=(-1.0,)),
    ],
    "rollouts.jsonl": [
        *values("step", also=(None, -1, 0.5)),
        *values("r", also=(None, [1.0], [1.0] * 4, ["1", 2, 3])),
        *values("advantage", also=([1.0], "abc")),
        *values("tokens", also=(None, "123", [1, 2, 3], ["1"])),
        *values("iou", also=(-0.5, 1.5)),
        *some("student_logprobs", "teacher_logprobs", also=([1.0], ["1", 2, 3])),
        *some("student_top", "teacher_top", also=([[]], [[["1"]]] * 3, [[[1, 1]]] * 3, [1, 2, 3])),
    ],
    "eval/annotations-short.jsonl": [
        *((k, v) for k, v in some("id", "query", also=(None,)) if not isinstance(v, str)),
        *some("duration", also=(0, -1)),
        *some("spans", also=(None, [[4, 2]], [[2, math.nan]], [["2", "4"]], [None])),
    ],
    "eval/student-short.jsonl": [
        *some("id", also=(None,)),
        *some("responses", also=(None, [None])),
        *some("spans", also=(None, [[1]], [["1", "2"]], [[0, 1e9]], [[0, HUGE]])),
    ],
    "eval/failures-short.jsonl": [
        *some("id", also=(None,)),
        *some("frames", also=("abc", ["data:text/html,<b>"], ["a", "b"])),
        *some("tokens", also=("123", ["1"])),
        *some("r", also=(None, [1.0])),
        *some("teacher_top", also=([[]],)),
    ],
    "scores.jsonl": [
        *some("id", also=(None,)),
        *some("teacher_iou", "student_iou", also=(-0.1, 1.1)),
    ],
    "selected.jsonl": [
        *some("id", also=(None,)),
        *((k, v) for k, v in some("tvdf") if not isinstance(v, dict)),
    ],
    "eval/timelines.jsonl": [
        *values("duration", also=(None, 0, 0.0, -5, 5e-324)),
        *values("truth", also=(None, [[4, 2]], [[2, math.nan]], [[2, HUGE]], [["2", "4"]], [[1]], [None])),
        *values("answers", also=(None, {"student": [5, 3]}, {"student": [3]}, {"student": "3 to 5"})),
        *values("frames", also=("abc", ["data:text/html,<b>"], ["a", "b"], [None])),
        *values("frame_times_s", also=([], [math.nan], [99.0], ["1"], [1.0, 2.0])),
    ],
    "eval/student-short.json": [
        *values("mIoU", also=(None, -1, 101, "46")),
        *values("R@0.5", also=(-1, 101)),
        *values("n", "unparsed", "missing", also=(-1, 1.5)),
        *values("ci95", also=({"mIoU": [50, 40]}, {"mIoU": [1]}, {"mIoU": 3}, {"mIoU": [math.nan, 50]})),
        *values("best_constant", "query_swap", also=({"mIoU": math.nan, "share": "x"},)),
        *values("protocol", also=("paper", {"deviations": [1]})),
        *((key, value) for key in ("model", "testset") for value in (HUGE, 1e308, True, [1])),
    ],
    "select.json": [
        *values("rows", "selected", also=(-1, 1.5)),
        *values("delta_edges", also=(None, [0, 0, 0, 0, 0], [1, 2], EDGES[::-1])),
        *values("delta_before", also=(None, [1, 2], [-1, 2, 3, 4], ["1", 2, 3, 4])),
        *some("by_source", also=({"s": None}, {"s": {"candidates": -1, "selected": 0}})),
    ],
    "rounds.json": values("rounds", also=(None, [None], [{}], [{"round": 0}])),
}
# Values that say that there is nothing, or that are no facts of their own (select.json has lists).
ALLOWED = {
    ("ci95", "{}"), ("protocol", "{}"), ("answers", "{}"), ("truth", "[]"), ("rounds", "[]"),
    ("best_constant", "{}"), ("query_swap", "{}"), ("frames", "[]"), ("frames", "{}"),
    ("frame_times_s", "[1]"), ("spans", "[]"), ("by_source", "{}"),
    ("id", "nan"), ("id", "inf"), ("id", "3"),
    ("responses", "[]"), ("tokens", "[]"),
    ("rows", "[]"), ("rows", "{}"), ("rows", "[1]"),
    ("selected", "[]"), ("selected", "{}"), ("selected", "[1]"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_wrong_value_is_named_and_the_rest_is_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for key, value in VALUES[name]:
        if name in ROWS:
            good = "".join(json.dumps(row) + "\n" for row in ROWS[name])
            (run / name).write_text(good + json.dumps({**ROWS[name][0], "step": 9, key: value}) + "\n")
        else:
            (run / name).write_text(json.dumps({**RECORDS[name], key: value}))
        page, told = damaged_report(run, tmp_path / "r.html", capsys)
        case = (key, repr(value)[:60])
        if (key, str(value)) in ALLOWED:
            continue
        assert told and all(line.startswith(f"{name}: ") for line in told), case
        assert "5 steps" in page or key not in ("step",), case


def test_any_key_may_be_missing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, record in RECORDS.items():
        for key in record:
            (run / name).write_text(json.dumps({k: v for k, v in record.items() if k != key}))
            damaged_report(run, tmp_path / "r.html", capsys)
        (run / name).write_text(json.dumps(record))
    for name, rows in ROWS.items():
        for key in rows[0]:
            row = {k: v for k, v in rows[0].items() if k != key}
            (run / name).write_text(json.dumps(row) + "\n")
            damaged_report(run, tmp_path / "r.html", capsys)


def test_a_row_of_another_file_is_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ROWS:
        for other in ROWS:
            (run / name).write_text(json.dumps(ROWS[other][0]) + "\n")
            damaged_report(run, tmp_path / "r.html", capsys)


# --- folders ------------------------------------------------------------------------------------------

BOMB = "a: &a [1, 2]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghijklmn"))
MERGES = "k0: &k0 {a: b}\n" + "".join(f"k{i}: &k{i} {{<<: [*k{i - 1}, *k{i - 1}]}}\n" for i in range(1, 31))


@pytest.mark.parametrize(
    "text", [BOMB, MERGES, "a: &a [*a]", "optim: {lr: 1}\noptim: {lr: 2}\n", "just text"]
)
def test_a_recipe_that_no_reader_should_follow(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (run / "recipe.yaml").write_text(text)
    _, told = damaged_report(run, tmp_path / "r.html", capsys)
    assert [line.split(":")[0] for line in told] == ["recipe.yaml"]


def test_a_recipe_of_odd_keys_is_shown(run: Path, tmp_path: Path) -> None:
    for text in (
        "1: {2: 3}\nnull: x\n",
        "method: [1]\n",
        "method: 2026-01-01\n",
        "optim: {1.5: {2: [{}]}}\n",
    ):
        (run / "recipe.yaml").write_text(text)
        write_report([run, run], tmp_path / "r.html")


def test_an_environment_without_end_is_left_out(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ('{"a": ' * 400 + "1" + "}" * 400, json.dumps({str(i): i for i in range(20_000)})):
        (run / "environment.json").write_text(text)
        _, told = damaged_report(run, tmp_path / "r.html", capsys)
        assert [line.split(":")[0] for line in told] == ["environment.json"]


def test_thousands_of_rollouts_and_tokens_make_a_page_of_a_usual_size(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {key: value for key, value in ROWS["rollouts.jsonl"][0].items() if key not in TOKENS}
    long = {**row, "tokens": ["x"] * 50_000, "r": [0.1] * 50_000, "advantage": None}
    lines = [json.dumps(long), *(json.dumps({**row, "step": step}) for step in range(1, 5000))]
    (run / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    page, told = damaged_report(run, tmp_path / "r.html", capsys)
    assert len(page) < 2_000_000
    assert told == ["rollouts.jsonl: the tokens after the first 4096 (on line 1)"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_text("x"), "cannot be listed"),
        (lambda path: path.symlink_to("eval"), "cannot be listed"),
        (lambda path: path.symlink_to("nowhere"), "cannot be listed"),
    ],
)
def test_something_else_in_place_of_the_evaluations(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], said: str
) -> None:
    for path in (run / "eval").iterdir():
        path.unlink()
    (run / "eval").rmdir()
    make(run / "eval")
    assert said in damaged_report(run, tmp_path / "r.html", capsys)[1][0]


def test_rounds_that_are_no_rounds(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "round-1").symlink_to(".")
    (run / "round-2").write_text("")
    (run / "round-3").symlink_to("round-3")
    (run / "round-4").mkdir()  # begun, and nothing written yet
    (run / f"round-{'9' * 200}").mkdir()
    _, told = damaged_report(run, tmp_path / "r.html", capsys)
    assert told == [
        "round-1: a link to its own run",
        "round-2: no folder of a round",
        "round-3: no folder of a round",
    ]


def test_a_round_keeps_its_number_when_another_is_lost(run: Path, tmp_path: Path) -> None:
    third = run / "round-3"
    third.mkdir()
    (third / "recipe.yaml").write_text(RECIPE)
    (third / "metrics.jsonl").write_text('{"step": 1}\nhalf')
    (third / "eval").mkdir()
    (third / "eval" / "student-short.json").write_text(json.dumps(RECORDS["eval/student-short.json"]))
    found = read_run(run)
    assert found.models == ["base", "student", "round 3"] and found.student == "round 3"
    assert found.left_out == ("round-3/metrics.jsonl: a half line (on line 2)",)
    assert 'data-label="round">3</th>' in write_report([run], tmp_path / "r.html").read_text()


def test_more_files_than_a_run_has_are_not_read(run: Path) -> None:
    for i in range(MOST_FILES + 5):
        (run / "eval" / f"other-{i:05d}.json").write_text("{}")
    assert read_run(run).left_out == (f"eval: more than {MOST_FILES} entries; the others were not read",)


def test_names_and_texts_are_shown_without_control_characters(run: Path, tmp_path: Path) -> None:
    odd = "\x1b[31mred\x00\udcff\u202e"
    for name, key in (("eval/timelines.jsonl", "query"), ("rollouts.jsonl", "query")):
        (run / name).write_text(json.dumps({**ROWS[name][0], key: odd}) + "\n")
    (run / "environment.json").write_text(json.dumps({odd: odd}))
    (run / os.fsdecode(b"eval/\xff-\x1b.json")).write_text('{"mIoU": 3.0}')
    page = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", page)
    assert page.count(r"\x1b[31mred\x00\udcff\u202e") >= 4 and r"\udcff" in page


@pytest.mark.parametrize("name", ["x" * 300, "a/b/" * 2000, "nul\0"])
def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_report([name], tmp_path / "r.html")


def test_a_folder_with_nothing_but_damage_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(bytes(100))
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"that can be read .*recipe\.yaml.*metrics\.jsonl: zeros"):
        write_report([tmp_path], tmp_path / "r.html")
