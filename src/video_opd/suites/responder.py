"""A model folder that answers questions about videos, as in training: the same clips, the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.evaluation.predict import GenerationSettings, predict
from video_opd.jsonl import read_jsonl
from video_opd.models.inference import InferenceConfig, load_inference_model, read_inference_config
from video_opd.types import Rollout, Sample

if TYPE_CHECKING:
    from video_opd.models.inference import InferenceModel

STYLE = "question"  # the prompt style of data.prompts that adds nothing to the benchmark's own words


@dataclass(kw_only=True)
class Responder:
    """``model`` is a model folder, loaded when the first question comes; ``out`` is the file of responses.

    ``overrides`` are those of the command line (``--video.*``, ``--model.*``, ``--prompt.*``).
    """

    model: str
    out: Path
    overrides: Sequence[str] = ()
    batch_size: int = 8
    workers: int = 2  # threads that decode videos
    device: str | None = None
    max_new_tokens: int = 64
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
        return GenerationSettings(
            max_new_tokens=self.max_new_tokens, seed=self.seed, thinking=self.config.prompt.thinking
        )

    def respond(self, samples: Sequence[Sample]) -> dict[str, str]:
        """The response to each sample, by id. A sample whose video cannot be read is left out.

        Rows ``{"id", "video", "query", "responses", "truncated"}`` are appended to ``out`` as they are
        finished; rows that are there already are not made again. Queries on one video are answered together,
        also if they belong to different tasks. Raises :class:`UserError` if another model or other settings
        wrote ``out``.
        """
        if self.loaded is None:
            self.loaded = replace(load_inference_model(self.config, self.device), workers=self.workers)
        predict(
            self.loaded.policy,
            samples,
            self.loaded.prompts,
            self.out,
            provenance=self.loaded.provenance(),
            settings=self.settings,
            batch_size=self.batch_size,
            overwrite=self.overwrite,
            make_row=_row,
        )
        rows = read_jsonl(self.out) if self.out.exists() else ()  # there is no file if no video could be read
        return {row["id"]: row["responses"][0] for _, row in rows}


def _row(sample: Sample, rollouts: Sequence[Rollout], settings: GenerationSettings) -> dict[str, Any]:
    return {
        "id": sample.id,
        "video": str(sample.video),
        "query": sample.query,
        "responses": [rollout.text for rollout in rollouts],
        "truncated": [rollout.truncated for rollout in rollouts],
    }
