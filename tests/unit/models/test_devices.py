"""Every computation of a training step on a pretended second device: no tensor is on the wrong one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import SEEDS, mixed_prompts, model, processor
from pretended_gpu import GPU, PretendedGpu, put_there
from training_cases import Build, make_recipe, rows_of

from video_opd.models import captured_decoding
from video_opd.models import policy as policies
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher
from video_opd.training.components import Components
from video_opd.training.loop import train


def policy(engine: Any = "prefix", **options: Any) -> HFPolicy:
    made = model(sharpness=20)
    put_there(made)
    return HFPolicy(made, processor(), engine, **options)


def test_mixing_is_noticed() -> None:
    weight = torch.nn.Linear(3, 3)
    put_there(weight)
    with PretendedGpu():
        assert weight.weight.device == GPU
        here, moved = torch.ones(2, 3), torch.ones(2, 3).to(GPU)
        assert weight(moved).device == GPU and weight(moved).cpu().device.type == "cpu"
        assert torch.arange(3, device=GPU).device == GPU and torch.zeros_like(moved).device == GPU
        with pytest.raises(RuntimeError, match="mixes devices"):
            weight(here)
        with pytest.raises(RuntimeError, match="mixes devices"):
            here[torch.tensor([0], device=GPU)]
        with pytest.raises(RuntimeError, match="NumPy"):
            moved.numpy()
        moved[torch.tensor([0])] = 2.0 * moved[torch.tensor([1])] + torch.tensor(1.0)
        assert moved.tolist() == [[3.0] * 3, [1.0] * 3]
    assert here.device.type == "cpu"


@pytest.mark.parametrize(("engine", "recompute"), [("plain", False), ("prefix", False), ("prefix", True)])
def test_sampling_scoring_and_gradients_stay_on_the_device(engine: str, recompute: bool) -> None:
    student = policy(engine, recompute=recompute)
    teacher = LocalTeacher(policy(engine))
    with PretendedGpu():
        for count in (1, 3):
            shown: Any = mixed_prompts()
            if engine == "prefix":
                shown = student.prefill(shown, grad=True)
            seeds = [row[:count] for row in SEEDS]
            rollouts = student.sample(shown, n=count, max_new_tokens=5, seeds=seeds, top_p=0.9, top_k=50)
            responses = [[rollout.token_ids for rollout in group] for group in rollouts]
            scored = student.logprobs(shown, responses, grad=True, full=True)
            taught = teacher.logprobs(mixed_prompts(), responses, full=True)
            assert scored.logprobs_BT.device == taught.logprobs_BT.device == GPU
            ((scored.logprobs_BT - taught.logprobs_BT) * scored.mask_BT).sum().backward()
        for prefix in student.prefill_chunks(mixed_prompts(), 2) if engine == "prefix" else ():
            student.sample(prefix, n=2, max_new_tokens=3, temperature=0)


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_graph_repeats_stays_on_the_device(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[torch.device] = []

    def record(work: Any, device: torch.device) -> Any:
        recorded.append(device)
        return work

    monkeypatch.setattr(captured_decoding, "record", record)
    monkeypatch.setattr(policies, "can_capture", lambda model: True)
    student = policy()
    with PretendedGpu():
        seeds = [row[:count] for row in SEEDS]
        student.sample(mixed_prompts(), n=count, max_new_tokens=6, seeds=seeds)
    assert recorded == [GPU] and student.passes.capture


class BuildThere(Build):
    shares_teacher = False  # it is put elsewhere

    def __call__(self, *given: Any) -> Components:
        components = super().__call__(*given)
        scorers = [
            scorer
            for scorer in (components.teacher, components.reference)
            if isinstance(scorer, LocalTeacher)
        ]
        for held in (components.model, *(scorer.policy.model for scorer in scorers)):
            put_there(held)
        return components


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"engine": "plain"}},
        {"loss": {"estimator": "full", "reduction": "token_mean"}},
        {"loss": {"estimator": "topk"}},
        {"loss": {"baseline": "kl", "nonfinite": "mask", "max_importance_weight": 2.0}},
        {"lora": {"parts": ["language"], "rank": 4}, "model": {"freeze": ["vision"]}},
        {
            "method": "grpo",
            "sampling": {"rollouts": 3},
            "loss": {"kl_beta": 0.1},
            "reward": {"function": "training_cases:a_reward"},
        },
        {"method": "sft"},
        {"method": "op-fkd"},
        {"method": "op-rkd"},
    ],
    ids=str,
)
def test_a_run_stays_on_the_device(sections: dict[str, Any], tmp_path: Path) -> None:
    settings = {"optim": {"updates_per_batch": 2, "max_steps": 2}, **sections}
    recipe = make_recipe(tmp_path / "run", settings.pop("method", "video-opd"), **settings)
    with PretendedGpu():
        run = train(recipe, BuildThere(engine=recipe.model.engine))
    rows = rows_of(run.path / "metrics.jsonl")
    assert [row["update/grad_norm"] > 0 for row in rows] == [True] * 2
