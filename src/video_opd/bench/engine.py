"""Compares the prefix engine with the plain one: training steps, scoring, queries on one video, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from video_opd.bench.timing import Work, peak_bytes, summary, take_turns
from video_opd.bench.work import Engine, Steps, prompts_of, seeds_of
from video_opd.config import PromptConfig
from video_opd.models.policy import HFPolicy
from video_opd.progress import log
from video_opd.training.step import StepResult
from video_opd.types import EncodedPrompt, Rollout

Check = Callable[[dict[str, Any], str], Mapping[str, float | None]]
ENGINES: tuple[Engine, ...] = ("plain", "prefix")
LOGPROB_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}  # nats
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.2}  # relative, of loss and gradient norm
SCORED, QUERIES = 8, 5


def bench_engine(
    model: Any,
    processor: Any,
    teacher: Any,
    *,
    lengths: Sequence[int],
    rollouts: Sequence[int] = (8,),
    prompts: int = 1,
    repeats: int = 5,
    dtype: str = "float32",
    tokens: int = 16,
    side_px: int = 64,
    memory: bool = True,
    plain_up_to: int = 1500,
    prompt: PromptConfig | None = None,
) -> list[dict[str, Any]]:
    """Measures every job at every prompt length: seconds, speed-ups with quartiles, peak memory.

    GRPO is a job for each number of ``rollouts``. The first way of a job is the reference of the speed-ups.
    The ways that sample without a cache are left out for prompts of more than ``plain_up_to`` tokens.

    Returns a record for each length and job. Raises ``AssertionError`` if two ways give different responses,
    log-probs or gradients.
    """
    device = next(model.parameters()).device
    records = []
    for length in lengths:
        shown = prompts_of(processor, length, videos=prompts, side_px=side_px, prompt=prompt)
        asked = prompts_of(processor, length, queries=QUERIES, side_px=side_px, prompt=prompt)
        policies = {engine: HFPolicy(model, processor, engine) for engine in ENGINES}

        def steps(method: str, engine: Engine, count: int, **settings: Any) -> Steps:
            return Steps(
                model,
                processor,
                teacher,
                shown,  # noqa: B023  (called within the iteration)
                method=method,
                engine=engine,
                rollouts=count,
                dtype=dtype,
                tokens=tokens,
                **settings,
            )

        jobs: dict[str, tuple[dict[str, Work], Check]] = {
            "video-opd": (step_ways(steps, "video-opd", 1), same_step),
            **{
                f"grpo, {count} rollouts": (
                    step_ways(steps, "grpo", count) | {"prefix, one rollout": steps("grpo", "prefix", 1)},
                    same_step,
                )
                for count in rollouts
            },
            f"score, {SCORED} answers": (scoring_ways(policies, shown, tokens), same_responses),
            f"{QUERIES} queries on a video": (query_ways(policies, asked, tokens), same_responses),
        }
        for job, (ways, same) in jobs.items():
            if length > plain_up_to:
                del ways["plain"]
            reference = next(iter(ways))
            results, seconds = take_turns(ways, repeats, device)
            found = summary(seconds, reference)
            for name, work in ways.items() if memory else ():
                found[name]["peak_bytes"] = peak_bytes(work, device)
            records.append(
                {
                    "job": job,
                    "prompt_tokens": shown[0].length,
                    "prompts": len(shown),
                    "reference": reference,
                    "ways": found,
                    "differences": same(results, dtype),
                }
            )
            times = ", ".join(f"{name} {way['seconds']:.2f} s" for name, way in found.items())
            log(f"{job}, {shown[0].length} tokens: {times}")
    return records


def step_ways(steps: Callable[..., Steps], method: str, rollouts: int) -> dict[str, Work]:
    """The ways to run a step of ``method``, by both engines, with and without recomputation.

    ``plain`` runs every forward over whole sequences; ``plain update`` does so in the update alone, and
    samples with a cache.
    """
    return {
        "plain": steps(method, "plain", rollouts),
        "plain update": steps(method, "plain", rollouts, cached=True),
        "plain update, recompute, one rollout": steps(method, "plain", 1, cached=True, recompute=True),
        "prefix": steps(method, "prefix", rollouts),
        "prefix, recompute": steps(method, "prefix", rollouts, recompute=True),
    }


def scoring_ways(
    policies: Mapping[Engine, HFPolicy], prompts: Sequence[EncodedPrompt], tokens: int
) -> dict[str, Work]:
    """The ways to sample ``SCORED`` responses to each prompt."""

    def all_at_once(policy: HFPolicy) -> Work:
        return lambda: sample(policy, prompts, SCORED, tokens)

    def one_by_one() -> list[list[Rollout]]:
        return [
            [sample_one(policies["prefix"], prompt, seed, tokens) for seed in seeds]
            for prompt, seeds in zip(prompts, seeds_of(prompts, SCORED), strict=True)
        ]

    return {
        "plain": all_at_once(policies["plain"]),
        "cached, one by one": one_by_one,
        "prefix": all_at_once(policies["prefix"]),
    }


def query_ways(
    policies: Mapping[Engine, HFPolicy], prompts: Sequence[EncodedPrompt], tokens: int
) -> dict[str, Work]:
    """The ways to sample one response to each of the prompts, which show the same video."""

    def one_by_one(engine: Engine) -> list[list[Rollout]]:
        return [group for prompt in prompts for group in sample(policies[engine], [prompt], 1, tokens)]

    return {
        "plain": lambda: one_by_one("plain"),
        "cached, one by one": lambda: one_by_one("prefix"),
        "prefix": lambda: sample(policies["prefix"], prompts, 1, tokens),
    }


@torch.no_grad()
def sample_one(policy: HFPolicy, prompt: EncodedPrompt, seed: int, tokens: int) -> Rollout:
    return policy.sample([prompt], max_new_tokens=tokens, seeds=[[seed]])[0][0]


@torch.no_grad()
def sample(policy: HFPolicy, prompts: Sequence[EncodedPrompt], n: int, tokens: int) -> list[list[Rollout]]:
    return policy.sample(prompts, n=n, max_new_tokens=tokens, seeds=seeds_of(prompts, n))


def same_step(results: dict[str, StepResult], dtype: str) -> dict[str, float]:
    """The largest relative difference of loss and gradient norm from the first way's.

    Raises ``AssertionError`` if it is too large, and in float32 if the responses differ.
    """
    plain = next(iter(results.values()))
    worst = 0.0
    for name, step in results.items():
        mine, theirs = step.responses, plain.responses
        if len(mine) != len(theirs):
            continue  # a way with another number of rollouts
        if dtype == "float32":
            assert mine == theirs, f"{name}: other responses than the first way's"
        # GRPO's terms cancel if responses are equally long: rounding is relative to a term, not to their sum.
        scale = max(abs(plain.loss), 1.0)
        worst = max(worst, abs(step.loss - plain.loss) / scale)
        if plain.grad_norm > 0 and math.isfinite(plain.grad_norm):
            worst = max(worst, abs(step.grad_norm - plain.grad_norm) / plain.grad_norm)
    assert worst <= LOSS_TOLERANCE[dtype], f"loss or gradient norm differ by {worst:.2g}"
    return {"loss_and_gradient_norm": worst}


def same_responses(results: dict[str, list[list[Rollout]]], dtype: str) -> dict[str, float | None]:
    """The largest difference of a token's log-prob from the first way's, in nats; None if no token can be
    compared.

    In bfloat16 a response may become another one by rounding: it is compared up to there. Raises
    ``AssertionError`` if the difference is too large, and in float32 if the responses differ.
    """
    found: list[float] = []
    plain, *others = results
    for name in others:
        for group, first in zip(results[name], results[plain], strict=True):
            for a, b in zip(group, first, strict=True):
                same = _common_length(a.token_ids, b.token_ids)
                assert dtype != "float32" or same == len(a.token_ids) == len(b.token_ids), (
                    f"{name}: other responses than the first way's"
                )
                found += [abs(x - y) for x, y in zip(a.recorded[:same], b.recorded[:same], strict=True)]
    worst = max(found, default=None)
    assert worst is None or worst <= LOGPROB_TOLERANCE[dtype], f"log-probs differ by {worst:.2g} nats"
    return {"logprob": worst}


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    lines = ["| job | prompt | way | seconds | faster than the first | peak |", "|---|---|---|---|---|---|"]
    for record in records:
        for name, way in record["ways"].items():
            speed, peak = way["speedup"], way.get("peak_bytes")
            lines.append(
                f"| {record['job']} | {record['prompt_tokens']} | {name} | {way['seconds']:.3f} "
                f"| {speed['median']:.2f}× [{speed['low']:.2f}, {speed['high']:.2f}] "
                f"| {'' if peak is None else f'{peak / 2**20:.0f} MiB'} |"
            )
    return "\n".join(lines)


def against_grpo(records: Sequence[dict[str, Any]]) -> list[str]:
    """Compares a step of Video-OPD with one of GRPO, by both engines (figure 6): a line for each GRPO job."""
    lines = []
    for ours in records:
        for theirs in records:
            same_prompts = theirs["prompt_tokens"] == ours["prompt_tokens"]
            if ours["job"] == "video-opd" and theirs["job"].startswith("grpo") and same_prompts:
                shares = [
                    f"{100 * ours['ways'][way]['seconds'] / theirs['ways'][way]['seconds']:.0f}% ({engine})"
                    for engine, way in (("plain", ours["reference"]), ("prefix", "prefix"))
                ]
                lines.append(
                    f"{ours['prompt_tokens']} tokens: a step of video-opd against one of {theirs['job']}: "
                    + ", ".join(shares)
                )
    return lines
