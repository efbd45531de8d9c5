"""Every method on a tiny model: loss and gradient against implementations written from the equations.

The second implementation is the stock model in float64, one response at a time, prompt and response
concatenated, and the paper's formulas spelled out token by token. It shares only the rollouts with the code
under test.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from model_cases import model, processor
from training_cases import make_recipe, prompt, sample

from video_opd.algorithms.method import Method, Signal, Trajectories
from video_opd.algorithms.registry import make_method
from video_opd.config import Recipe
from video_opd.models.policy import HFPolicy
from video_opd.models.vocabulary import Vocabulary
from video_opd.temporal import format_span
from video_opd.training.batches import Row
from video_opd.training.loss_batch import make_trajectories
from video_opd.types import EncodedPrompt, Rollout, Sample, TokenLogprobs

ROWS = [Row(position=i, sample=sample(i + 1), prompt=prompt(i + 1)) for i in range(3)]  # 1, 2, 3: annotated
DIVISOR = 3.0
TOLERANCE = 1e-6


def wide(seed: int, sharpness: float = 6.0) -> Any:
    """A float64 model, so that rounding does not matter."""
    return model(seed, sharpness=sharpness).double()


STUDENT, TEACHER = wide(0), wide(1)
MOVED = copy.deepcopy(STUDENT)  # the student after some other update: ratios are no longer 1
with torch.no_grad():
    for parameter in MOVED.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        parameter.add_(0.02 * noise)
ALLOWED = [
    token
    for token in range(Vocabulary.of(STUDENT, processor()).size)
    if token not in Vocabulary.of(STUDENT, processor()).forbidden_ids
]
PLACES = {token: place for place, token in enumerate(ALLOWED)}


def recipe_of(method: str, **sections: dict[str, Any]) -> Recipe:
    from pathlib import Path

    from video_opd.config import recipe_from_dict

    base = make_recipe(Path("run")).to_dict()
    for name in ("sampling", "loss"):
        base.pop(name)
    tree: dict[str, Any] = {**base, "method": method, "sampling": {"max_new_tokens": 5}}
    for name, keys in sections.items():
        tree[name] = {**tree.get(name, {}), **keys}
    return recipe_from_dict(tree)


# ------------------------------------------------------------------------------------------- the other side


def distributions(net: Any, question: EncodedPrompt, tokens: Sequence[int]) -> torch.Tensor:
    """log π(·|s_t) of the stock model over the tokens that can be written, float64 [T, allowed]."""
    ids = torch.tensor([tokens])
    types = torch.cat([question.tensors["mm_token_type_ids"], torch.zeros_like(ids)], dim=1)
    logits = net(
        input_ids=torch.cat([question.input_ids, ids], dim=1),
        **{**question.tensors, "mm_token_type_ids": types},
    ).logits[0, question.length - 1 : -1]
    return logits[:, ALLOWED].log_softmax(-1)


def at(table: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """log π(a_t|s_t), [T]."""
    return torch.stack([table[t, PLACES[token]] for t, token in enumerate(tokens)])


def frozen(net: Any, question: EncodedPrompt, tokens: Sequence[int]) -> torch.Tensor:
    """The same without a gradient, of a model that no test changes."""
    assert any(net is constant for constant in (STUDENT, TEACHER, MOVED))
    (place,) = (row.position for row in ROWS if row.prompt is question)
    return _frozen(net, place, tuple(tokens))


@functools.cache
def _frozen(net: Any, place: int, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return distributions(net, ROWS[place].prompt, tokens)


def rollout_pairs(groups: Sequence[Sequence[Rollout]]) -> list[tuple[Row, Rollout]]:
    return [(row, rollout) for row, group in zip(ROWS, groups, strict=True) for rollout in group]


Formula = Callable[[Any, Sequence[Sequence[Rollout]]], torch.Tensor]


def surrogate(
    net: Any,
    groups: Sequence[Sequence[Rollout]],
    credit: Callable[[Row, Rollout, int], list[float]],
    *,
    low: float = math.inf,
    high: float = math.inf,
    old: Callable[[Row, Rollout], list[float]] | None = None,
) -> torch.Tensor:
    """−1/N Σ_i Σ_t min(ρ A, clip(ρ) A), one term after another."""
    total = torch.zeros((), dtype=torch.float64)
    for number, (row, rollout) in enumerate(rollout_pairs(groups)):
        now = at(distributions(net, row.prompt, rollout.token_ids), rollout.token_ids)
        before = list(rollout.logprobs or ()) if old is None else old(row, rollout)
        for t, advantage in enumerate(credit(row, rollout, number)):
            ratio = torch.exp(now[t] - before[t])
            held = ratio.clamp(1 - low, 1 + high) if math.isfinite(high) else ratio
            total = total - torch.minimum(ratio * advantage, held * advantage)
    return total / DIVISOR


def r_t(row: Row, rollout: Rollout, number: int = 0, scale: float = 1.0) -> list[float]:
    """eq 5, or G-OPD's with the initial student as the reference."""
    tokens = rollout.token_ids
    taught = at(frozen(TEACHER, row.prompt, tokens), tokens)
    before = list(rollout.logprobs) if rollout.logprobs else student_before(row, rollout)
    reference = at(frozen(STUDENT, row.prompt, tokens), tokens) if scale != 1 else torch.zeros(len(tokens))
    return [
        float(scale * (taught[t] - reference[t]) - (before[t] - reference[t])) for t in range(len(tokens))
    ]


def student_before(row: Row, rollout: Rollout) -> list[float]:
    return at(frozen(STUDENT, row.prompt, rollout.token_ids), rollout.token_ids).tolist()


def with_baseline(row: Row, rollout: Rollout, number: int) -> list[float]:
    p, q = (frozen(net, row.prompt, rollout.token_ids).tolist() for net in (STUDENT, TEACHER))
    expected = [
        sum(math.exp(p_tv) * (q_tv - p_tv) for p_tv, q_tv in zip(p_t, q_t, strict=True))
        for p_t, q_t in zip(p, q, strict=True)
    ]
    return [r - b for r, b in zip(r_t(row, rollout), expected, strict=True)]


def kl_sum(net: Any, groups: Sequence[Sequence[Rollout]], term: Callable[..., torch.Tensor]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, rollout in rollout_pairs(groups):
        p = distributions(net, row.prompt, rollout.token_ids)
        q = frozen(TEACHER, row.prompt, rollout.token_ids)
        for t in range(len(p)):
            total = total + term(p[t], q[t])
    return total / DIVISOR


def topk_term(p: torch.Tensor, q: torch.Tensor, k: int = 7) -> torch.Tensor:
    values = p.tolist()
    chosen = sorted(range(len(p)), key=lambda v: -values[v])[:k]
    rest = [v for v in range(len(p)) if v not in chosen]
    kept = sum((p[v].exp() * (p[v] - q[v]) for v in chosen), torch.zeros((), dtype=torch.float64))
    tail_p, tail_q = p[rest].exp().sum(), q[rest].exp().sum()
    return kept + tail_p * (tail_p.log() - tail_q.log())


def response_reward(row: Row, rollout: Rollout) -> float:
    """Time-R1's reward, by hand, for responses of the form "A to B"; these tests use no others."""
    (s, e), d = row.sample.spans[0], row.sample.duration_s
    words = rollout.text.split(" to ")
    a, b = float(words[0]), float(words[1])
    inter, union = max(0.0, min(b, e) - max(a, s)), max(b, e) - min(a, s)
    assert d is not None
    return max(0.0, inter / union) * (1 - abs(a - s) / d) * (1 - abs(b - e) / d)


def group_advantage(groups: Sequence[Sequence[Rollout]], std: bool) -> list[float]:
    result = []
    for row, group in zip(ROWS, groups, strict=True):
        rewards = [response_reward(row, rollout) for rollout in group]
        mean = sum(rewards) / len(rewards)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        result += [(r - mean) / (deviation + 1e-4) if std else r - mean for r in rewards]
    return result


def grpo(net: Any, groups: Sequence[Sequence[Rollout]], *, std: bool, beta: float, clip: Any) -> torch.Tensor:
    advantages = group_advantage(groups, std)
    low, high = clip or (math.inf, math.inf)
    loss = surrogate(
        net,
        groups,
        lambda row, rollout, number: [advantages[number]] * len(rollout.token_ids),
        low=low,
        high=high,
    )
    if beta:
        for row, rollout in rollout_pairs(groups):
            now = at(distributions(net, row.prompt, rollout.token_ids), rollout.token_ids)
            reference = at(frozen(STUDENT, row.prompt, rollout.token_ids), rollout.token_ids)
            for x in reference - now:
                loss = loss + beta * (torch.exp(x) - x - 1) / DIVISOR
    return loss


# -------------------------------------------------------------------------------------------------- the cases


def weighted(net: Any, groups: Sequence[Sequence[Rollout]]) -> torch.Tensor:
    """Sampler and trainer differ: π_old is the trainer's; a token weighs min(π_trainer/π_sampler, 1.1)."""

    def credit(row: Row, rollout: Rollout, number: int) -> list[float]:
        old, sampler = student_before(row, rollout), rollout.logprobs or ()
        taught = at(frozen(TEACHER, row.prompt, rollout.token_ids), rollout.token_ids).tolist()
        triples = zip(taught, old, sampler, strict=True)
        return [min(math.exp(mine - theirs), 1.1) * (teacher - mine) for teacher, mine, theirs in triples]

    return surrogate(net, groups, credit, old=student_before)


CASES: dict[str, tuple[Recipe, Formula]] = {
    "video-opd": (recipe_of("video-opd"), lambda net, groups: surrogate(net, groups, r_t)),
    "video-opd two rollouts": (
        recipe_of("video-opd", sampling={"rollouts": 2}),
        lambda net, groups: surrogate(net, groups, r_t),
    ),
    "video-opd clipped": (
        recipe_of("video-opd", loss={"clip_low": 0.02, "clip_high": 0.05}),
        lambda net, groups: surrogate(net, groups, r_t, low=0.02, high=0.05),
    ),
    "video-opd baseline": (
        recipe_of("video-opd", loss={"baseline": "kl"}),
        lambda net, groups: surrogate(net, groups, with_baseline),
    ),
    "video-opd beyond the teacher": (
        recipe_of("video-opd", teacher={"reward_scale": 1.5}),
        lambda net, groups: surrogate(net, groups, lambda row, rollout, n: r_t(row, rollout, n, 1.5)),
    ),
    "video-opd full": (
        recipe_of("video-opd", loss={"estimator": "full"}),
        lambda net, groups: kl_sum(net, groups, lambda p, q: (p.exp() * (p - q)).sum()),
    ),
    "video-opd topk": (
        recipe_of("video-opd", loss={"estimator": "topk", "top_k": 7}),
        lambda net, groups: kl_sum(net, groups, topk_term),
    ),
    "video-opd weighted": (recipe_of("video-opd", loss={"max_importance_weight": 1.1}), weighted),
    "grpo": (
        recipe_of("grpo", sampling={"rollouts": 4}),
        lambda net, groups: grpo(net, groups, std=True, beta=0.0, clip=None),
    ),
    "grpo all options": (
        recipe_of(
            "grpo",
            sampling={"rollouts": 4},
            reward={"normalise_std": False},
            loss={"kl_beta": 0.3, "clip_low": 0.03, "clip_high": 0.06},
        ),
        lambda net, groups: grpo(net, groups, std=False, beta=0.3, clip=(0.03, 0.06)),
    ),
    "sft": (
        recipe_of("sft"),
        lambda net, groups: (
            sum(
                (
                    -at(distributions(net, row.prompt, rollout.token_ids), rollout.token_ids).sum()
                    for row, rollout in rollout_pairs(groups)
                ),
                torch.zeros((), dtype=torch.float64),
            )
            / DIVISOR
        ),
    ),
    "op-rkd": (
        recipe_of("op-rkd"),
        lambda net, groups: surrogate(net, groups, r_t, old=student_before),
    ),
    "op-fkd": (
        recipe_of("op-fkd"),
        lambda net, groups: kl_sum(net, groups, lambda p, q: (q.exp() * (q - p)).sum()),
    ),
}


def trajectories_of(method: Method, policy: HFPolicy, rollouts: int) -> list[list[Rollout]]:
    """The method's trajectories. GRPO's random responses are turned into time spans, so that they have
    rewards."""
    prompts, samples = [row.prompt for row in ROWS], [row.sample for row in ROWS]
    seeds = [[10 * i + g for g in range(rollouts)] for i in range(len(ROWS))]
    groups = method.trajectories(policy, prompts, samples, seeds)
    if method.needs.annotation and method.needs.sampling:
        texts = ("0.20 to 1.40", "0.50 to 0.90", "0.00 to 2.00", "1.20 to 1.80")
        return [
            [replace(rollout, text=text) for rollout, text in zip(group, texts, strict=True)]
            for group in groups
        ]
    return groups


def perturbed(groups: Sequence[Sequence[Rollout]]) -> list[list[Rollout]]:
    """The log-probs as another engine would have recorded them."""
    return [
        [
            replace(r, logprobs=tuple(x + 0.15 * math.sin(7 * t + 1) for t, x in enumerate(r.recorded)))
            for r in group
        ]
        for group in groups
    ]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What the updates on a batch share: the trajectories, and the signal on them."""

    method: Method
    groups: list[list[Rollout]]
    batch: Trajectories
    signal: Signal

    @property
    def responses(self) -> list[list[tuple[int, ...]]]:
        return [[rollout.token_ids for rollout in group] for group in self.groups]


def scores(net: Any, engine: Any, responses: Any, *, full: bool, grad: bool = False) -> TokenLogprobs:
    prompts = [row.prompt for row in ROWS]
    return HFPolicy(net, processor(), engine).logprobs(prompts, responses, grad=grad, full=full)


@functools.cache
def sampled(name: str, engine: Any) -> Sampled:
    recipe, _ = CASES[name]
    method = make_method(recipe, processor().tokenizer)
    groups = trajectories_of(method, HFPolicy(STUDENT, processor(), engine), recipe.rollouts)
    if recipe.loss.importance_limit:
        groups = perturbed(groups)
    responses = [[rollout.token_ids for rollout in group] for group in groups]
    full = method.needs.distributions
    batch = make_trajectories(
        ROWS,
        groups,
        scores(STUDENT, engine, responses, full=full),
        scores(TEACHER, engine, responses, full=full) if method.needs.teacher else None,
        scores(STUDENT, engine, responses, full=False) if method.needs.reference else None,
        recipe.loss.importance_limit,
    )
    return Sampled(method=method, groups=groups, batch=batch, signal=method.signal(batch))


def student_at(updates: int) -> Any:
    return copy.deepcopy(STUDENT if updates == 1 else MOVED)


@functools.cache
def by_formula(name: str, updates: int) -> tuple[float, dict[str, torch.Tensor | None]]:
    """(loss, gradient) of the equations, for the rollouts of the prefix engine."""
    net = student_at(updates)
    loss = CASES[name][1](net, sampled(name, "prefix").groups)
    loss.backward()
    return loss.item(), {key: x.grad for key, x in net.named_parameters()}


@pytest.mark.parametrize("engine", ["prefix", "plain"])
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_equations(name: str, updates: int, engine: Any):
    """The first update on a batch, or the second: it reuses the trajectories and the signal of the first, but
    its policy is another."""
    first = sampled(name, engine)
    assert first.responses == sampled(name, "prefix").responses
    net = student_at(updates)
    student = scores(net, engine, first.responses, full=first.method.needs.distributions, grad=True)
    loss = first.method.loss(student, first.batch, first.signal, DIVISOR)
    loss.backward()
    ours = {key: x.grad for key, x in net.named_parameters()}

    expected, theirs = by_formula(name, updates)
    assert ours.keys() == theirs.keys()
    assert abs(loss.item() - expected) <= TOLERANCE * max(1e-3, abs(expected))
    off = size = 0.0
    for key, x in theirs.items():
        if x is not None:
            mine = ours[key]
            assert mine is not None, key
            off, size = off + float(((mine - x) ** 2).sum()), size + float((x**2).sum())
    assert size > 1e-8  # the gradient is not zero
    assert math.sqrt(off / size) < TOLERANCE


def test_the_moved_student_leaves_the_clip():
    """The cases above reach both sides of min and clamp."""
    ratios = []
    for row, rollout in rollout_pairs(sampled("grpo", "prefix").groups):
        now = at(frozen(MOVED, row.prompt, rollout.token_ids), rollout.token_ids).tolist()
        ratios += [math.exp(a - b) for a, b in zip(now, rollout.recorded, strict=True)]
    assert min(ratios) < 0.95 and max(ratios) > 1.07 and any(0.98 < ratio < 1.02 for ratio in ratios)


# ------------------------------------------------------------------------------------ expectation, direction


def flat_gradient(net: Any, loss: torch.Tensor) -> torch.Tensor:
    net.zero_grad()
    loss.backward(retain_graph=True)
    return torch.cat([x.grad.flatten() for x in net.parameters() if x.grad is not None])


BATCHES, ROLLOUTS = 48, 64


@functools.cache
def gradients_at_the_same_states() -> dict[str, torch.Tensor]:
    """[BATCHES, weights], float64: the analytic gradients, and the sampled ones by their baseline."""
    net, row = wide(0, 4.0).float(), ROWS[0]
    policy, teacher = HFPolicy(net, processor()), HFPolicy(copy.deepcopy(TEACHER).float(), processor())
    many = {"rollouts": ROLLOUTS}
    recipes = {
        "analytic": recipe_of("video-opd", loss={"estimator": "full"}),
        "none": recipe_of("video-opd", sampling=many, loss={"baseline": "none"}),
        "kl": recipe_of("video-opd", sampling=many, loss={"baseline": "kl"}),
    }
    methods = {name: make_method(recipe, processor().tokenizer) for name, recipe in recipes.items()}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in methods}
    for b in range(BATCHES):
        seeds = [range(1000 * b, 1000 * b + ROLLOUTS)]
        groups = methods["none"].trajectories(policy, [row.prompt], [row.sample], seeds)
        responses = [[rollout.token_ids for rollout in groups[0]]]
        student = policy.logprobs([row.prompt], responses, grad=True, full=True)
        scored_by_teacher = teacher.logprobs([row.prompt], responses, full=True)
        batch = make_trajectories([row], groups, student, scored_by_teacher)
        for name, method in methods.items():
            loss = method.loss(student, batch, method.signal(batch), float(ROLLOUTS))
            found[name].append(flat_gradient(net, loss))
    return {name: torch.stack(gradients).double() for name, gradients in found.items()}


@pytest.mark.parametrize("baseline", ["none", "kl"])
def test_the_sampled_gradient_is_on_average_the_analytic_one(baseline: str):
    """Over 48 batches of 64 rollouts, the sampled gradient (eq 6) minus the gradient of the KL at the same
    visited states is noise around 0: its mean along the analytic gradient and along random directions lies
    within its standard error. With a wrong sign, a wrong scale or a shifted token it would not."""
    ours, theirs = (gradients_at_the_same_states()[name] for name in (baseline, "analytic"))
    direction = theirs.mean(0) / theirs.mean(0).norm()
    along, size = (ours - theirs) @ direction, float((theirs @ direction).mean())
    error = float(along.std() / math.sqrt(BATCHES))
    assert abs(float(along.mean())) < 3.5 * error
    assert error < 0.1 * size  # precise enough to tell a gradient from none, or from a larger one
    g = torch.Generator().manual_seed(0)
    others = torch.randn(ours.shape[1], 40, generator=g, dtype=torch.float64)
    off = (ours - theirs) @ others
    z = off.mean(0) / (off.std(0) / math.sqrt(BATCHES))
    assert float((z**2).mean()) < 2.2  # 40 directions: 1 ± 0.22


def test_a_small_step_of_video_opd_lowers_the_reverse_kl():
    """The sign of eq 11: a step along the sampled gradient lowers the analytic KL at the visited states by
    as much as its own gradient predicts."""
    net, step = wide(0, 4.0), 1e-3
    policy = HFPolicy(net, processor())
    method = make_method(recipe_of("video-opd", sampling={"rollouts": 64}), processor().tokenizer)
    prompts, samples = [row.prompt for row in ROWS], [row.sample for row in ROWS]
    groups = method.trajectories(policy, prompts, samples, [range(64 * i, 64 * i + 64) for i in range(3)])
    responses = [[rollout.token_ids for rollout in group] for group in groups]
    scored_by_teacher = HFPolicy(TEACHER.double(), processor()).logprobs(prompts, responses, full=True)

    def divergence(grad: bool = False) -> torch.Tensor:
        p = policy.logprobs(prompts, responses, grad=grad, full=True)
        assert p.full_BTV is not None and scored_by_teacher.full_BTV is not None
        return (p.full_BTV.exp() * (p.full_BTV - scored_by_teacher.full_BTV)).sum(-1)[p.mask_BT].mean()

    student = policy.logprobs(prompts, responses, grad=True)
    batch = make_trajectories(ROWS, groups, student, scored_by_teacher)
    sampled = flat_gradient(net, method.loss(student, batch, method.signal(batch), 192.0))
    analytic = flat_gradient(net, divergence(grad=True))
    expected = step * float(sampled @ analytic) / float(sampled.norm())
    before = divergence().item()
    with torch.no_grad():
        start = 0
        for parameter in net.parameters():
            if parameter.grad is not None:
                piece = sampled[start : start + parameter.numel()]
                parameter -= step * piece.view_as(parameter) / sampled.norm()
                start += parameter.numel()
    assert start == len(sampled)
    assert expected > 0 and math.isclose(before - divergence().item(), expected, rel_tol=0.2)


# ----------------------------------------------------------------------------------------------- trajectories


def test_an_annotation_is_written_as_the_answer_that_was_asked_for():
    method = make_method(recipe_of("sft"), processor().tokenizer)
    several = replace(sample(1), spans=((0.25, 1.5), (2.0, 2.5)))
    seen: set[str] = set()
    for seed in range(6):
        ((rollout,),) = method.trajectories(
            HFPolicy(STUDENT, processor()), [ROWS[0].prompt], [several], [[seed]]
        )
        assert rollout.logprobs is None and not rollout.truncated
        assert rollout.token_ids[-1] == processor().tokenizer.eos_token_id
        assert processor().tokenizer.decode(rollout.token_ids[:-1]) == rollout.text
        seen.add(rollout.text)
    assert seen == {format_span(span) for span in several.spans}


def test_a_sampled_response_has_its_logprobs():
    method = make_method(recipe_of("grpo", sampling={"rollouts": 3}), processor().tokenizer)
    (group,) = method.trajectories(
        HFPolicy(STUDENT, processor()), [ROWS[0].prompt], [ROWS[0].sample], [[1, 2, 3]]
    )
    assert len(group) == 3 and all(len(r.recorded) == len(r.token_ids) for r in group)


def test_a_reward_of_the_users_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text("def longer(sample, text):\n    return float(len(text))\n")
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of("grpo", sampling={"rollouts": 2}, reward={"function": "mine.py:longer"})
    method = make_method(recipe, processor().tokenizer)
    assert not method.needs.annotation
    rollouts = [
        Rollout(token_ids=(1,), logprobs=(-1.0,), text=text, truncated=False) for text in ("a", "abc")
    ]
    batch = Trajectories(
        samples=[sample(0)] * 2, rollouts=rollouts, old_BT=torch.zeros(2, 1), mask_BT=torch.ones(2, 1).bool()
    )
    signal: Signal = method.signal(batch)
    assert signal.reward_B is not None and signal.reward_B.tolist() == [1.0, 3.0]


def test_samples_are_typed() -> None:
    assert all(isinstance(row.sample, Sample) and row.sample.spans for row in ROWS)
