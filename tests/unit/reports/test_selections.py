"""TVDF in a report: the figures against a count by hand of the same files."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from report_cases import rounds_run, whole_run

from video_opd.reports.html import write_report
from video_opd.reports.runs import read_run
from video_opd.reports.selections import DRIFT_HEADER, TRUST_HEADER, selection_tables
from video_opd.reports.tables import selection_facts


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rounds_run(tmp_path_factory.mktemp("selections") / "rounds")


def test_drift_is_measured_on_the_rows_of_both_rounds(rounds: Path) -> None:
    found = selection_tables(read_run(rounds))
    assert found is not None
    one, two = ({row["id"]: row for row in rows_of(rounds / f"round-{n}" / "scores.jsonl")} for n in (1, 2))
    both = [name for name in two if name in one]
    assert len(both) == 70  # of 90 and of 70
    rose = {key: fmean(two[i][key] - one[i][key] for i in both) for key in ("teacher_iou", "student_iou")}
    cells = dict(zip(DRIFT_HEADER, found.drift[0], strict=True))
    assert [row[0] for row in found.drift] == ["2", "3"]
    assert cells["rows scored before and now"] == "70"
    assert float(cells["drift of δ"]) == pytest.approx(rose["teacher_iou"] - rose["student_iou"], abs=6e-4)
    assert float(cells["because of the student"]) == pytest.approx(-rose["student_iou"], abs=6e-4)
    assert float(cells["because of the teacher"]) == pytest.approx(rose["teacher_iou"], abs=6e-4)
    now = fmean(two[i]["teacher_iou"] - two[i]["student_iou"] for i in both)
    assert float(cells["δ now"]) == pytest.approx(now, abs=6e-4)


def test_the_teachers_reliability_is_counted(rounds: Path) -> None:
    found = selection_tables(read_run(rounds))
    assert found is not None
    scores = rows_of(rounds / "round-2" / "scores.jsonl")
    selected = {row["id"] for row in rows_of(rounds / "round-2" / "selected.jsonl")}
    cells = dict(zip(TRUST_HEADER, found.trust[1], strict=True))
    assert cells == {
        "round": "2",
        "rows with the teacher's answer": "70",
        "teacher's IoU": f"{fmean(row['teacher_iou'] for row in scores):.2f}",
        "of these passed the gate": f"{fmean(row['teacher_iou'] >= 0.5 for row in scores):.0%}",
        "better than the student": f"{fmean(row['teacher_iou'] > row['student_iou'] for row in scores):.0%}",
        "teacher's IoU on the selected": (
            f"{fmean(row['teacher_iou'] for row in scores if row['id'] in selected):.2f}"
        ),
    }


def test_who_was_selected_is_told_by_source(rounds: Path) -> None:
    found = selection_tables(read_run(rounds))
    assert found is not None and found.who_header == ("source", "round 1", "round 2", "round 3")
    rows = {row[0]: row[1:] for row in found.who}
    for number in (1, 2, 3):
        record = json.loads((rounds / f"round-{number}" / "select.json").read_text())["by_source"]
        for source, counts in record.items():
            assert rows[source][number - 1] == f"{counts['selected']} of {counts['candidates']} candidates"


def test_the_first_and_the_last_selected_rows_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("method: sft\n")
    block = {"teacher_iou": 1.0, "student_iou": 0.25, "rank": 1}
    rows = [
        {"id": f"r{i}", "query": f"query {i}", "source": "s", "tvdf": {**block, "delta": 1 - i / 10}}
        for i in range(10)
    ]
    for count, shown in ((10, [0, 1, 2, 3, 6, 7, 8, 9]), (6, [0, 1, 2, 3, 4, 5]), (3, [0, 1, 2])):
        (folder / "selected.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        found = selection_tables(read_run(folder))
        assert found is not None
        (only,) = found.examples
        assert [row[0] for row in only.rows] == [f"query {i}" for i in shown]
        assert only.title == (
            "the first and the last of 10 selected rows" if count == 10 else f"{count} selected rows"
        )
    assert only.rows[2] == ["query 2", "s", "+0.80", "1.00", "0.25"]
    (folder / "selected.jsonl").write_text('{"id": "a"}\n')  # an earlier version's, say
    found = selection_tables(read_run(folder))
    assert found is not None and found.examples[0].rows == [["a", "", "–", "–", "–"]]


def test_the_charts_of_rounds_and_of_one_run(rounds: Path, tmp_path: Path) -> None:
    found = selection_tables(read_run(rounds))
    assert found is not None
    titles = [chart.title for chart in found.charts]
    assert titles[:2] == ["δ over the rounds", "Teacher reliability over the rounds"] and len(titles) == 5
    drift = found.charts[0]
    assert [label for _, label in drift.legend] == ["all scored", "selected"] and len(drift.boxes) == 6
    assert all(box.tooltip.startswith("middle half: ") for box in drift.boxes)
    alone = selection_tables(read_run(whole_run(tmp_path / "run")))
    assert alone is not None and not alone.drift and alone.trust_header == TRUST_HEADER[1:]
    assert [chart.title for chart in alone.charts] == ["How well the teacher answers"]
    page = write_report([rounds], tmp_path / "r.html").read_text()
    for part in ("How δ drifts", "Who was selected", "How far the teacher can be relied on"):
        assert part in page


def test_where_there_was_no_gate_nothing_passed_it(tmp_path: Path) -> None:
    folder = rounds_run(tmp_path / "rounds")
    record: dict[str, Any] = {}
    for number in (1, 3):
        file = folder / f"round-{number}" / "select.json"
        record = json.loads(file.read_text())
        del record["min_teacher_iou"]
        file.write_text(json.dumps(record))

    found = selection_tables(read_run(folder))
    assert found is not None and [row[3] == "no gate" for row in found.trust] == [True, False, True]
    (chart,) = [c for c in found.charts if c.title == "Teacher reliability over the rounds"]
    drawn = {line.tooltip.split(":")[0]: line.tooltip for line in chart.lines}
    assert " at round 2, " in drawn["passed the gate"] and drawn["passed the gate"].endswith(" at round 2")
    assert " at round 1, " in drawn["teacher's IoU"] and drawn["teacher's IoU"].endswith(" at round 3")
    facts = dict(selection_facts(record))
    assert facts["candidates"] == str(record["candidates"]) and "passed the gate" not in facts


def test_lazy_scores_and_no_scores(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("method: sft\n")
    assert selection_tables(read_run(folder)) is None
    rows = [{"id": "a", "student_iou": 0.5}, {"id": "b", "student_iou": 0.25, "teacher_iou": 0.75}]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = selection_tables(read_run(folder))
    assert found is not None and found.trust == [["1", "0.75", "no gate", "100%", "–"]]
    assert found.who == [] and found.drift == []
