"""Servers answer for the teacher wherever a run asks it: scores of a pool, and the teacher's evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import serving_cases as cases
from serving_cases import BASE, TEACHER, recipe

from video_opd.cli import main
from video_opd.curriculum.pool import inference_configs, score_pool
from video_opd.curriculum.scores import ScoreSettings
from video_opd.data.annotations import read_samples
from video_opd.errors import UserError
from video_opd.evaluation.resume import read_provenance
from video_opd.jsonl import read_jsonl
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.loading import load_teacher
from video_opd.processes import Processes
from video_opd.serving.app import Service, ServiceSettings
from video_opd.serving.queue import ScoringQueue
from video_opd.serving.scorer import ModelFacts, Scorer
from video_opd.training.final_evaluation import evaluate_teacher
from video_opd.training.rounds import run_rounds
from video_opd.types import ForTopK
from video_opd.world.make import make_world

SETTINGS = ScoreSettings(k=2, max_new_tokens=16, reverse_kl=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    return make_world(folder, videos={"train": 3}, workers=1)["train"]


@pytest.fixture(scope="module")
def service() -> Service:
    facts = ModelFacts(fingerprint=model_fingerprint(TEACHER))
    scorer = Scorer(*load_teacher(TEACHER, "float32", "cpu"), facts=facts)
    return Service(scorer, ScoringQueue(scorer), TEACHER, ServiceSettings())


def scored(data: Path, out: Path, url: str | None, **options: Any) -> list[dict[str, Any]]:
    changes = {} if url is None else {"teacher.urls": (url,)}
    student, teacher = inference_configs(recipe(data, out.parent, **changes))
    assert teacher is not None and (teacher.served is None) == (url is None)
    samples = read_samples(data, None)
    score_pool(student, teacher, samples, out, **{"settings": SETTINGS, "batch_size": 4, **options})
    return [row for _, row in read_jsonl(out)]


def test_servers_score_a_pool_as_a_local_teacher_does(data: Path, service: Service, tmp_path: Path) -> None:
    expected = scored(data, tmp_path / "local.jsonl", None)
    with cases.serving(service.app()) as url:
        found = scored(data, tmp_path / "served.jsonl", url)
    assert len(found) == len(expected) > 4
    for mine, theirs in zip(found, expected, strict=True):
        for key in ("reverse_kl", "reverse_kl_sum"):
            assert mine.pop(key) == pytest.approx(theirs.pop(key), abs=1e-5)
        tokens = zip(mine.pop("reverse_kl_tokens"), theirs.pop("reverse_kl_tokens"), strict=True)
        for own, other in tokens:
            assert own == pytest.approx(other, abs=1e-5)
        assert mine == theirs
    made_by = [read_provenance(tmp_path / f"{name}.jsonl") for name in ("local", "served")]
    assert made_by[0] == made_by[1]


def test_answers_of_another_engine_are_not_continued(data: Path, service: Service, tmp_path: Path) -> None:
    """vLLM draws others from the same distribution, so the notes name it."""
    out = tmp_path / "scores.jsonl"
    facts = service.scorer.facts
    service.scorer.facts = replace(facts, engine="vllm")
    try:
        with cases.serving(service.app()) as url:
            scored(data, out, url, settings=ScoreSettings(k=1, max_new_tokens=16))
    finally:
        service.scorer.facts = facts
    with pytest.raises(UserError, match="teacher_engine"):
        scored(data, out, None, settings=ScoreSettings(k=1, max_new_tokens=16))
    with pytest.raises(UserError, match="teacher_engine"):
        scored(data, tmp_path / "b.jsonl", None, settings=ScoreSettings(k=1), teacher_from=[out])


def test_rounds_take_servers_and_a_fingerprint_for_a_folder(data: Path, tmp_path: Path) -> None:
    named = {"teacher.urls": ("http://a",), "teacher.path": "", "teacher.fingerprint": "f" * 32}
    recipe(data, tmp_path, **named).check_rounds()


def test_a_round_asks_servers_for_all_that_the_teacher_does(
    data: Path, service: Service, tmp_path: Path
) -> None:
    """Its answers to the pool, its evaluation, and its scores while the student trains: the same round."""
    shared = {
        "rounds.count": 1,
        "tvdf.k": 4,
        "tvdf.teacher_k": 1,
        "tvdf.min_teacher_iou": 0.0,
        "optim.max_steps": 1,
        "evaluate.data": (str(data),),
        "evaluate.limit": 2,
    }
    known = {"teacher.path": "", "teacher.fingerprint": model_fingerprint(TEACHER)}
    run_rounds(recipe(data, tmp_path / "local", **shared))
    with cases.serving(service.app()) as url:
        run_rounds(recipe(data, tmp_path / "served", **shared, **known, **{"teacher.urls": (url,)}))
    selected = [
        [row["id"] for _, row in read_jsonl(tmp_path / name / "round-1" / "selected.jsonl")]
        for name in ("local", "served")
    ]
    assert selected[0] == selected[1] and len(selected[0]) == 4
    # One that was killed may go on with the other.
    answers = [tmp_path / name / "eval" / f"teacher-{data.stem}.jsonl" for name in ("local", "served")]
    notes = [read_provenance(path) for path in answers]
    assert notes[0] == notes[1]
    models = [tmp_path / name / "round-1" / "model" for name in ("local", "served")]
    cases.assert_same(models[1], cases.weights(models[0]))


def test_settings_of_an_engine_that_is_not_used_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "x.jsonl"), "--vllm.gpus", "2"]
    for words in (
        ["predict", BASE, str(data), *out],
        ["score", "--student", BASE, "--data", str(data), *out],
        ["serve-teacher", BASE, "--vllm.gpus", "2"],
    ):
        assert main(words) == 2
        assert "--vllm.gpus belongs to --engine vllm" in capsys.readouterr().err


def test_a_pool_is_scored_by_servers_for_a_selection_and_goes_on_with_local_scores(
    data: Path, service: Service, tmp_path: Path
) -> None:
    settings = {"settings": ScoreSettings(k=2, max_new_tokens=16)}
    lazy = {**settings, "for_topk": ForTopK(k=2, min_teacher_iou=0.0)}
    expected = scored(data, tmp_path / "local.jsonl", None, **lazy)
    full = tmp_path / "full.jsonl"
    with cases.serving(service.app()) as url:
        assert scored(data, tmp_path / "served.jsonl", url, **lazy) == expected
        scored(data, full, url, **settings)
    asked = service.requests.labels("200")._value.get()
    with cases.serving(service.app()) as url:
        again = scored(data, tmp_path / "again.jsonl", url, teacher_from=[full], **settings)
    assert again == [row for _, row in read_jsonl(full)]
    assert service.requests.labels("200")._value.get() == asked + 2  # only what the server holds was asked


def test_the_command_names_servers(
    data: Path, service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "scores.jsonl")
    shared = ["score", "--student", BASE, "--data", str(data), "--out", out, "--k", "1", "--json"]
    with cases.serving(service.app()) as url:
        named = ["--teacher.urls", f"[{url}]", "--teacher.fingerprint", model_fingerprint(TEACHER)]
        assert main([*shared, *named]) == 0
        assert json.loads(capsys.readouterr().out)["scored"] > 4
        assert main([*shared, "--overwrite", *named[:2], "--teacher.fingerprint", "f" * 32]) == 2
    assert "holds the model tiny-teacher" in capsys.readouterr().err
    for wrong, message in (
        (named[:2], "urls without teacher.path"),
        ([*named[2:], "--teacher", str(TEACHER)], "teacher.fingerprint belongs to teacher.urls"),
        (["--teacher.urls", "[gpu7]", *named[2:]], "an address begins with http"),
    ):
        assert main([*shared, "--overwrite", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main([*shared, "--overwrite", *named, "--teacher.wait_s", "0.1"]) == 1
    assert "no teacher has answered since" in capsys.readouterr().err


def test_the_teacher_is_evaluated_by_its_servers(data: Path, service: Service, tmp_path: Path) -> None:
    figures = []
    processes = Processes.of_environment()
    with cases.serving(service.app()) as url:
        for name, changes in (("local", {}), ("served", {"teacher.urls": (url,), "teacher.path": ""})):
            if changes:
                changes["teacher.fingerprint"] = model_fingerprint(TEACHER)
            out = tmp_path / name
            out.mkdir()
            asked = recipe(data, tmp_path / "run", **{"evaluate.data": (str(data),), **changes})
            evaluate_teacher(asked, out, processes)
            figures.append(json.loads((out / "teacher-train.json").read_text()))
    assert figures[0]["mIoU"] == figures[1]["mIoU"] > 0
