"""Loads a student and a teacher and scores a pool of rows: ``video-opd score``, the demo and the rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from video_opd.config import Recipe
from video_opd.config.method_sections import check_shards
from video_opd.config.sections import EngineName
from video_opd.curriculum.lazy_scores import score_for_topk
from video_opd.curriculum.scores import ScoreResult, ScoreSettings, score
from video_opd.errors import UserError
from video_opd.locks import locked_file
from video_opd.models.checkpoint_files import base_of
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.inference import (
    InferenceConfig,
    TeacherInferenceConfig,
    chosen_device,
    load_inference_model,
    load_model_inputs,
    load_vllm_policy,
    log_other_video_form,
    teacher_config,
    with_video_form,
)
from video_opd.models.loading import (
    check_teacher,
    load_processor,
    load_teacher,
    read_model_configs,
    release_memory,
)
from video_opd.models.placed_teachers import ShardedPolicy
from video_opd.models.policy import HFPolicy
from video_opd.models.same_tokens import check_same_tokens
from video_opd.models.vllm_policy import VLLMPolicy
from video_opd.models.vocabulary import Vocabulary
from video_opd.serving.client import RemoteTeacher
from video_opd.serving.connect import connect_teacher
from video_opd.types import ForTopK, Sample

if TYPE_CHECKING:
    from video_opd.models.interfaces import Policy
    from video_opd.processes import Processes

T = TypeVar("T")


def inference_configs(recipe: Recipe) -> tuple[InferenceConfig, TeacherInferenceConfig | None]:
    """(student, teacher) of a recipe, with the same video budget and prompt. A recipe may name no teacher."""
    prompt = with_video_form(recipe).prompt
    student = InferenceConfig(model=recipe.model, video=recipe.video, prompt=prompt)
    if not recipe.teacher.named:
        return student, None
    return student, teacher_config(student, recipe.teacher.path, recipe.teacher)


def score_pool(
    student: InferenceConfig,
    teacher: TeacherInferenceConfig | None,
    samples: Sequence[Sample],
    out: str | Path,
    *,
    settings: ScoreSettings,
    for_topk: ForTopK | None = None,
    batch_size: int = 8,
    device: str | None = None,
    engine: EngineName = "hf",
    cache_dir: str | Path | None = None,
    teacher_from: Sequence[str | Path] = (),
    overwrite: bool = False,
    repeatable: bool = False,
    processes: Processes | None = None,
) -> ScoreResult:
    """Loads the models and scores ``samples``, as :func:`~video_opd.curriculum.scores.score` does.

    With ``for_topk`` it scores them as :func:`~video_opd.curriculum.lazy_scores.score_for_topk` does: the
    student is loaded, answers and is freed before the teacher is loaded. With ``teacher_from`` the teacher is
    loaded only when a row needs it. A ``sharded`` teacher is divided over ``processes``; a ``served`` one
    answers from its servers. ``engine`` runs what is here; vLLM's share of a GPU is for all models that are
    held together. ``cache_dir`` keeps decoded clips. Raises :class:`UserError` for models that do not share
    their tokens, for a teacher in shards with a single process, for one that vLLM does not hold as it is
    asked to, and as ``score`` does.
    """
    local = teacher if teacher is not None and teacher.served is None else None
    check_shards(local is not None and local.sharded, 1 if processes is None else processes.count)
    if engine == "vllm" and local is not None and (local.sharded or local.quantization):
        raise UserError(
            "--engine vllm holds a teacher whole and in its own type: leave out teacher.placement and "
            "teacher.quantization, or the engine"
        )
    served = None if teacher is None else teacher.served
    inputs = load_model_inputs(student, cache_dir, keep_clips=served is not None, engine=engine)
    form = read_model_configs(student.model.path), inputs.encoder.processor
    distant = None
    if served is not None:  # before minutes are spent on the student
        distant = connect_teacher(served, student.video, form)
    elif local is not None:
        check_teacher(local.model.path, local.quantization, chosen_device(device))
        base = base_of(local.model.path)
        theirs = read_model_configs(base), load_processor(base)
        check_same_tokens(form, theirs, other_template=local.other_template)
    shared: dict[str, Any] = {
        "provenance": {
            "student": inputs.provenance()["model"],
            "student_dtype": student.model.dtype,
            "teacher": _fingerprint(teacher, distant),
            "teacher_dtype": None if teacher is None else teacher.model.dtype,
            "input": inputs.provenance()["input"],
            # Notes of teachers that are not quantised stay as they were.
            **({"teacher_quantization": teacher.quantization} if teacher and teacher.quantization else {}),
            **({} if engine == "hf" else {"engine": engine}),
            **_engine_of(teacher, distant, engine),
        },
        "settings": settings,
        "batch_size": batch_size,
        "teacher_from": teacher_from,
        "overwrite": overwrite,
        "repeatable": repeatable,
        "processes": processes,
    }

    if for_topk is None and local is not None:  # both are held together
        half = {"vllm.memory": student.vllm.memory / 2}
        student, local = student.changed(**half), local.changed(**half)

    def load_student() -> Policy:
        if engine == "vllm":
            return load_vllm_policy(student, device)
        return load_inference_model(student, device, cache_dir).policy

    later = None
    if distant is not None:
        later = LazyPolicy(lambda: distant)
    elif local is not None:
        later = _lazy_teacher(local, Vocabulary.of(*form), device, engine)
    with locked_file(out, processes):  # before the models are loaded
        if for_topk is not None:
            if later is None:
                raise UserError("without a teacher there is no δ to find the first k by: name the teacher")
            first = LazyPolicy(load_student)
            return score_for_topk(
                _freed(first), _freed(later), samples, inputs.prompts, out, for_topk=for_topk, **shared
            )
        policy = load_student()
        if later is not None and not teacher_from:
            later.load()
        return score(policy, later, samples, inputs.prompts, out, **shared)


def _engine_of(
    teacher: TeacherInferenceConfig | None, distant: RemoteTeacher | None, engine: EngineName
) -> dict[str, str]:
    """The note of another engine than our own, which draws otherwise."""
    if teacher is None:
        return {}
    name = engine if distant is None else distant.served.computation.engine
    return {} if name == "hf" else {"teacher_engine": name}


def _fingerprint(teacher: TeacherInferenceConfig | None, distant: RemoteTeacher | None) -> str | None:
    if distant is not None:
        return distant.served.model
    return None if teacher is None else model_fingerprint(teacher.model.path)


def _lazy_teacher(
    teacher: TeacherInferenceConfig, vocabulary: Vocabulary, device: str | None, engine: EngineName
) -> LazyPolicy:
    """``vocabulary`` is the student's."""
    settings, chosen = teacher.model, chosen_device(device)

    def loaded(first_device: str) -> tuple[Any, Any]:
        log_other_video_form(teacher.prompt.video_form, settings.path)
        return load_teacher(settings.path, settings.dtype, first_device, settings.attn, teacher.quantization)

    if engine == "vllm":
        log_other_video_form(teacher.prompt.video_form, settings.path)
        return LazyPolicy(lambda: load_vllm_policy(teacher, device, vocabulary))
    if teacher.sharded:
        return LazyShardedPolicy(
            lambda: ShardedPolicy(
                *loaded("cpu"), settings.engine, device=torch.device(chosen), vocabulary=vocabulary
            )
        )
    return LazyPolicy(lambda: HFPolicy(*loaded(chosen), settings.engine, vocabulary=vocabulary))


@contextmanager
def _freed(policy: LazyPolicy) -> Iterator[Policy]:
    """The policy, whose memory is free after the block."""
    try:
        yield policy
    finally:
        policy.free()


class LazyPolicy:
    """A policy that is loaded when it is first used. A teacher whose responses are all known never is."""

    def __init__(self, load: Callable[[], Policy]) -> None:
        self._load = load
        self._policy: Policy | None = None

    def load(self) -> Policy:
        if self._policy is None:
            self._policy = self._load()
        return self._policy

    def free(self) -> None:
        """Frees the memory of the policy. It would be loaded again if it were used again."""
        if self._policy is not None:
            if isinstance(self._policy, VLLMPolicy):
                self._policy.close()
            self._policy = None
            release_memory()

    def prefill(self, *arguments: Any, **settings: Any) -> Any:
        return self.load().prefill(*arguments, **settings)

    def sample(self, *arguments: Any, **settings: Any) -> Any:
        return self.load().sample(*arguments, **settings)

    def logprobs(self, *arguments: Any, **settings: Any) -> Any:
        return self.load().logprobs(*arguments, **settings)


class LazyShardedPolicy(LazyPolicy):
    """A :class:`~video_opd.models.interfaces.CollectivePolicy`, which all processes load together."""

    def together(self, work: Callable[[], T]) -> T:
        policy = self.load()
        assert isinstance(policy, ShardedPolicy)
        return policy.together(work)
