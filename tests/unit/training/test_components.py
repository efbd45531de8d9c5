"""The components of a run: the parts of the model that a recipe freezes."""

from __future__ import annotations

from typing import Any

import pytest
from model_cases import model

from video_opd.config import ModelConfig
from video_opd.errors import UserError
from video_opd.training.components import freeze


@pytest.mark.parametrize(
    ("names", "trained", "frozen"),
    [
        (
            ("vision",),
            ("visual.merger", "language_model", "lm_head"),
            ("visual.blocks", "visual.patch_embed"),
        ),
        (("merger",), ("visual.blocks",), ("visual.merger", "deepstack_merger_list")),
        (("language", "lm_head"), ("visual.blocks", "visual.merger"), ("language_model", "lm_head")),
    ],
)
def test_parts_of_the_model_can_be_frozen(names: Any, trained: tuple[str, ...], frozen: tuple[str, ...]):
    student = model(0)
    freeze(student, ModelConfig(freeze=names))
    for name, parameter in student.named_parameters():
        if any(part in name for part in frozen):
            assert not parameter.requires_grad, name
        elif any(part in name for part in trained):
            assert parameter.requires_grad, name


def test_freezing_everything_is_refused():
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze(model(0), ModelConfig(freeze=("vision", "merger", "language", "lm_head")))
