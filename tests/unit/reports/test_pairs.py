"""Paired differences in a report: those of ``evaluate --baseline``, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from report_cases import rounds_run, whole_run

from video_opd.data.annotations import read_samples
from video_opd.evaluation.comparison import evaluate_file
from video_opd.evaluation.metrics import paired_difference
from video_opd.evaluation.predictions import read_predictions
from video_opd.reports import story
from video_opd.reports.html import write_report
from video_opd.reports.pairs import change, differences, signed, verdict, widest
from video_opd.reports.runs import read_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pairs")
    return whole_run(root / "a", seed=0), whole_run(root / "b", seed=5)


def evaluate_again(folder: Path, protocol: str) -> None:
    """Writes the records of the test set "short" anew."""
    samples = read_samples(folder / "eval" / "annotations-short.jsonl")
    for file in (folder / "eval").glob("*-short.json"):
        record = evaluate_file(samples, file.with_suffix(".jsonl"), protocol)
        file.write_text(json.dumps({**record, "model": file.stem.split("-")[0], "testset": "short"}))


def test_a_change_is_that_of_evaluate_with_a_baseline(folders: tuple[Path, Path]) -> None:
    run = read_run(folders[0])
    assert run.left_out == ()
    for testset in ("short", "long"):
        found = change(run, "base", run, "student", testset)
        folder = folders[0] / "eval"
        wanted = paired_difference(
            read_samples(folder / f"annotations-{testset}.jsonl"),
            read_predictions(folder / f"base-{testset}.jsonl"),
            read_predictions(folder / f"student-{testset}.jsonl"),
        )
        assert found is not None and found.n == 36 and found.of == wanted
        scores = [
            json.loads((folder / f"{m}-{testset}.json").read_text())["mIoU"] for m in ("base", "student")
        ]
        assert found.miou.value == pytest.approx(scores[1] - scores[0])


def test_the_outcome_says_what_the_paired_interval_says(folders: tuple[Path, Path]) -> None:
    run = read_run(folders[0])
    for row in story.outcome(run)[:2]:
        cells = dict(zip(story.OUTCOME_HEADER, row, strict=True))
        found = change(run, "base", run, "student", row[0])
        assert found is not None and cells["change"] == signed(found.miou)
        assert found.miou.ci95 is not None and found.miou.ci95[0] > 0
        assert cells["the interval says"] == verdict(found.miou) == "higher"


def test_runs_are_compared_with_the_first_on_rows_of_both(folders: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = read_run(folders[0]), read_run(folders[1])
    rows = differences([one, two])
    assert [(row.run, row.name, row.testset, row.n) for row in rows] == [
        (1, "b", s, 36) for s in ("short", "long")
    ]
    assert [change(two, "student", one, "student", row.testset).miou.value for row in rows] == pytest.approx(  # type: ignore[union-attr]
        [-row.value for row in rows]
    )
    assert widest(rows) >= max(abs(row.low or 0) for row in rows) and widest([]) == 1.0
    page = write_report(folders, tmp_path / "r.html").read_text()
    assert "Differences from a" in page and rows[0].cells[0] in page
    # Fewer rows, and one whose annotation is another.
    less = tmp_path / "less"
    shutil.copytree(folders[1], less)
    file = less / "eval" / "annotations-short.jsonl"
    lines = file.read_text().splitlines()
    changed = {**json.loads(lines[1]), "spans": [[0.0, 40.0]]}
    file.write_text("\n".join([json.dumps(changed), *lines[2:]]) + "\n")
    evaluate_again(less, "paper")
    third = read_run(less)
    assert third.left_out == ()
    assert [(row.testset, row.n) for row in differences([one, third])] == [("short", 34), ("long", 36)]


def test_rows_without_a_prediction_count_and_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    less = tmp_path / "less"
    shutil.copytree(folders[1], less)
    file = less / "eval" / "student-short.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:20]) + "\n")
    evaluate_again(less, "paper")
    short, long = differences([read_run(folders[0]), read_run(less)])
    assert short.n == 36 and short.notes == "rows without a prediction: 16, and 0 of the first run"
    records = [json.loads((f / "eval" / "student-short.json").read_text()) for f in (folders[0], less)]
    assert short.value == pytest.approx(records[1]["mIoU"] - records[0]["mIoU"])
    assert long.notes == ""
    page = write_report([folders[0], less], tmp_path / "r.html").read_text()
    assert short.notes in page and "a row without a prediction counts as 0" in page
    assert ">notes</th>" in page
    assert ">notes</th>" not in write_report(folders, tmp_path / "r.html").read_text()


def test_rows_under_an_unknown_protocol_are_not_used(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    file = other / "eval" / "student-short.json"
    record = json.loads(file.read_text())
    record["protocol"]["name"] = "of-another-version"
    file.write_text(json.dumps(record))
    run = read_run(other)
    assert run.left_out == (
        "eval/student-short.json: protocol of-another-version is not known here: its rows are not used",
    )
    assert run.evaluation("student", "short") is not None  # its figures are shown
    assert change(run, "base", run, "student", "short") is None
    assert [row.testset for row in differences([read_run(folders[0]), run])] == ["long"]
    record["protocol"] = None  # an earlier version's, which had one protocol
    file.write_text(json.dumps(record))
    run = read_run(other)
    assert run.left_out == () and change(run, "base", run, "student", "short") is not None


def test_settings_that_deviate_from_the_protocol_are_named(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    file = other / "eval" / "student-short.json"
    record = json.loads(file.read_text())
    record["protocol"]["deviations"] = {"video.max_video_tokens": 64}
    file.write_text(json.dumps(record))
    short, long = differences([read_run(folders[0]), read_run(other)])
    assert short.notes == "protocol paper, but video.max_video_tokens 64; of the first run paper"
    assert long.notes == ""


def test_rows_that_are_not_those_of_the_record_are_not_compared(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(folders[0], half)
    file = half / "eval" / "student-short.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:20]) + "\n")
    run = read_run(half)
    (said,) = run.left_out
    assert said.startswith("eval/student-short.jsonl: gives mIoU ") and said.endswith("its rows are not used")
    assert change(run, "base", run, "student", "short") is None
    assert change(run, "base", run, "student", "long") is not None
    assert story.outcome(run)[0][4] in ("above the base's", "overlaps")


def test_other_protocols_are_not_compared(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    evaluate_again(other, "timelens")
    run = read_run(other)
    assert run.left_out == () and change(run, "base", run, "student", "short") is not None
    assert [row.testset for row in differences([read_run(folders[0]), run])] == ["long"]


def test_responses_of_a_model_that_thinks_are_read_as_evaluate_reads_them(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "thinking"
    shutil.copytree(folders[0], folder)
    file = folder / "eval" / "student-short.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["responses"] = [f"From 1.00 to 2.00? </think> {row['responses'][0]}"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = {"thinking": True, "style": "timelens"}
    Path(f"{file}.meta.json").write_text(json.dumps({"input": {"prompt": prompt}}))
    evaluate_again(folder, "timelens")
    run = read_run(folder)
    assert run.left_out == () and "student" in run.rows["short"].predictions
    Path(f"{file}.meta.json").write_text("[]")
    assert [line.split(":")[0] for line in read_run(folder).left_out] == [
        "eval/student-short.jsonl.meta.json",
        "eval/student-short.jsonl",
    ]


def test_the_students_of_rounds_are_compared_with_the_base(tmp_path: Path) -> None:
    run = read_run(rounds_run(tmp_path / "rounds"))
    assert run.left_out == () and run.student == "round 3"
    assert set(run.rows["short"].predictions) == {"base", "teacher", "round 1", "round 2", "round 3"}
    first, last = (change(run, "base", run, f"round {n}", "short") for n in (1, 3))
    assert first is not None and last is not None
    record = json.loads((tmp_path / "rounds" / "round-3" / "eval" / "student-short.json").read_text())
    base = json.loads((tmp_path / "rounds" / "eval" / "base-short.json").read_text())
    assert last.miou.value == pytest.approx(record["mIoU"] - base["mIoU"])
    assert first.miou.value < last.miou.value


def test_without_an_interval_nothing_is_claimed(folders: tuple[Path, Path]) -> None:
    found = change(read_run(folders[0]), "base", read_run(folders[0]), "base", "short")
    assert found is not None and signed(found.miou) == "+0.0 [+0.0,\N{NO-BREAK SPACE}+0.0]"
    assert verdict(found.miou) == "no difference shown"
