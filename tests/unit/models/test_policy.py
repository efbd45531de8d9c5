"""The prefix engine against the plain one, and both against the stock model and ``generate``."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from model_cases import (
    PLACEHOLDERS,
    QUERIES,
    SEEDS,
    encode,
    forbidden,
    mixed_prompts,
    mixture,
    model,
    old_logprobs,
    processor,
    stock_logprobs,
    tokens_of,
)

from video_opd.errors import UserError
from video_opd.models.kv_cache import GrowingLayer
from video_opd.models.policy import HFPolicy
from video_opd.models.vision_attention import use_batched_frames
from video_opd.planning.graph import graph_bytes
from video_opd.planning.sizes import sizes_of


def policy(engine: Any = "prefix", **options: Any) -> HFPolicy:
    return HFPolicy(model(sharpness=20), processor(), engine, **options)


# -------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("engine", ["prefix", "plain"])
def test_recorded_logprobs_are_those_of_the_stock_model(engine: str) -> None:
    student = policy(engine)
    rollouts = student.sample(mixed_prompts(), n=3, max_new_tokens=7, seeds=SEEDS)
    for prompt, group in zip(mixed_prompts(), rollouts, strict=True):
        assert len({r.token_ids for r in group}) == 3
        for rollout in group:
            expected = stock_logprobs(student.model, prompt, rollout.token_ids)
            expected = expected.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6, "top_p": 0.9, "top_k": 20}, {"temperature": 0.0}]
)
def test_engines_write_the_same(settings: dict) -> None:
    fast, plain = (
        policy(engine).sample(mixed_prompts(), n=3, max_new_tokens=6, seeds=SEEDS, **settings)
        for engine in ("prefix", "plain")
    )
    assert tokens_of(fast) == tokens_of(plain)
    torch.testing.assert_close(old_logprobs(fast, 6), old_logprobs(plain, 6), atol=1e-4, rtol=0)


def test_greedy_writes_what_generate_writes() -> None:
    student = policy()
    use_batched_frames(student.model)
    rollouts = student.sample(mixed_prompts(), max_new_tokens=9, temperature=0)
    reference = model(sharpness=20)
    for prompt, (rollout,) in zip(mixed_prompts(), rollouts, strict=True):
        written = reference.generate(
            input_ids=prompt.input_ids,
            **prompt.tensors,
            max_new_tokens=9,
            do_sample=False,
            temperature=None,
            suppress_tokens=forbidden(reference.config.text_config.vocab_size),
        )[0, prompt.length :]
        assert rollout.token_ids == tuple(written.tolist())


def test_tokens_come_as_often_as_their_probability() -> None:
    student = HFPolicy(model(sharpness=60), processor())
    prompt, n = mixed_prompts()[0], 4000
    (group,) = student.sample([prompt], n=n, max_new_tokens=1, seeds=[range(n)])
    expected = n * stock_logprobs(student.model, prompt, (9,))[0].exp()
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in group]), minlength=len(expected))
    often = expected >= 8
    assert often.sum() >= 5
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    chi2 = ((observed - wanted) ** 2 / wanted).sum().item()
    degrees = len(wanted) - 1
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_placeholders_and_ids_without_a_token_are_never_written(temperature: float) -> None:
    student = policy()
    prompts = mixed_prompts()[:2]
    hidden = student.prefill(prompts).last_hidden_BD.mean(0)
    banned = forbidden(student.model.config.text_config.vocab_size)
    assert len(banned) > len(PLACEHOLDERS)  # the tiny model's embedding is padded too
    with torch.no_grad():
        student.model.lm_head.weight[banned] = 1e4 * hidden
    rollouts = student.sample(prompts, n=3, max_new_tokens=5, temperature=temperature, seeds=SEEDS[:2])
    assert not set(banned) & {i for group in tokens_of(rollouts) for tokens in group for i in tokens}
    scores = student.logprobs(prompts, tokens_of(rollouts), full=True)
    assert scores.full_BTV is not None and scores.full_BTV.isfinite().all()
    mass = scores.full_BTV.exp()[scores.mask_BT]
    torch.testing.assert_close(mass.sum(-1), torch.ones(len(mass)))
    assert mass[:, banned[: len(PLACEHOLDERS)]].max() == 0


def test_a_rollout_does_not_depend_on_its_batch() -> None:
    student = policy()
    together = student.sample(mixed_prompts(), n=3, max_new_tokens=6, seeds=SEEDS)
    for prompt, seeds, group in zip(mixed_prompts(), SEEDS, together, strict=True):
        (alone,) = student.sample([prompt], max_new_tokens=9, seeds=[seeds[1:2]])
        assert alone[0].token_ids[:6] == group[1].token_ids
    backwards = student.sample(mixed_prompts()[::-1], n=3, max_new_tokens=6, seeds=SEEDS[::-1])
    assert tokens_of(backwards[::-1]) == tokens_of(together)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("engine", ["prefix", "plain"])
def test_a_response_ends_with_its_end_token(engine: str, end: str) -> None:
    student = policy(engine)
    end_id = processor().tokenizer.convert_tokens_to_ids(end)
    with torch.no_grad():  # every end is about as likely as all other tokens together
        student.model.lm_head.weight[end_id] = 0
        hidden = student.prefill(mixed_prompts()).last_hidden_BD.mean(0)
        student.model.lm_head.weight[end_id] = 9 * hidden / hidden.square().sum()
    rollouts = [r for g in student.sample(mixed_prompts(), n=3, max_new_tokens=6, seeds=SEEDS) for r in g]
    ended = [r for r in rollouts if not r.truncated]
    assert ended and len(ended) < len(rollouts)
    ends = set(student.vocabulary.eos_ids)
    for rollout in rollouts:
        assert not ends & set(rollout.token_ids[:-1])
        assert (rollout.token_ids[-1] in ends) == (not rollout.truncated)
        assert not rollout.truncated or len(rollout.token_ids) == 6
        assert end not in rollout.text
    assert min(len(r.token_ids) for r in ended) < 6


def test_decoding_stops_when_all_have_ended() -> None:
    student = policy()
    (end_id, *_) = student.vocabulary.eos_ids
    hidden = student.prefill(mixed_prompts()).last_hidden_BD.mean(0)
    with torch.no_grad():
        student.model.lm_head.weight[end_id] = 1000 * hidden
    forwards = count_forwards(student.model.model)
    rollouts = student.sample(mixed_prompts(), max_new_tokens=50, temperature=0)
    assert tokens_of(rollouts) == [[(end_id,)]] * 3 and len(forwards) == 2  # videos, queries, no responses


def test_a_prefix_serves_many_times() -> None:
    student = policy()
    prefix = student.prefill(mixed_prompts())
    length = prefix.cache.get_seq_length()
    once = student.sample(prefix, n=1, max_new_tokens=5, seeds=[s[:1] for s in SEEDS])
    again = student.sample(prefix, n=3, max_new_tokens=5, seeds=SEEDS)
    assert tokens_of(once) == [group[:1] for group in tokens_of(again)]
    assert prefix.cache.get_seq_length() == length == max(p.length for p in mixed_prompts())
    assert tokens_of(policy("plain").sample(prefix, n=3, max_new_tokens=5, seeds=SEEDS)) == tokens_of(again)


@pytest.mark.parametrize("n", [1, 2])
def test_responses_grow_in_place_and_the_prefix_stays(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A response longer than CACHE_ROOM makes the buffers grow; no single token copies the cache."""
    monkeypatch.setattr("video_opd.models.kv_cache.CACHE_ROOM", 4)
    student = policy()
    prefix = student.prefill(mixed_prompts())
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.cache.layers]
    places: list[int] = []
    grown = GrowingLayer.update

    def update(self: GrowingLayer, *args: Any, **kwargs: Any) -> Any:
        result = grown(self, *args, **kwargs)
        places.append(result[0].data_ptr())
        return result

    monkeypatch.setattr(GrowingLayer, "update", update)
    seeds = [s[:n] for s in SEEDS]
    got = student.sample(prefix, n=n, max_new_tokens=12, seeds=seeds)
    layers = len(prefix.cache.layers)
    mine = places[::layers]  # of the first layer, for each token
    assert len(mine) == 11 and len(set(mine[:4])) == len(set(mine[4:8])) == 1
    for layer, (keys, values) in zip(prefix.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    plain = policy("plain").sample(mixed_prompts(), n=n, max_new_tokens=12, seeds=seeds)
    assert tokens_of(got) == tokens_of(plain)
    torch.testing.assert_close(old_logprobs(got, 12), old_logprobs(plain, 12), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seeds", [None, [[1, 2, 3]], [[1], [2], [3]]])
def test_sampling_without_its_seeds_is_refused(seeds: Any) -> None:
    with pytest.raises(ValueError, match="3 lists of 3 integers"):
        policy().sample(mixed_prompts(), n=3, max_new_tokens=2, seeds=seeds)


# ----------------------------------------------------------------------------------------- log-probabilities

RESPONSES: Any = [[(9, 145, 296), (46, 25, 9, 354, 122)], [(57,)], [(20, 21), (22, 23, 24, 25), (26, 27, 28)]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("engine", ["prefix", "plain"])
@pytest.mark.parametrize("grad", [False, True])
def test_scores_are_those_of_the_stock_model(engine: str, grad: bool, temperature: float) -> None:
    student = policy(engine)
    scores = student.logprobs(mixed_prompts(), RESPONSES, grad=grad, full=True, temperature=temperature)
    assert scores.logprobs_BT.dtype == torch.float32 and scores.logprobs_BT.requires_grad == grad
    assert scores.full_BTV is not None and scores.full_BTV.shape == (6, 5, len(processor().tokenizer))
    row = 0
    for prompt, group in zip(mixed_prompts(), RESPONSES, strict=True):
        for tokens in group:
            length = len(tokens)
            expected = (stock_logprobs(student.model, prompt, tokens) / temperature).log_softmax(-1)
            allowed = expected[0, : scores.full_BTV.shape[-1]].isfinite()
            full = scores.full_BTV[row, :length].detach()
            torch.testing.assert_close(
                full[:, allowed], expected[:, : len(allowed)][:, allowed], atol=1e-4, rtol=0
            )
            picked = full.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
            torch.testing.assert_close(scores.logprobs_BT[row, :length].detach(), picked)
            assert scores.mask_BT[row].tolist() == [t < length for t in range(5)]
            assert not scores.logprobs_BT[row, length:].any()
            row += 1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_first_ratio_is_one(temperature: float) -> None:
    student = policy()
    rollouts = student.sample(mixed_prompts(), n=3, max_new_tokens=7, seeds=SEEDS, temperature=temperature)
    scores = student.logprobs(mixed_prompts(), tokens_of(rollouts), grad=True, temperature=temperature)
    assert (scores.logprobs_BT - old_logprobs(rollouts, scores.mask_BT.shape[1])).abs().max() < 1e-5


def gradients(of: HFPolicy, responses: Any = RESPONSES, prefix: Any = None) -> dict[str, torch.Tensor]:
    of.model.zero_grad()
    scores = of.logprobs(prefix or mixed_prompts(), responses, grad=True)
    weights = torch.linspace(-1, 1, scores.logprobs_BT.numel()).view_as(scores.logprobs_BT)
    (scores.logprobs_BT * weights).sum().backward()
    return {name: p.grad.clone() for name, p in of.model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("responses", [RESPONSES, [[(9, 10)]] * 3, [[(9,), (8,)]] * 3])
def test_gradients_through_the_prefix_are_the_plain_ones(responses: Any) -> None:
    assert_same_gradients(gradients(policy(), responses), gradients(policy("plain"), responses))


@pytest.mark.parametrize("frozen", [(), ("visual",), ("language_model",)], ids=str)
def test_one_prefill_serves_sampling_and_the_update(frozen: tuple[str, ...]) -> None:
    """``frozen`` are the frozen parts: the vision tower, or everything but the tower and the head."""
    student, plain = policy(), policy("plain")
    for of in (student, plain):
        for part in frozen:
            getattr(of.model.model, part).requires_grad_(False)
    tower = count_forwards(student.model.model.visual)
    prefix = student.prefill(mixed_prompts(), grad=True)
    rollouts = student.sample(prefix, n=3, max_new_tokens=5, seeds=SEEDS)
    responses = tokens_of(rollouts)
    got = gradients(student, responses, prefix)
    assert len(tower) == 1
    assert responses == tokens_of(plain.sample(mixed_prompts(), n=3, max_new_tokens=5, seeds=SEEDS))
    assert_same_gradients(got, gradients(plain, responses))


@pytest.mark.parametrize("frozen", [(), ("visual",)], ids=str)
def test_recomputed_gradients_are_the_same(frozen: tuple[str, ...]) -> None:
    """Also after sampling from the prefix. Every layer runs twice: once forward, once for the backward."""
    student, plain = policy(recompute=True), policy("plain")
    for of in (student, plain):
        for part in frozen:
            getattr(of.model.model, part).requires_grad_(False)
    student.model.train()
    layers = [count_layer_runs(layer) for layer in student.model.model.language_model.layers]
    prefix = student.prefill(mixed_prompts(), grad=True)
    responses = tokens_of(student.sample(prefix, n=3, max_new_tokens=5, seeds=SEEDS))
    assert responses == tokens_of(plain.sample(mixed_prompts(), n=3, max_new_tokens=5, seeds=SEEDS))
    before = [len(runs) for runs in layers]
    scores = student.logprobs(prefix, responses, grad=True)
    assert [len(runs) - n for runs, n in zip(layers, before, strict=True)] == [1] * len(
        layers
    )  # the responses
    weights = torch.linspace(-1, 1, scores.logprobs_BT.numel()).view_as(scores.logprobs_BT)
    (scores.logprobs_BT * weights).sum().backward()
    # Responses, queries and videos take three forwards, each repeated once.
    assert [len(runs) - n for runs, n in zip(layers, before, strict=True)] == [1 + 3] * len(layers)
    got = {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
    assert_same_gradients(got, gradients(plain, responses))
    assert "forward" not in student.model.model.language_model.layers[0].__dict__


@pytest.mark.parametrize("recompute", [False, True])
def test_a_cut_backward_gives_each_weight_its_gradients_one_after_the_other(recompute: bool) -> None:
    """First that of the responses, before the prompts' backward begins, then those of queries and videos."""
    student, plain = policy(recompute=recompute), policy("plain")
    student.model.train()
    weight = student.model.model.language_model.layers[1].mlp.up_proj.weight
    given: list[torch.Tensor] = []
    weight.register_post_accumulate_grad_hook(lambda w: given.append(w.grad.clone()))
    prefix, go_on = student.prefill(mixed_prompts(), grad=True).cut()
    responses = tokens_of(student.sample(prefix, n=3, max_new_tokens=5, seeds=SEEDS))
    scores = student.logprobs(prefix, responses, grad=True)
    weights = torch.linspace(-1, 1, scores.logprobs_BT.numel()).view_as(scores.logprobs_BT)
    (scores.logprobs_BT * weights).sum().backward()
    assert len(given) == 1 and student.model.model.visual.patch_embed.proj.weight.grad is None
    go_on()
    assert len(given) == 2 and not torch.allclose(given[0], given[1])
    got = {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
    assert_same_gradients(got, gradients(plain, responses))


def test_a_prefix_of_frozen_layers_has_nothing_to_go_on_with() -> None:
    student = policy()
    student.model.model.requires_grad_(False)
    prefix, go_on = student.prefill(mixed_prompts(), grad=True).cut()
    student.logprobs(prefix, [[(9, 10)]] * 3, grad=True).logprobs_BT.sum().backward()
    go_on()
    assert student.model.lm_head.weight.grad.norm() > 0


def count_layer_runs(layer: Any) -> list[int]:
    """A list that grows with every run of the layer's attention, with or without hooks."""
    runs: list[int] = []
    layer.self_attn.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


def kept_bytes(of: HFPolicy) -> int:
    """The bytes that autograd keeps of a prefill, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in of.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x  # kept, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        of.prefill(mixed_prompts(), grad=True)
    return sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in weights)


@pytest.mark.parametrize("made", [model, mixture])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_computing_again_keeps_less_and_the_estimate_of_the_rest_holds(made: Any, dtype: str) -> None:
    compute_dtype = None if dtype == "float32" else torch.bfloat16
    kept, again = (
        HFPolicy(made(), processor(), compute_dtype=compute_dtype, recompute=recompute)
        for recompute in (False, True)
    )
    for of in (kept, again):
        of.model.model.visual.requires_grad_(False)
        of.model.train()
    rows, columns = kept.prefill(mixed_prompts()).attention_mask_BP.shape
    assert rows == 3
    text = sizes_of(kept.model.config.to_dict(), "model").text
    tokens = 2 * trunk_length() + 3 * (columns - trunk_length())
    estimate = graph_bytes(text, tokens, "float32" if compute_dtype is None else "autocast")
    if compute_dtype is not None:  # autocast's copies of the weights of linear layers
        layers = kept.model.model.language_model.layers
        estimate += 2 * sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2)
    assert kept_bytes(again) < 0.25 * kept_bytes(kept)
    assert 0.75 * kept_bytes(kept) < estimate < 1.25 * kept_bytes(kept)


def test_a_prefix_without_gradients_gives_none() -> None:
    student = policy()
    with pytest.raises(ValueError, match="prefilled without gradients"):
        student.logprobs(student.prefill(mixed_prompts()), RESPONSES, grad=True)


def test_checkpointing_warns_once_that_it_costs_more(caplog: pytest.LogCaptureFixture) -> None:
    student = policy()
    new_name = getattr(student.model, "activation_checkpointing_enable", None)  # not in 5.20
    (new_name or student.model.gradient_checkpointing_enable)({"use_reentrant": False})
    student.model.train()
    tower = count_forwards(student.model.model.visual)
    with caplog.at_level(logging.WARNING, logger="video_opd"):
        got = gradients(student)
        gradients(student)
    assert [r.message for r in caplog.records if r.name.startswith("video_opd")] == [
        "gradient checkpointing drops the key/value cache: updates run the prompt once per response"
    ]
    assert [shape[0] for shape in tower] == [distinct_patches()] * 2
    assert_same_gradients(got, gradients(policy("plain")))
    # Sampling and scoring keep their cache and do not change the mode.
    rollouts = student.sample(mixed_prompts(), max_new_tokens=5, seeds=[s[:1] for s in SEEDS])
    assert tokens_of(rollouts) == tokens_of(
        policy().sample(mixed_prompts(), max_new_tokens=5, seeds=[s[:1] for s in SEEDS])
    )
    assert all(module.training for module in student.model.modules())


def test_modes_of_single_modules_survive() -> None:
    student = policy()
    student.model.train()
    student.model.model.visual.eval()
    student.logprobs(mixed_prompts()[:1], [[(9,)]])
    assert student.model.lm_head.training and not student.model.model.visual.blocks[0].training


@pytest.mark.parametrize("bad", ["<|video_pad|>", None])
def test_a_token_that_cannot_be_written_is_named(bad: str | None) -> None:
    token = processor().tokenizer.convert_tokens_to_ids(bad) if bad else len(processor().tokenizer)
    with pytest.raises(UserError, match=f"{mixed_prompts()[1].sample_id}.*token {token} "):
        policy().logprobs(mixed_prompts()[:2], [[(9,)], [(9, token)]])


# -------------------------------------------------------------------------------- what is computed, and where


def count_forwards(module: Any) -> list[tuple[int, ...]]:
    """A list to which every forward of ``module`` adds the shape of its first argument."""
    shapes: list[tuple[int, ...]] = []

    def hook(_: Any, args: tuple, kwargs: dict) -> None:
        shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    module.register_forward_pre_hook(hook, with_kwargs=True)
    return shapes


def distinct_patches() -> int:
    prompts = mixed_prompts()
    assert prompts[1].clip_digest == prompts[2].clip_digest
    return sum(len(p.tensors["pixel_values_videos"]) for p in prompts[:2])


def trunk_length() -> int:
    """The number of tokens that the two prompts on one video share, counted by this test."""
    first, second = (p.input_ids[0].tolist() for p in mixed_prompts()[1:])
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


@pytest.mark.parametrize("grad", [False, True])
def test_a_video_and_a_prompt_are_prefilled_once(grad: bool) -> None:
    student = policy()
    tower, transformer = count_forwards(student.model.model.visual), count_forwards(student.model.model)
    student.logprobs(mixed_prompts(), RESPONSES, grad=grad)
    assert [shape[0] for shape in tower] == [distinct_patches()]
    prefill = [(2, trunk_length()), (3, max(p.length for p in mixed_prompts()) - trunk_length())]
    assert transformer == [*prefill, (3, 3 * 4)]  # up to three responses a prompt, without their last tokens
    student.sample(mixed_prompts(), n=3, max_new_tokens=4, seeds=SEEDS)
    assert [shape[0] for shape in tower] == [distinct_patches()] * 2
    assert transformer[3:] == [*prefill, (3, 3), (3, 3), (3, 3)]


def test_prompts_of_several_lengths_attend_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask would cost the attention products with future tokens, and a GPU its fast kernels."""
    prompts = mixed_prompts()[:2]
    assert len({prompt.length for prompt in prompts}) == 2
    attend, masked = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.shape[0] == len(prompts):  # the vision tower has a row for each frame
            mask = kwargs.get("attn_mask")
            masked.append((query.shape[-2], mask is not None, kwargs.get("is_causal", False)))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    student = policy()
    together = student.prefill(prompts)
    layers = len(student.model.model.language_model.layers)
    assert masked == [(max(prompt.length for prompt in prompts), False, True)] * layers
    for row, prompt in enumerate(prompts):
        alone = student.prefill([prompt])
        assert together.attention_mask_BP[row].tolist() == [1] * prompt.length + [0] * (
            together.attention_mask_BP.shape[1] - prompt.length
        )
        torch.testing.assert_close(together.last_hidden_BD[row], alone.last_hidden_BD[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", ["prefix", "plain"])
def test_only_response_positions_meet_the_head(engine: str) -> None:
    student = policy(engine)
    head = count_forwards(student.model.lm_head)
    student.logprobs(mixed_prompts(), RESPONSES)
    assert sum(shape[0] for shape in head) == sum(len(tokens) for group in RESPONSES for tokens in group)


def test_long_batches_of_logits_are_cut_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    student = policy()
    whole = student.logprobs(mixed_prompts(), RESPONSES, full=True)
    monkeypatch.setattr("video_opd.models.head.TOKENS_A_CHUNK", 4)
    cut = student.logprobs(mixed_prompts(), RESPONSES, full=True)
    torch.testing.assert_close(cut.full_BTV, whole.full_BTV)
    torch.testing.assert_close(cut.logprobs_BT, whole.logprobs_BT)


@pytest.mark.parametrize("engine", ["prefix", "plain"])
def test_prompts_without_a_video(engine: str) -> None:
    student = policy(engine)
    ids = torch.tensor([processor().tokenizer("when does the red circle appear?")["input_ids"]])
    text_only = replace(
        mixed_prompts()[0], input_ids=ids, tensors={"mm_token_type_ids": torch.zeros_like(ids)}
    )
    expected = stock_logprobs(student.model, text_only, (9, 10, 11))[0, 9]
    for prompts in (
        [text_only],
        [mixed_prompts()[1], text_only],
        [replace(text_only, input_ids=ids[:, -2:], tensors={}), text_only],
    ):
        scores = student.logprobs(prompts, [[(9, 10, 11)]] * len(prompts))
        torch.testing.assert_close(scores.logprobs_BT[-1, 0], expected, atol=1e-4, rtol=0)


def test_student_and_teacher_number_the_positions_of_a_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = policy(), policy()
    counted = [Mock(wraps=asked.model.model.get_rope_index) for asked in (student, teacher)]
    for asked, number in zip((student, teacher), counted, strict=True):
        monkeypatch.setattr(asked.model.model, "get_rope_index", number)
    prompt = encode(QUERIES[0])
    for asked in (student, teacher, student):
        asked.logprobs([prompt], [[(9,)]])
    assert [number.call_count for number in counted] == [1, 0]
    assert set(prompt.positions) == {student.model.config.vision_config.spatial_merge_size}
    types = prompt.tensors["mm_token_type_ids"][:, :-1]
    shorter = replace(
        prompt, input_ids=prompt.input_ids[:, :-1], tensors={**prompt.tensors, "mm_token_type_ids": types}
    )
    student.logprobs([shorter], [[(9,)]])
    assert [number.call_count for number in counted] == [2, 0]  # another prompt


def test_placeholders_without_pixels_are_an_error() -> None:
    prompt = encode(QUERIES[0])
    blind = replace(prompt, tensors={"mm_token_type_ids": prompt.tensors["mm_token_type_ids"]})
    with pytest.raises(UserError, match=r"8 video placeholders .* its video has 0 tokens"):
        policy().logprobs([blind], [[(9,)]])
    other = replace(prompt, tensors={**encode(QUERIES[0], frames=6).tensors})
    with pytest.raises(UserError, match=r"8 video placeholders .* its video has 12 tokens"):
        policy().sample([other], max_new_tokens=1, temperature=0)


def test_reduced_precision_computes_on_master_weights() -> None:
    exact, reduced = policy(), policy(compute_dtype=torch.bfloat16)
    seen = []
    reduced.model.model.language_model.layers[0].mlp.up_proj.register_forward_hook(
        lambda _, __, out: seen.append(out.dtype)
    )
    expected = exact.logprobs(mixed_prompts(), RESPONSES).logprobs_BT
    got = reduced.logprobs(mixed_prompts(), RESPONSES)
    assert set(seen) == {torch.bfloat16} and got.logprobs_BT.dtype == torch.float32
    error = (got.logprobs_BT - expected).abs()
    assert 0 < error.mean() < 0.05
    with torch.autocast(
        "cpu", dtype=torch.bfloat16
    ):  # training must also work if the loop autocasts around both
        reduced.sample(mixed_prompts(), max_new_tokens=2, temperature=0)
        found = gradients(reduced)
    assert found.keys() == dict(reduced.model.named_parameters()).keys()
    assert {g.dtype for g in found.values()} == {torch.float32}


@pytest.mark.parametrize("rows", [16384, 100])
def test_half_precision_weights_do_not_round_their_logits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("video_opd.models.head.ROWS_A_CHUNK", rows)
    student = policy()
    student.model.bfloat16()
    (prompt,), tokens = mixed_prompts()[:1], (9, 145, 296)
    head: list[torch.Tensor] = []
    student.model.lm_head.register_forward_pre_hook(lambda _, args: head.append(args[0]))
    stock_logprobs(student.model, prompt, tokens)
    hidden = head[0][0, prompt.length - 1 : -1].double()
    exact = hidden @ student.model.lm_head.weight.double().T
    exact[:, forbidden(exact.shape[-1])] = -torch.inf
    expected = exact.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].float()
    got = HFPolicy(student.model, processor(), "plain").logprobs([prompt], [[tokens]]).logprobs_BT[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_gradients_are_synchronised_by_the_wrapper(one_process: None) -> None:
    student = policy()
    wrapper = torch.nn.parallel.DistributedDataParallel(student.model)
    student.forward_module = wrapper
    reduced: list[int] = []

    def hook(_, bucket):  # DDP checks annotations, and accepts only its own type
        reduced.append(bucket.buffer().numel())
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapper.register_comm_hook(None, hook)
    got = gradients(student)
    assert sum(reduced) == sum(p.numel() for p in student.model.parameters())
    assert_same_gradients(got, gradients(policy("plain")))
    assert "forward" not in vars(student.model)  # put back
    gradients(student)
    assert sum(reduced) == 2 * sum(p.numel() for p in student.model.parameters())


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="'prefix' or 'plain'"):
        policy("fast")
