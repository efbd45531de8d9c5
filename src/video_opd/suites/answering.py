"""Answers to questions about videos, through the clip and prompt of training; kept as they are made."""

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

STYLE = "question"  # of data.prompts: the benchmark's own words, nothing around them


@dataclass(kw_only=True)
class Answerer:
    """``model`` is a checkpoint folder, opened when the first question is asked; ``out`` the file of answers.

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
    opened: InferenceModel | None = None

    @property
    def config(self) -> InferenceConfig:
        """How the model is run and what it sees."""
        overrides = [*self.overrides, "--prompt.style", STYLE]
        return read_inference_config(self.model, overrides, device=self.device)

    @property
    def settings(self) -> GenerationSettings:
        return GenerationSettings(
            max_new_tokens=self.max_new_tokens, seed=self.seed, thinking=self.config.prompt.thinking
        )

    def answer(self, samples: Sequence[Sample]) -> dict[str, str]:
        """The text written to each sample, by id; none where the video could not be read.

        Rows ``{"id", "video", "query", "responses", "truncated"}`` are appended to ``out`` as they are
        finished, and those that are there are not made again. Queries on one video go together, also those
        of different tasks. Raises :class:`UserError` where another model or other settings wrote ``out``.
        """
        if self.opened is None:
            self.opened = replace(load_inference_model(self.config, self.device), workers=self.workers)
        predict(
            self.opened.policy,
            samples,
            self.opened.prompts,
            self.out,
            provenance=self.opened.provenance(),
            settings=self.settings,
            batch_size=self.batch_size,
            overwrite=self.overwrite,
            make_row=_row,
        )
        rows = read_jsonl(self.out) if self.out.exists() else ()  # no video could be read: no file
        return {row["id"]: row["responses"][0] for _, row in rows}


def _row(sample: Sample, rollouts: Sequence[Rollout], settings: GenerationSettings) -> dict[str, Any]:
    return {
        "id": sample.id,
        "video": str(sample.video),
        "query": sample.query,
        "responses": [rollout.text for rollout in rollouts],
        "truncated": [rollout.truncated for rollout in rollouts],
    }
