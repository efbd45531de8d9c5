"""The components of a run: parts of the model that a recipe freezes, and teachers that are adapters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import mixed_prompts, model, processor
from training_cases import make_recipe

from video_opd.config import LoraConfig, ModelConfig, Recipe
from video_opd.errors import UserError
from video_opd.models.loading import check_teacher, load_teacher
from video_opd.models.lora import (
    adapter_weights,
    add_adapters,
    has_adapters,
    merge_adapters,
    save_adapter,
    trained_in_full,
)
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import AdapterTeacher, LocalTeacher
from video_opd.planning.setup import why_not_shared
from video_opd.training.components import freeze, load_student, load_teachers

CPU = torch.device("cpu")


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


# ------------------------------------------------------------------------------ a teacher that is an adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a base, an adapter that belongs to it)."""
    root = tmp_path_factory.mktemp("models")
    made = model(0, sharpness=8.0)
    made.save_pretrained(root / "base")
    processor().save_pretrained(root / "base")
    add_adapters(made, LoraConfig(parts=("language",), rank=4), 0, base=str(root / "base"))
    factors = adapter_weights(made)
    made.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in factors.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator)).requires_grad_(True)
    save_adapter(made, root / "adapter")
    return root / "base", root / "adapter"


def distilled(folders: tuple[Path, Path], *, adapters: bool, **teacher: Any) -> Recipe:
    base, adapter = folders
    parts = {"parts": ["vision"]} if adapters else {}
    frozen = {"freeze": ["merger", "language", "lm_head"]} if adapters else {}
    return make_recipe(
        Path("run"), model={"path": str(base)} | frozen, teacher={"path": str(adapter)} | teacher, lora=parts
    )


def loaded(recipe: Recipe) -> tuple[Any, Any]:
    student = load_student(recipe, recipe.model.path, CPU)
    return load_teachers(recipe, [], student, CPU, "whole"), student  # type: ignore[arg-type]


RESPONSES: Any = [[(9, 10, 11)], [(13, 14)], [(9, 15)]]


def scores(teacher: Any) -> torch.Tensor:
    return teacher.logprobs(mixed_prompts(), RESPONSES).logprobs_BT


def test_an_adapter_shares_the_base_of_a_student_that_trains_adapters(folders: tuple[Path, Path]) -> None:
    shared, (student, _) = loaded(distilled(folders, adapters=True))
    assert isinstance(shared, AdapterTeacher) and shared.policy.model is student
    merged, (other, _) = loaded(distilled(folders, adapters=False))
    assert isinstance(merged, LocalTeacher) and merged.policy.model is not other
    torch.testing.assert_close(scores(shared), scores(merged), atol=1e-4, rtol=0)
    assert (scores(merged) - scores(HFPolicy(student, processor()))).abs().max() > 0.1


@pytest.mark.parametrize("frozen", [("merger", "language", "lm_head"), ("merger", "lm_head"), ()])
@pytest.mark.parametrize("adapted", [(), ("vision",), ("vision", "language")])
def test_the_rule_for_sharing_a_base_is_true_of_the_student(
    folders: tuple[Path, Path], frozen: Sequence[str], adapted: Sequence[str]
) -> None:
    """The rule reads the recipe alone: it says that the base is frozen exactly where the student's is."""
    base, adapter = folders
    settings = {"path": str(base), "freeze": [part for part in frozen if part not in adapted]}
    teacher = {"path": str(adapter)}
    recipe = make_recipe(Path("run"), model=settings, lora={"parts": list(adapted)}, teacher=teacher)
    student, _ = load_student(recipe, base, CPU)
    is_frozen = has_adapters(student) and not trained_in_full(student)
    assert (why_not_shared(recipe, str(adapter)) is None) == is_frozen


def test_an_adapter_of_another_precision_has_a_base_of_its_own(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, (student, _) = loaded(distilled(folders, adapters=True, dtype="bfloat16"))
    assert isinstance(teacher, LocalTeacher) and teacher.policy.model is not student
    assert {p.dtype for p in teacher.policy.model.parameters()} == {torch.bfloat16}
    assert "because teacher.dtype is bfloat16" in capsys.readouterr().err


def test_an_adapter_without_its_base_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for file in folders[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for base, said in ((None, "does not say what it belongs to"), ("gone/away", "its base cannot be read")):
        (tmp_path / "adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": None if base is None else str(tmp_path / base)})
        )
        with pytest.raises(UserError, match=said):
            check_teacher(tmp_path, None, CPU)
    with pytest.raises(UserError, match=r"an adapter for .*, not a model"):  # only a teacher may be one
        load_student(distilled((tmp_path, tmp_path), adapters=False), tmp_path, CPU)


def test_a_merged_adapter_is_the_model_that_peft_would_merge(folders: tuple[Path, Path]) -> None:
    teacher, _ = load_teacher(folders[1], "float32", CPU)
    made = model(0, sharpness=8.0)
    add_adapters(made, LoraConfig(parts=("language",), rank=4), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_weights(made).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    merge_adapters(made)
    held = dict(teacher.named_parameters())
    assert all(torch.equal(held[name].flatten(), p.flatten()) for name, p in made.named_parameters())
