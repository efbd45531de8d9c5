"""What the models are asked that a run's student is compared with."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from model_cases import mixed_prompts, model, processor
from training_cases import in_processes, make_recipe

from video_opd.data.annotations import read_samples
from video_opd.errors import UserError
from video_opd.evaluation.predict import predict
from video_opd.jsonl import read_jsonl, write_jsonl
from video_opd.models.interfaces import CollectivePolicy
from video_opd.processes import Processes
from video_opd.training import final_evaluation
from video_opd.training.final_evaluation import evaluate_teacher, is_evaluated


def thinking_processor() -> Any:
    """A processor whose chat template opens ``<think>``, as those of Thinking checkpoints do."""
    made = copy.deepcopy(processor())
    made.chat_template += "<think>\n"
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``predict`` is given; nothing is answered."""
    found: dict[str, Any] = {}

    def predict(policy: Any, samples: Any, loader: Any, out: Path, **given: Any) -> None:
        encoder = loader(samples).encoder
        found.update(policy=policy, encoder=encoder, text=encoder._chat_text("q", "i"), **given)

    teacher, student = thinking_processor(), processor()
    processors = {"teacher": teacher, "base": student}
    monkeypatch.setattr(final_evaluation, "load_teacher", lambda path, *_: (model(), processors[str(path)]))
    monkeypatch.setattr(final_evaluation, "load_processor", lambda path: processors[str(path)])
    monkeypatch.setattr(final_evaluation, "predict", predict)
    monkeypatch.setattr(final_evaluation, "evaluate_file", lambda *_: {"mIoU": 0.0})
    return found


def teacher_recipe(tmp_path: Path, **teacher: Any) -> Any:
    row = {"id": "a", "video": "a.mp4", "query": "q", "spans": [[0, 1]], "duration": 2}
    (tmp_path / "bench.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "out").mkdir()
    data = {"data": [str(tmp_path / "bench.jsonl")]}
    return make_recipe(tmp_path / "run", teacher={"path": "teacher", **teacher}, evaluate=data)


def test_a_teacher_of_another_template_answers_the_students_prompts(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    evaluate_teacher(teacher_recipe(tmp_path, other_template=True), tmp_path / "out", Processes())
    assert "<think>" not in asked["text"]
    assert asked["provenance"]["model"] == "name:teacher"
    assert asked["provenance"]["prompts_of"] == "name:base"
    assert asked["provenance"]["input"]["prompt"]["video_form"] == "release"
    assert asked["policy"].processor.chat_template.endswith("<think>\n")  # it writes with its own tokens


def test_another_teacher_answers_its_own_prompts(asked: dict[str, Any], tmp_path: Path) -> None:
    recipe = teacher_recipe(tmp_path)
    with pytest.raises(UserError, match=r"opens <think>.*prompt\.thinking"):
        evaluate_teacher(recipe, tmp_path / "out", Processes())
    thinking = recipe.changed(**{"prompt.thinking": True, "sampling.max_new_tokens": 512})
    evaluate_teacher(thinking, tmp_path / "out", Processes())
    assert asked["text"].endswith("<think>") and "prompts_of" not in asked["provenance"]


@pytest.mark.parametrize("placement", ["sharded", "whole", "auto"])
def test_a_teacher_is_evaluated_as_it_is_placed(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, placement: str
) -> None:
    """One process has the rows of a video that is asked twice, the other those of one. A card that holds no
    whole teacher beside the rest of a run is not asked to hold it for its evaluation."""
    del asked
    prompts = mixed_prompts()
    videos = ["b.mp4", "a.mp4", "a.mp4"]
    rows = [
        {"id": prompt.sample_id, "video": video, "query": prompt.sample_id, "spans": [[0, 1]], "duration": 2}
        for prompt, video in zip(prompts, videos, strict=True)
    ]
    recipe = teacher_recipe(tmp_path, placement=placement)
    write_jsonl(Path(recipe.evaluate.data[0]), rows)
    samples = read_samples(recipe.evaluate.data[0])
    prompt_of = dict(zip((sample.id for sample in samples), prompts, strict=True))

    def loader(*_: Any, **__: Any) -> Any:
        return lambda todo: [(sample, prompt_of[sample.id]) for sample in todo]

    devices: list[str] = []
    kinds: list[bool] = []

    def load(path: str, dtype: str, device: str, *_: Any) -> Any:
        devices.append(device)
        return model(1, sharpness=8.0), processor()

    def answer(policy: Any, *arguments: Any, **given: Any) -> Any:
        kinds.append(isinstance(policy, CollectivePolicy))
        return predict(policy, *arguments, **given)

    monkeypatch.setattr(final_evaluation, "load_teacher", load)
    monkeypatch.setattr(final_evaluation, "prompt_loader", loader)
    monkeypatch.setattr(final_evaluation, "predict", answer)
    monkeypatch.setattr(final_evaluation, "chosen_device", lambda _: "cpu:0")

    def answers(out: Path, processes: Processes) -> list[Any]:
        evaluate_teacher(recipe, out, processes)
        return [row["responses"] for _, row in read_jsonl(out / "teacher-bench.jsonl")]

    expected = answers(tmp_path / "out", Processes())
    assert kinds == [False] and len(expected) == 3 and any(expected)
    (tmp_path / "two").mkdir()

    def work(processes: Processes) -> Any:
        return answers(tmp_path / "two", processes), kinds[-1], devices[-1]

    sharded = placement == "sharded"
    for found, together, device in in_processes(2, work, tmp_path):
        assert found == expected and together is sharded and device == ("cpu" if sharded else "cpu:0")


def test_an_evaluation_is_of_the_file_as_it_is(asked: dict[str, Any], tmp_path: Path) -> None:
    """Rounds compare their students with base and teacher: on the same rows."""
    recipe, out = teacher_recipe(tmp_path), tmp_path / "out"
    assert not is_evaluated("teacher", recipe, out)
    evaluate_teacher(recipe.changed(**{"teacher.other_template": True}), out, Processes())
    assert is_evaluated("teacher", recipe, out) and not is_evaluated("base", recipe, out)
    data = Path(recipe.evaluate.data[0])
    row = data.read_text()
    data.write_text(row.replace("[0, 1]", "[1, 2]"))
    assert not is_evaluated("teacher", recipe, out)
    data.write_text(row)
    assert is_evaluated("teacher", recipe, out)
    figures = out / "teacher-bench.json"
    record = json.loads(figures.read_text())
    del record["data_sha256"]
    figures.write_text(json.dumps(record))  # of an earlier version
    assert is_evaluated("teacher", recipe, out)
