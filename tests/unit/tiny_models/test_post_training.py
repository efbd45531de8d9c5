"""The tiny teachers' GRPO: chosen by difficulty, trained, written, and not made twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tiny_models import grpo_teachers as teachers
from tiny_models import stages
from tiny_models.export import export
from tiny_models.stages import Trainer, read_pretraining
from video_opd.config import load_recipe
from video_opd.jsonl import read_jsonl
from video_opd.models.loading import load_model
from video_opd.world.tiny import build_model, build_processor


def test_a_teacher_is_post_trained_on_rows_of_its_own_difficulty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(teachers, "POOL_VIDEOS", 2)
    monkeypatch.setattr(teachers, "SELECTED", 3)
    short = ["--optim.max_steps", "1", "--optim.batch_size", "2", "--optim.micro_batch_size", "1"]
    short += ["--sampling.rollouts", "2", "--sampling.max_new_tokens", "4"]
    monkeypatch.setattr(teachers, "load_recipe", lambda path: load_recipe(path, short))
    export(build_model("test"), build_processor(), tmp_path / "pretrained")
    model = teachers.post_train(tmp_path / "pretrained", "grpo-teacher.yaml", tmp_path / "work")
    load_model(model)
    rows = [row for _, row in read_jsonl(tmp_path / "work" / "selected.jsonl")]
    assert len(rows) == 3 and {row["tvdf"]["strategy"] for row in rows} == {"gaussian"}
    recipe = yaml.safe_load((model.parent / "recipe.yaml").read_text())
    assert recipe["method"] == "grpo" and recipe["reward"]["iou"] == "timestamp_aware"
    made = (model / "model.safetensors").stat().st_mtime_ns
    assert teachers.post_train(tmp_path / "pretrained", "grpo-teacher.yaml", tmp_path / "work") == model
    assert (model / "model.safetensors").stat().st_mtime_ns == made


def test_a_stage_may_end_in_grpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "r.yaml"
    path.write_text(
        "videos: 4\ncheck_videos: 1\nstages:\n"
        "  - {name: only, kind: vision, steps: 1, batch_size: 1, save_as: teacher, grpo: grpo-teacher.yaml}\n"
    )
    asked = []

    def post_train(pretrained: Path, recipe: str, work: Path) -> Path:
        asked.append(recipe)
        (work / "run").mkdir(parents=True)
        (work / "run" / "recipe.yaml").write_text("method: grpo\n")
        shutil.copytree(pretrained, work / "run" / "model")
        return work / "run" / "model"

    monkeypatch.setattr(stages, "post_train", post_train)
    monkeypatch.setattr(stages, "make_test_sets", lambda _: {})
    Trainer(read_pretraining(path), tmp_path / "out", 1).run()
    assert asked == ["grpo-teacher.yaml"]
    facts = json.loads((tmp_path / "out" / "teacher" / "made.json").read_text())
    assert facts["grpo"] == {"method": "grpo"} and "scores_before_grpo" in facts and "scores" in facts
