"""Replaces the first layer of the vision tower, a convolution, by the equal matrix product.

Qwen3-VL's processor cuts a video into patches, and the model runs a 3D convolution over each of them with a
kernel as large as the patch. The result is one number for each channel and patch, so the layer is linear.
Convolution kernels are made for other shapes: on some GPUs they take seconds in bfloat16
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
    """A convolution for inputs of the size of its kernel, with the same weights, names and results."""

    @classmethod
    def of(cls, convolution: nn.Conv3d) -> PatchProjection:
        """A projection that shares the parameters of ``convolution``."""
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
        """[N, channels, time, height, width], of the size of the kernel → [N, out, 1, 1, 1]."""
        assert patches.shape[2:] == self.weight.shape[2:], (
            "an input must be one patch, as large as the kernel"
        )
        embedded_ND = linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return embedded_ND[:, :, None, None, None]


def use_linear_patches(model: Qwen3VLForConditionalGeneration) -> bool:
    """Makes the model embed patches by a matrix product; returns whether it was changed."""
    embedding = model.model.visual.patch_embed
    if type(embedding.proj) is not nn.Conv3d:
        return False
    embedding.proj = PatchProjection.of(embedding.proj)
    return True
