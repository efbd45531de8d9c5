"""What a plan says of the host, against the tensors that a run holds there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import encode, model, processor
from plan_cases import PAIR, paper
from training_cases import make_recipe

from video_opd.config import Recipe
from video_opd.models.placed_teachers import OffloadedTeacher
from video_opd.models.policy import HFPolicy
from video_opd.planning.host import HostMemory, host_memory_of
from video_opd.planning.plan import RecipeSizes, make_plan
from video_opd.planning.setup import Setup, Work
from video_opd.planning.sizes import sizes_of
from video_opd.training.components import adapt, freeze
from video_opd.training.masters import Masters
from video_opd.training.optimizers import make_optimizer
from video_opd.training.sharding import Shards
from video_opd.types import Sample

GIB = 2**30
# The sizes of the tiny model leave out nothing; a few scalars (AdamW's counts of steps) are not in a plan.
FEW_BYTES = 4096


def tiny() -> RecipeSizes:
    sizes = sizes_of(model().config.to_dict(), "tiny")
    return RecipeSizes(student=sizes, teachers=(sizes,))


def host_of(recipe: Recipe) -> HostMemory:
    sizes = tiny()
    return host_memory_of(sizes.student, sizes.teachers, Setup.of(recipe), Work.of(recipe, None))


def nbytes(tensors: Iterable[Any]) -> int:
    """The bytes of tensors, once for those that share their memory."""
    held = {t.data_ptr(): t.nbytes for t in tensors if isinstance(t, torch.Tensor) and t.ndim}
    return sum(held.values())


CASES: dict[str, dict[str, Any]] = {
    "in full": {},
    "frozen vision": {"model": {"freeze": ["vision"]}},
    "adapters": {
        "lora": {"parts": ["language"], "rank": 4},
        "model": {"freeze": ["vision", "merger", "lm_head"]},
    },
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_masters_moments_and_what_is_saved_of_them(case: str, dtype: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {key: dict(value) for key, value in CASES[case].items()}
    sections["model"] = sections.get("model", {}) | {"dtype": dtype}
    recipe = make_recipe(tmp_path, optim={"offload": True}, **sections)
    student = model()
    adapt(student, recipe, "base") if recipe.lora.parts else freeze(student, recipe.model)
    masters = Masters(student, torch.float32 if dtype == "float32" else torch.bfloat16)
    masters.bind(student)
    optimizer = make_optimizer(list(masters.weights.values()), recipe.optim, recipe.model.weights, 0)
    shards = Shards(student, masters)
    for weight in masters.weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    planned = host_of(recipe)
    held = [tensor for weight in masters.weights.values() for tensor in (weight, weight.grad)]
    assert planned.parts["masters"] == nbytes(held)
    moments = [value for state in optimizer.state.values() for value in state.values()]
    assert abs(planned.parts["moments"] - nbytes(moments)) < FEW_BYTES
    weights, state = shards.states(optimizer)
    assert weights is not None
    copied = [value for each in state["state"].values() for value in each.values()]
    assert abs(planned.saving - nbytes(weights.values()) - nbytes(copied)) < FEW_BYTES


def test_one_gpu_copies_the_file_that_it_writes() -> None:
    """That is the whole model of 8.77 billion weights, as it is held, or the adapters."""
    whole: dict[str, Any] = {"sharding": None, "reduce": "step"}
    lora = {"parts": ["language"], "rank": 16}
    frozen = {"freeze": ["vision", "merger", "lm_head"]}
    adapters = PAIR.student.parts["language"].adapters(16)
    cases: tuple[tuple[dict[str, Any], float, float], ...] = (
        ({"model": {**whole, "weights": "bfloat16"}}, 8.77e9, 2 * 8.77e9),
        ({"model": whole}, 8.77e9, 4 * 8.77e9),
        ({"model": {**whole, **frozen}, "lora": lora}, adapters, 4 * adapters),
    )
    for sections, trained, written in cases:
        recipe = paper("video-opd", **sections)
        setup, work = Setup.of(recipe), Work.of(recipe, None)
        host = host_memory_of(PAIR.student, PAIR.teachers, setup, work)
        assert host.saving == pytest.approx(8 * trained + written, rel=0.01)


def test_a_teacher_that_waits_on_the_cpu(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, teacher={"placement": "cpu", "dtype": "float32"})
    teacher = OffloadedTeacher(HFPolicy(model(1), processor()), device=torch.device("cpu"))
    planned = host_of(recipe)
    assert planned.parts["teacher"] == nbytes(teacher.policy.model.parameters())
    assert "masters" not in planned.parts and "moments" not in planned.parts


def test_videos_that_are_decoded_ahead(tmp_path: Path) -> None:
    prompt = encode("when?", frames=8, height_px=64, width_px=64)
    tokens = int((prompt.tensors["video_grid_thw"].prod(dim=1) // 4).sum())
    recipe = make_recipe(tmp_path, data={"prefetch": 3})
    work = Work.of(recipe, None)
    sizes = tiny()
    one = host_memory_of(sizes.student, sizes.teachers, Setup.of(recipe), work).parts["prompts"]
    assert one / 3 * tokens / work.video_tokens == prompt.tensors["pixel_values_videos"].nbytes
    assert recipe.videos_ahead(8) == 3
    ahead = paper(optim={"batch_size": 32}, evaluate={"batch_size": 4})
    assert [ahead.videos_ahead(n) for n in (1, 4, 8, 16)] == [32, 8, 4, 4]


def test_prompts_that_are_kept_for_the_next_epoch(tmp_path: Path) -> None:
    rows = [Sample(id=str(i), video=Path("v"), query="when?", duration_s=2.0) for i in range(3)]
    sizes = tiny()

    def parts(**data: float) -> Mapping[str, int]:
        recipe = make_recipe(tmp_path, data={"prefetch": 1, **data})
        work = Work.of(recipe, rows)
        return host_memory_of(sizes.student, sizes.teachers, Setup.of(recipe), work).parts

    video = parts()["prompts"]
    assert parts()["kept_prompts"] == 3 * video < GIB  # less than the bound
    assert parts(memory_gib=2 * video / GIB)["kept_prompts"] == 2 * video
    assert "kept_prompts" not in parts(memory_gib=0.0)


def test_the_papers_pair_on_eight_cards() -> None:
    plan = make_plan(paper(model={"gather": "layer", "reduce": "micro_batch"}), 8, 79 * GIB, sizes=PAIR)
    assert plan.host is not None
    record = plan.to_json()["host"]
    assert record["each_process_bytes"] == sum(record["parts"].values()) == plan.host.each
    # 8.77 billion weights: 4 bytes each, and 8 of moments, are whole in the first process while it saves.
    assert plan.host.saving / 8.77e9 == pytest.approx(12, rel=0.01)
    assert plan.host.pages / 2 == PAIR.student.weights + PAIR.teachers[0].weights
    assert make_plan(paper(), 8, 79 * GIB, sizes=PAIR, cuda=False).host is None
