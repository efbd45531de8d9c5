"""The vision tower's first layer as the matrix product that it is.

Qwen3-VL cuts a video into patches before the model sees it, and then runs a 3D convolution whose kernel is as
large as a patch over each of them. That is one number a channel and patch, a plain linear layer; but
convolution kernels are made for other shapes, and on some GPUs in bfloat16 they take seconds
(huggingface/transformers#45750, pytorch/pytorch#174051).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration


class PatchProjection(nn.Conv3d):
    """A convolution over inputs of the kernel's size: the same weights, names and results."""

    @classmethod
    def of(cls, convolution: nn.Conv3d) -> PatchProjection:
        """Shares the parameters of ``convolution``."""
        made = cls(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]
            bias=convolution.bias is not None,
            device="meta",
        )
        made.weight, made.bias = convolution.weight, convolution.bias
        return made.train(convolution.training)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[N, channels, time, height, width] of the kernel's size → [N, out, 1, 1, 1]."""
        assert patches.shape[2:] == self.weight.shape[2:], "one patch at a time fits under the kernel"
        embedded_ND = linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return embedded_ND[:, :, None, None, None]


def use_linear_patches(model: Qwen3VLForConditionalGeneration) -> bool:
    """Embed patches by a matrix product; returns whether the model was changed."""
    embedding = model.model.visual.patch_embed
    if type(embedding.proj) is not nn.Conv3d:
        return False
    embedding.proj = PatchProjection.of(embedding.proj)
    return True
