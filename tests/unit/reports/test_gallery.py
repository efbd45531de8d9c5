"""The failures of a report: counts, examples, and tokens with what both models would rather have written."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from report_cases import rounds_run, whole_run, write_rows

from video_opd.data.annotations import read_samples
from video_opd.evaluation.comparison import evaluate_file
from video_opd.evaluation.failures import choose_failures, outcome
from video_opd.evaluation.predictions import read_predictions
from video_opd.reports.gallery import Gallery, Pictures, gallery
from video_opd.reports.html import write_report
from video_opd.reports.row_records import MOST_DETAILED
from video_opd.reports.runs import read_run
from video_opd.reports.tokens import MOST_EXPLAINED, Explainer, percent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("gallery") / "run")


def of_run(folder: Path, most: int = 4) -> Gallery:
    found = gallery(read_run(folder), Pictures(), Explainer(), most)
    assert found is not None
    return found


def test_the_table_counts_every_model_on_every_test_set(folder: Path) -> None:
    found = of_run(folder)
    assert [row[:3] for row in found.table] == [
        [testset, model, "36"] for testset in ("short", "long") for model in ("base", "student", "teacher")
    ]
    for row in found.table:
        samples = read_samples(folder / "eval" / f"annotations-{row[0]}.jsonl")
        predictions = read_predictions(folder / "eval" / f"{row[1]}-{row[0]}.jsonl")
        kinds: Counter[str] = Counter(outcome(predictions[s.id].spans[0], s.spans) for s in samples)
        assert row[3:] == [f"{100 * kinds[name] / 36:.0f}%" for name in found.header[3:]]
    assert [kind.kind for kind in found.kinds] == ["no span", "another event", "loose boundaries"]


@pytest.mark.parametrize("protocol", ["paper", "timelens"])
def test_the_table_of_failures_agrees_with_the_recall_of_the_page(tmp_path: Path, protocol: str) -> None:
    folder = tmp_path / "run"
    (folder / "eval").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("method: sft\n")
    # An IoU of 0.49999999999999994; and twice 11.5 to 13.5, which becomes 12 to 14.
    events = {"half": [0.7, 2.1], "rounded": [12.0, 16.0], "again": [12.0, 16.0]}
    responses = {"half": "0.70 to 1.40", "rounded": "11.5 to 13.5", "again": "11.5 to 13.5"}
    rows = [
        {"id": i, "video": f"{i}.mp4", "query": "x", "duration": 30, "spans": [s]} for i, s in events.items()
    ]
    write_rows(folder / "eval" / "annotations-short.jsonl", rows)
    write_rows(
        folder / "eval" / "student-short.jsonl", [{"id": i, "response": t} for i, t in responses.items()]
    )
    samples = read_samples(folder / "eval" / "annotations-short.jsonl")
    record = evaluate_file(samples, folder / "eval" / "student-short.jsonl", protocol)
    (folder / "eval" / "student-short.json").write_text(json.dumps(record))
    found = of_run(folder)
    share = {"paper": "33%", "timelens": "67%"}[protocol]
    assert f"{record['R@0.5']:.0f}%" == found.table[0][-1] == share
    (kind,) = [kind for kind in found.kinds if kind.count]
    view = kind.shown[0]
    texts = {"paper": "11.5–13.5 s · IoU 0.33", "timelens": "1.0–1.0 s · IoU 0.00"}  # as it was compared
    assert view.lanes[1].text == texts[protocol]


def test_models_stand_in_one_order_in_all_tables(folder: Path) -> None:
    """Roles, then rounds by their numbers, then models that have no role."""
    run = read_run(folder)
    models = ["base", "student", "round 2", "round 10", "teacher", "grounder"]
    rows, evaluation = run.rows["short"], run.evaluations[0]
    shuffled = sorted(models)
    rows = replace(rows, predictions=dict.fromkeys(shuffled, rows.predictions["student"]))
    made = replace(
        run,
        rows={"short": rows},
        evaluations=tuple(replace(evaluation, model=model) for model in shuffled),
    )
    found = gallery(made, Pictures(), Explainer(), 1)
    assert found is not None
    assert made.models == [row[1] for row in found.table] == models
    (kind, *_) = [kind for kind in found.kinds if kind.shown]
    assert [lane.label for lane in kind.shown[0].lanes] == ["truth", *models]


def test_the_examples_are_those_that_the_run_keeps(folder: Path) -> None:
    found = of_run(folder)
    shown = [view for kind in found.kinds for view in (*kind.shown, *kind.more)]
    wanted = {
        f"{row.sample.id} · {testset}"
        for testset in ("short", "long")
        for row in choose_failures(
            read_samples(folder / "eval" / f"annotations-{testset}.jsonl"),
            read_predictions(folder / "eval" / f"student-{testset}.jsonl"),
        )
    }
    assert {view.id for view in shown} == wanted and len(shown) == len(wanted) > 8
    assert all(len(view.frames) == 8 and view.tokens and not view.response for view in shown)
    assert not found.without_frames and found.explained
    for kind in found.kinds:
        assert len(kind.shown) <= 3 and kind.count >= len(kind.shown) + len(kind.more)
        for view in kind.shown:
            assert [lane.label for lane in view.lanes] == ["truth", "base", "student", "teacher"]
            assert ("no span" in view.lanes[2].text) == (kind.kind == "no span")
    assert any("answered the event of “" in view.note for view in found.kinds[1].shown)


def test_a_run_without_kept_failures_shows_spans_and_responses(folder: Path, tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    for testset in ("short", "long"):
        (run / "eval" / f"failures-{testset}.jsonl").unlink()
    found = of_run(run)
    assert found.without_frames and not found.explained
    shown = [view for kind in found.kinds for view in kind.shown]
    assert shown and all(view.response and not view.frames for view in shown)
    assert "I do not &lt;i&gt;know&lt;/i&gt;" in write_report([run], tmp_path / "r.html").read_text()
    for file in (run / "eval").glob("annotations-*"):
        file.unlink()
    assert gallery(read_run(run), Pictures(), Explainer(), 4) is None


def test_the_failures_of_the_last_round_are_shown(tmp_path: Path) -> None:
    found = of_run(rounds_run(tmp_path / "rounds"))
    models = ["base", "round 1", "round 2", "round 3", "teacher"]
    assert [row[1] for row in found.table] == models * 2
    assert all(view.frames for kind in found.kinds for view in kind.shown)


def test_a_token_says_what_both_models_thought(folder: Path) -> None:
    row = read_run(folder).rollouts[0]
    tokens = Explainer().tokens(row)
    for t, token in enumerate(tokens):
        assert token.text == row["tokens"][t] and token.identity == t + 1
        assert token.sign == ("down" if row["r"][t] < 0 else "up")
        assert token.strength == pytest.approx(min(1, abs(row["r"][t]) / 2), abs=1e-3)
        for model in token.models:
            assert model.probability == percent(row[f"{model.name}_logprobs"][t])
            assert model.likeliest[0] == (row["tokens"][t], model.probability)
            assert model.likeliest[2][0] == "\\n"  # control characters are visible
    assert [model.name for model in tokens[0].models] == ["student", "teacher"]


def test_probabilities_are_short() -> None:
    values = {0.0: "100%", math.log(0.61): "61%", math.log(0.015): "1.5%", math.log(2e-4): "0.02%"}
    assert {value: percent(value) for value in values} == values
    assert percent(-30.0) == "below 0.01%" and percent(-1e300) == "below 0.01%" and percent(1e-9) == "100%"


def test_long_responses_make_a_page_of_a_usual_size(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    one = json.loads((run / "rollouts.jsonl").read_text().splitlines()[0])
    per_token = ("tokens", "r", "student_logprobs", "teacher_logprobs", "student_top", "teacher_top")
    long = {**one, **{key: one[key] * 50 for key in per_token}}
    rows = "".join(json.dumps({**long, "step": step}) + "\n" for step in range(1, 21))
    (run / "rollouts.jsonl").write_text(rows)
    explainer = Explainer()
    early, late = explainer.rollouts(read_run(run))
    assert all(len(view.tokens) == MOST_DETAILED for view in (*early, *late))
    assert early[0].more == len(long["tokens"]) - MOST_DETAILED
    assert sum(token.identity > 0 for view in (*early, *late) for token in view.tokens) == MOST_EXPLAINED
    assert write_report([run], tmp_path / "r.html").stat().st_size < 10_000_000
