"""vLLM as the sampler of a run: before it samples, it is given the student's weights of the moment."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from video_opd.config import OnPolicySamplingConfig, Recipe, VLLMConfig
from video_opd.errors import UserError
from video_opd.models.checkpoint_files import base_of, find_file
from video_opd.models.fingerprint import CONFIG_FILES
from video_opd.models.loading import DTYPES
from video_opd.models.lora import merged_state
from video_opd.models.policy import HFPolicy
from video_opd.models.vllm_policy import VLLMPolicy
from video_opd.planning.setup import Work
from video_opd.training.checkpoint import as_on_hub
from video_opd.types import EncodedPrompt, Rollout, Sample

WEIGHTS = "model.safetensors"
IN_MEMORY = Path("/dev/shm")


def make_sampler(recipe: Recipe, samples: Sequence[Sample], student: HFPolicy) -> VLLMSampler:
    """The sampler of a run on ``samples``. Raises :class:`UserError` where vLLM is not installed."""
    sampling = recipe.sampling
    assert isinstance(sampling, OnPolicySamplingConfig)
    work = Work.of(recipe, samples)
    settings = VLLMConfig(
        memory=sampling.vllm_memory,
        max_tokens=work.prompt_tokens + sampling.max_new_tokens,
        check=recipe.run.check,
    )
    return VLLMSampler(recipe.model.path, student, recipe.model.dtype, settings)


class VLLMSampler:
    """Samples as the student would, by vLLM.

    ``path`` is the student's folder, for everything but its weights. Weights go through a folder in memory,
    in the type of the student's computation, adapters merged.
    """

    def __init__(self, path: str, student: HFPolicy, dtype: str, settings: VLLMConfig) -> None:
        self.student, self.dtype = student, DTYPES[dtype]
        in_memory = IN_MEMORY if IN_MEMORY.is_dir() else None
        self._folder = tempfile.TemporaryDirectory(prefix="video-opd-weights-", dir=in_memory)
        base = base_of(path)
        for name in CONFIG_FILES:
            if (file := find_file(base, name)) is not None:
                shutil.copy(file, self.folder / name)
        self.engine = VLLMPolicy(
            str(self.folder),
            student.processor,
            student.vocabulary,
            dtype=dtype,
            settings=settings,
            reference=lambda: student,
        )
        self._changed = True

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    def weights_changed(self) -> None:
        """The student is another one than before."""
        self._changed = True

    def sample(self, prompts: Sequence[EncodedPrompt], **settings: Any) -> list[list[Rollout]]:
        """As :meth:`Policy.sample`, with the student's weights of now."""
        if self._changed:
            self._write()
            self.engine.load_weights(self.folder)
            self._changed = False
        return self.engine.sample(prompts, **settings)

    def close(self) -> None:
        """Ends the engine and removes the weights."""
        self.engine.close()
        self._folder.cleanup()

    def _type_of(self, tensor: torch.Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    def _write(self) -> None:
        state = {
            name: as_on_hub(name, tensor.to(self._type_of(tensor))).cpu().contiguous()
            for name, tensor in merged_state(self.student.model).items()
        }
        try:
            save_file(state, self.folder / WEIGHTS, metadata={"format": "pt"})
        except OSError as error:
            raise UserError(
                f"{self.folder}: the student's weights for vLLM do not fit ({error.strerror}); make room in "
                f"{self.folder.parent}, or leave out sampling.engine vllm"
            ) from error
