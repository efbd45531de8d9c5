"""Loads a student and a teacher and scores a pool of rows: ``video-opd score``, the demo and the rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.config import Recipe
from video_opd.curriculum.scores import ScoreResult, ScoreSettings, score
from video_opd.locks import locked_file
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.inference import (
    InferenceConfig,
    InferenceModel,
    TeacherInferenceConfig,
    load_inference_model,
    log_other_video_form,
    teacher_config,
    with_video_form,
)
from video_opd.models.loading import load_model, read_config
from video_opd.models.policy import HFPolicy
from video_opd.models.same_tokens import check_same_tokens
from video_opd.types import Sample

if TYPE_CHECKING:
    from video_opd.models.interfaces import Policy
    from video_opd.processes import Processes


def inference_configs(recipe: Recipe) -> tuple[InferenceConfig, TeacherInferenceConfig | None]:
    """(student, teacher) of a recipe, with the same video budget and prompt. A recipe may name no teacher."""
    prompt = with_video_form(recipe).prompt
    student = InferenceConfig(model=recipe.model, video=recipe.video, prompt=prompt)
    if not recipe.teacher.path:
        return student, None
    teacher = recipe.teacher
    return student, teacher_config(student, teacher.path, teacher.dtype, teacher.other_template)


def score_pool(
    student: InferenceConfig,
    teacher: TeacherInferenceConfig | None,
    samples: Sequence[Sample],
    out: str | Path,
    *,
    settings: ScoreSettings,
    batch_size: int = 8,
    device: str | None = None,
    cache_dir: str | Path | None = None,
    teacher_from: str | Path | None = None,
    overwrite: bool = False,
    repeatable: bool = False,
    processes: Processes | None = None,
) -> ScoreResult:
    """Loads the models and scores ``samples``, as :func:`~video_opd.curriculum.scores.score` does.

    With ``teacher_from`` the teacher is loaded only when a row needs it. ``cache_dir`` keeps decoded
    clips. Raises :class:`UserError` for models that do not share their tokens, and as ``score`` does.
    """
    if teacher is not None and teacher_from is None:
        read_config(teacher.model.path)  # finds a missing teacher before minutes are spent on the student
    with locked_file(out, processes):  # before the models are loaded
        loaded = load_inference_model(student, device, cache_dir)
        lazy_teacher = None if teacher is None else LazyPolicy(lambda: _load_teacher(teacher, loaded, device))
        if lazy_teacher is not None and teacher_from is None:
            lazy_teacher.load()
        provenance: dict[str, Any] = {
            "student": loaded.provenance()["model"],
            "student_dtype": student.model.dtype,
            "teacher": None if teacher is None else model_fingerprint(teacher.model.path),
            "teacher_dtype": None if teacher is None else teacher.model.dtype,
            "input": loaded.provenance()["input"],
        }
        return score(
            loaded.policy,
            lazy_teacher,
            samples,
            loaded.prompts,
            out,
            provenance=provenance,
            settings=settings,
            batch_size=batch_size,
            teacher_from=teacher_from,
            overwrite=overwrite,
            repeatable=repeatable,
            processes=processes,
        )


def _load_teacher(teacher: TeacherInferenceConfig, student: InferenceModel, device: str | None) -> Policy:
    settings, policy = teacher.model, student.policy
    loaded = load_model(
        settings.path, dtype=settings.dtype, device=device or policy.device, attn=settings.attn
    )
    check_same_tokens((policy.model, policy.processor), loaded, other_template=teacher.other_template)
    log_other_video_form(student.config.prompt.video_form, settings.path)
    return HFPolicy(*loaded, settings.engine, vocabulary=policy.vocabulary)


class LazyPolicy:
    """A policy that is loaded when it is first used. A teacher whose responses are all known never is."""

    def __init__(self, load: Callable[[], Policy]) -> None:
        self._load = load
        self._policy: Policy | None = None

    def load(self) -> Policy:
        if self._policy is None:
            self._policy = self._load()
        return self._policy

    def prefill(self, *arguments: Any, **settings: Any) -> Any:
        return self.load().prefill(*arguments, **settings)

    def sample(self, *arguments: Any, **settings: Any) -> Any:
        return self.load().sample(*arguments, **settings)

    def logprobs(self, *arguments: Any, **settings: Any) -> Any:
        return self.load().logprobs(*arguments, **settings)
