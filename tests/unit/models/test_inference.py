"""The form in which a model is shown a video: which one it is, and where it is written down."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from video_opd.config import PromptConfig, recipe_from_dict
from video_opd.curriculum.pool import inference_configs
from video_opd.data.encode import PromptEncoder
from video_opd.data.video import clip_digest
from video_opd.errors import UserError
from video_opd.evaluation.resume import open_output, provenance_path
from video_opd.models.inference import (
    choose_video_form,
    log_other_video_form,
    read_inference_config,
    read_inference_pair,
    with_video_form,
)
from video_opd.models.loading import load_processor
from video_opd.types import Clip
from video_opd.world.shipped import shipped

TINY = ("tiny-base", "tiny-teacher", "tiny-teacher-small")


def folder(path: Path, settings: dict[str, Any] | None) -> str:
    """A model folder as far as the form of a video is concerned."""
    path.mkdir()
    if settings is not None:
        (path / "video_opd.json").write_text(json.dumps(settings))
    return str(path)


def recipe(student: str, teacher: str = "t", **prompt: str) -> Any:
    tree = {"model": {"path": student}, "teacher": {"path": teacher}, "data": {"train": "a.jsonl"}}
    return recipe_from_dict(tree | {"prompt": prompt})


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        (None, "release"),  # a checkpoint of Qwen's
        ({"video": {}}, "nested"),
        ({"prompt": {"style": "paper", "thinking": False}}, "nested"),  # before the form was written
        ({"prompt": {"style": "paper", "video_form": "release"}}, "release"),
        ({"prompt": {"video_form": "nested"}}, "nested"),
    ],
)
def test_a_model_is_shown_videos_as_in_its_training(tmp_path: Path, settings: Any, form: str) -> None:
    model = folder(tmp_path / "m", settings)
    assert read_inference_config(model, []).prompt.video_form == form
    student, teacher = read_inference_pair(model, "elsewhere", [])
    assert teacher is not None and student.prompt.video_form == teacher.prompt.video_form == form
    assert with_video_form(recipe(model)).prompt.video_form == form
    student, teacher = inference_configs(recipe(model))
    assert teacher is not None and student.prompt.video_form == teacher.prompt.video_form == form


def test_a_name_on_a_hub_is_a_released_checkpoint() -> None:
    assert choose_video_form(PromptConfig(), "Qwen/Qwen3-VL-8B-Instruct") == "release"


def test_another_form_than_in_training_is_obeyed_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder(tmp_path / "m", None)
    for _ in range(2):
        config = read_inference_config(model, ["--prompt.video_form", "nested"])
        assert config.prompt.video_form == "nested"
    assert capsys.readouterr().err.count("trained with prompt.video_form release") == 1
    assert read_inference_config(model, ["--prompt.video_form", "release"]).prompt.video_form == "release"
    log_other_video_form("release", model)
    assert capsys.readouterr().err == ""
    log_other_video_form("nested", model)
    log_other_video_form("nested", model)
    assert capsys.readouterr().err.count(f"teacher {model}: trained with prompt.video_form release") == 1


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(UserError, match=r"video_form.*release.*nested"):
        read_inference_config("m", ["--prompt.video_form", "new"])


def test_rows_without_a_form_are_continued_as_nested_and_not_as_released(tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"

    def provenance(**form: str) -> dict[str, Any]:
        return {"model": "m", "input": {"prompt": {"style": "paper", "thinking": False, **form}}}

    out.write_text('{"id": "a"}\n')
    provenance_path(out).write_text(json.dumps(provenance()) + "\n")
    assert list(open_output(out, provenance(video_form="nested"))) == ["a"]
    with pytest.raises(UserError, match=r"video_form = 'nested', this is 'release'"):
        open_output(out, provenance(video_form="release"))


@pytest.mark.parametrize("name", TINY)
def test_the_prompts_of_the_shipped_models_stay(name: str) -> None:
    """Their ids, by digest: the demo's figures were made with them."""
    config = read_inference_config(str(shipped(name)), [])
    encoder = PromptEncoder(load_processor(shipped(name)), config.prompt)
    times_s = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
    frames = np.zeros((5, 64, 96, 3), dtype=np.uint8)
    clip = Clip(
        path=Path("v.mp4"),
        frames=frames,
        times_s=times_s,
        frame_indices=np.arange(5),
        source_fps=2.0,
        duration_s=2.5,
        source_size_px=(64, 96),
        digest=clip_digest(frames, times_s),
    )
    ids = encoder.encode(clip, "the red circle appears", "a").input_ids[0].tolist()
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
    assert (len(ids), digest) == (64, "1b34d0952fcd6e3d")
