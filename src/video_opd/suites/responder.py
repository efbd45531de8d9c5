"""A model folder that answers questions about videos, as in training: the same clips, the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.evaluation.predict import GenerationSettings, predict, response_length, video_size
from video_opd.jsonl import read_jsonl
from video_opd.models.inference import InferenceConfig, load_inference_model, read_inference_config
from video_opd.temporal import after_thinking
from video_opd.types import Rollout, Sample

if TYPE_CHECKING:
    from video_opd.models.inference import InferenceModel

STYLE = "question"  # the prompt style of data.prompts that adds nothing to the benchmark's own words
MAX_NEW_TOKENS = 64  # the usual length of a response at most


@dataclass(kw_only=True)
class Responder:
    """``model`` is a model folder, loaded when the first question comes; ``out`` is the file of responses.

    ``overrides`` are those of the command line (``--video.*``, ``--model.*``, ``--prompt.*``).
    ``max_new_tokens`` None is the usual length, and an error for a model that thinks before it answers.
    """

    model: str
    out: Path
    overrides: Sequence[str] = ()
    batch_size: int = 8
    workers: int = 2  # threads that decode videos
    device: str | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    overwrite: bool = False
    loaded: InferenceModel | None = None

    @property
    def config(self) -> InferenceConfig:
        """How the model is run and what it is shown. Raises :class:`UserError` for a wrong override."""
        overrides = [*self.overrides, "--prompt.style", STYLE]
        return read_inference_config(self.model, overrides, device=self.device)

    @property
    def settings(self) -> GenerationSettings:
        """How responses are generated. Raises :class:`UserError` for thinking without a length."""
        thinking = self.config.prompt.thinking
        length = response_length(self.max_new_tokens, MAX_NEW_TOKENS, thinking=thinking)
        return GenerationSettings(max_new_tokens=length, seed=self.seed, thinking=thinking)

    def respond(self, samples: Sequence[Sample]) -> dict[str, str]:
        """The response to each sample, by id. A sample whose video cannot be read is left out.

        Of a model that thinks, it is the text after ``</think>``, and "" without that: the length limit came
        first. The file holds the whole responses.

        Rows ``{"id", "video", "query", "responses", "truncated", "video_bytes"}`` are appended to ``out`` as
        they are finished; rows that are there already are not made again. Queries on one video are answered
        together, also if they belong to different tasks. Raises :class:`UserError` if another model or other
        settings wrote ``out``, or if a video was replaced.
        """
        settings = self.settings
        if self.loaded is None:
            self.loaded = replace(load_inference_model(self.config, self.device), workers=self.workers)
        predict(
            self.loaded.policy,
            samples,
            self.loaded.prompts,
            self.out,
            provenance=self.loaded.provenance(),
            settings=settings,
            batch_size=self.batch_size,
            overwrite=self.overwrite,
            make_row=_row,
        )
        rows = read_jsonl(self.out) if self.out.exists() else ()  # there is no file if no video could be read
        texts = {row["id"]: row["responses"][0] for _, row in rows}
        if not settings.thinking:
            return texts
        return {identity: after_thinking(text) or "" for identity, text in texts.items()}


def _row(sample: Sample, rollouts: Sequence[Rollout], settings: GenerationSettings) -> dict[str, Any]:
    return {
        "id": sample.id,
        "video": str(sample.video),
        "query": sample.query,
        "responses": [rollout.text for rollout in rollouts],
        "truncated": [rollout.truncated for rollout in rollouts],
        **video_size(sample),
    }
