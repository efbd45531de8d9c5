"""vLLM as the sampler of a run: before it samples, it is given the student's weights of the moment."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from video_opd.config import OnPolicySamplingConfig, Recipe, VLLMConfig
from video_opd.errors import UserError
from video_opd.models.checkpoint_files import base_of, find_file
from video_opd.models.fingerprint import CONFIG_FILES
from video_opd.models.inference import longest_tokens
from video_opd.models.loading import DTYPES
from video_opd.models.lora import merged_weights
from video_opd.models.policy import HFPolicy
from video_opd.models.vllm_policy import TOLERANCE, VLLMPolicy
from video_opd.training.checkpoint import as_on_hub
from video_opd.types import EncodedPrompt, Rollout

WEIGHTS = "model.safetensors"
IN_MEMORY = Path("/dev/shm")
ROOM = 1.1  # times their size


def make_sampler(recipe: Recipe, student: HFPolicy) -> VLLMSampler:
    """The sampler of a run. Raises :class:`UserError` where vLLM is not installed."""
    sampling = recipe.sampling
    assert isinstance(sampling, OnPolicySamplingConfig)
    most = student.model.config.text_config.max_position_embeddings
    settings = VLLMConfig(
        memory=sampling.vllm_memory,
        max_tokens=min(most, longest_tokens(recipe.video) + sampling.max_new_tokens),
        check=recipe.run.check,
    )
    return VLLMSampler(recipe.model.path, student, recipe.model.dtype, settings, Path(recipe.run.dir))


class VLLMSampler:
    """Samples as the student would, by vLLM.

    ``path`` is the student's folder, for everything but its weights. Weights go through a folder in memory,
    or on the disk where that has no room, in the type of the student's computation, adapters merged. It is
    named after ``run``, the run's folder, so that a run that is continued removes what a killed one left.
    """

    def __init__(self, path: str, student: HFPolicy, dtype: str, settings: VLLMConfig, run: Path) -> None:
        self.student, self.dtype = student, DTYPES[dtype]
        self.tolerance = TOLERANCE[dtype]  # nats a token between the two, on the average
        self.folder = self._place(run)
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
            reference=lambda _: student,
        )
        self._changed = True

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
        shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self, run: Path) -> Path:
        """A new folder, where the weights have room."""
        name = "video-opd-" + hashlib.blake2b(str(run.resolve()).encode(), digest_size=8).hexdigest()
        size = sum(p.numel() for p in self.student.model.parameters()) * self.dtype.itemsize
        places = [place / name for place in (IN_MEMORY, Path(tempfile.gettempdir())) if place.is_dir()]
        for folder in places:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in places:
            if shutil.disk_usage(folder.parent).free > ROOM * size:
                folder.mkdir(mode=0o700)
                return folder
        raise UserError(
            f"the student's weights for vLLM take {size / 2**30:.1f} GiB, and there is no room in "
            f"{' or '.join(str(folder.parent) for folder in places)}; make some, or leave out sampling.engine"
        )

    def _write(self) -> None:
        path = self.folder / WEIGHTS
        path.unlink(missing_ok=True)  # safetensors writes another file first
        state = {
            name: as_on_hub(name, tensor.to(self._type_of(tensor))).cpu().contiguous()
            for name, tensor in merged_weights(self.student.model)
        }
        try:
            save_file(state, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"{path}: the student's weights for vLLM cannot be written ({reason:.120}); make room there, "
                "or leave out sampling.engine vllm"
            ) from error

    def _type_of(self, tensor: torch.Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype
