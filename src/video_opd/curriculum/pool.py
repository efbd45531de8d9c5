"""Scores of a candidate pool by two checkpoints: what ``video-opd score``, the demo and the rounds share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.config import Recipe
from video_opd.curriculum.scores import ScoreResult, ScoreSettings, score
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.inference import InferenceConfig, InferenceModel, load_inference_model
from video_opd.models.loading import check_same_tokens
from video_opd.types import Sample

if TYPE_CHECKING:
    from video_opd.models.interfaces import Policy
    from video_opd.processes import Processes


def inference_configs(recipe: Recipe) -> tuple[InferenceConfig, InferenceConfig | None]:
    """A recipe's student and teacher; both are shown the same. No teacher where the recipe names none."""
    student = InferenceConfig(model=recipe.model, video=recipe.video, prompt=recipe.prompt)
    if not recipe.teacher.path:
        return student, None
    return student, student.changed(
        **{"model.path": recipe.teacher.path, "model.dtype": recipe.teacher.dtype}
    )


def score_pool(
    student: InferenceConfig,
    teacher: InferenceConfig | None,
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
    """Opens the models and scores ``samples`` (:func:`~video_opd.curriculum.scores.score`).

    With ``teacher_from`` the teacher is loaded only if it is asked. ``repeatable``: an output that was killed
    ends with the same bytes as one that was not; for one process. Of several ``processes`` each scores whole
    videos. Raises :class:`UserError` for models that do not share their tokens.
    """
    assert not (repeatable and processes is not None and processes.count > 1), "windows are of one output"
    if teacher is not None and teacher_from is None:
        from video_opd.models.loading import read_config

        read_config(teacher.model.path)  # before minutes are spent on reading the student
    opened = load_inference_model(student, device, cache_dir)
    other = None if teacher is None else Opening(lambda: _open_teacher(teacher, opened, device))
    if other is not None and teacher_from is None:
        other.load()
    provenance: dict[str, Any] = {
        "student": opened.provenance()["model"],
        "student_dtype": student.model.dtype,
        "teacher": None if teacher is None else model_fingerprint(teacher.model.path),
        "teacher_dtype": None if teacher is None else teacher.model.dtype,
        "input": opened.provenance()["input"],
    }
    return score(
        opened.policy,
        other,
        samples,
        opened.prompts,
        out,
        provenance=provenance,
        settings=settings,
        batch_size=batch_size,
        teacher_from=teacher_from,
        overwrite=overwrite,
        repeatable=repeatable,
        processes=processes,
    )


def _open_teacher(teacher: InferenceConfig, student: InferenceModel, device: str | None) -> Policy:
    opened = load_inference_model(teacher, device)
    check_same_tokens(
        (student.policy.model, student.policy.processor), (opened.policy.model, opened.policy.processor)
    )
    return opened.policy


class Opening:
    """A policy that is loaded when it is first asked: where all its answers are known, that is never."""

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
