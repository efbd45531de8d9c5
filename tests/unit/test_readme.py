"""The README's data row, recipe, algorithm and map of folders. test_documents.py tries its commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import ROOT

from video_opd.config import recipe_from_dict
from video_opd.data.annotations import read_samples


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )


def test_the_data_row_is_one(tmp_path: Path) -> None:
    (row,) = blocks("json")
    (tmp_path / "d.jsonl").write_text(row)
    (sample,) = read_samples(tmp_path / "d.jsonl")
    assert sample.spans == (tuple(json.loads(row)["spans"][0]),)


def test_the_recipe_is_one() -> None:
    (text,) = blocks("yaml")
    recipe = recipe_from_dict(yaml.safe_load(text))
    assert recipe.optim.lr == 1e-6


def test_the_folders_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"^\| `([^`]+)/`", text, re.MULTILINE)
    assert len(named) >= 9 and all((ROOT / name).is_dir() for name in named)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert all((ROOT / link.partition("#")[0]).exists() for link in links), links


def test_the_algorithm_is_the_policy_gradient_of_eq_5_and_6() -> None:
    """The README's step moves the weights by Σ r_t ∇ log π(a_t), as the plain engine computes it."""
    import torch
    from model_cases import QUERIES, encode, model, processor
    from torch.nn.utils.rnn import pad_sequence

    from video_opd.algorithms.losses import importance_surrogate
    from video_opd.algorithms.signals import sampled_reverse_kl
    from video_opd.models.policy import HFPolicy
    from video_opd.models.teachers import LocalTeacher

    names: dict[str, Any] = {
        "torch": torch,
        "pad_sequence": pad_sequence,
        "importance_surrogate": importance_surrogate,
        "sampled_reverse_kl": sampled_reverse_kl,
    }
    code = next(block for block in blocks("python") if "def video_opd_step" in block)
    exec(compile(code, "README.md", "exec"), names)

    student, teacher = (HFPolicy(model(seed, sharpness=3.0), processor()) for seed in (0, 1))
    prompts = [encode(query, video_seed=i) for i, query in enumerate(QUERIES)]
    seeds = [[i] for i in range(len(prompts))]
    optimizer = torch.optim.SGD(student.model.parameters(), lr=1.0)  # the weights move by the gradient
    loss = names["video_opd_step"](student, LocalTeacher(teacher), optimizer, prompts, seeds)

    plain = HFPolicy(model(0, sharpness=3.0), processor(), "plain")
    before = {name: weight.detach().clone() for name, weight in plain.model.named_parameters()}
    groups = plain.sample(prompts, n=1, max_new_tokens=64, seeds=seeds)
    responses = [[rollout.token_ids for rollout in group] for group in groups]
    scores = plain.logprobs(prompts, responses, grad=True)
    with torch.no_grad():
        theirs_BT = HFPolicy(teacher.model, processor(), "plain").logprobs(prompts, responses).logprobs_BT
        r_BT = torch.where(scores.mask_BT, theirs_BT - scores.logprobs_BT, 0.0)
    assert loss == pytest.approx(-r_BT.sum().item() / len(prompts), rel=1e-4)
    ((r_BT * scores.logprobs_BT).sum() / len(prompts)).backward()
    moved = dict(student.model.named_parameters())
    for name, weight in plain.model.named_parameters():
        if weight.grad is not None:
            step = moved[name].detach() - before[name]
            assert torch.linalg.norm(step - weight.grad) <= 1e-3 * torch.linalg.norm(weight.grad) + 1e-6, name
