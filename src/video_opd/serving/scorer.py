"""Answers requests with one frozen model: clips are looked at again, and prompts must show exactly these."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from video_opd.config import PromptConfig, Quantization, VideoConfig
from video_opd.config.sections import EngineName
from video_opd.config.settings import read_settings
from video_opd.data.budget import CELL_PX
from video_opd.data.clip_cache import ClipCache
from video_opd.data.encode import TIMESTAMP, PromptEncoder
from video_opd.data.video import VideoError, clip_digest, load_clip
from video_opd.errors import UserError, need
from video_opd.models.interfaces import Responses
from video_opd.models.policy import HFPolicy
from video_opd.models.prompt_batch import scattered
from video_opd.models.sampling import SamplingSettings
from video_opd.models.vllm_policy import VLLMPolicy
from video_opd.models.vocabulary import Vocabulary
from video_opd.serving.limits import BAD, CONFLICT, FORBIDDEN, MISSING, TOO_LARGE, Limits, Refused
from video_opd.serving.messages import (
    ClipMessage,
    Computation,
    PromptMessage,
    SampleReply,
    SampleRequest,
    ScoreReply,
    ScoreRequest,
    WritableTokens,
)
from video_opd.types import Clip, EncodedPrompt


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a run must know of the model that scores: its fingerprint, and how it computes."""

    fingerprint: str
    dtype: str = "float32"
    quantization: Quantization | None = None
    engine: EngineName = "hf"  # vllm gives no distributions over the vocabulary

    @property
    def computation(self) -> Computation:
        return Computation(dtype=self.dtype, quantization=self.quantization, engine=self.engine)


class Scorer:
    """Answers requests. :meth:`encode` may be called by several threads, :meth:`answer` by one.

    ``model`` is loaded; where ``make_policy`` runs it in another way, it is what its folder says of it.
    ``roots`` are the folders whose videos may be named.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        facts: ModelFacts,
        make_policy: Callable[[Vocabulary], HFPolicy | VLLMPolicy] | None = None,
        engine: Literal["prefix", "plain"] = "prefix",
        roots: Sequence[Path] = (),
        cache_dir: str | Path | None = None,
        cache_bytes: int = 20 << 30,
        limits: Limits | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.facts = facts
        self.roots = [root.resolve() for root in roots]
        self.limits = limits or Limits()
        self.own = Vocabulary.of(model, processor)
        self._cache = None if cache_dir is None else ClipCache(cache_dir, cache_bytes)
        # Only the pixels are taken from it. They do not depend on the text or on the form around a video.
        shown = PromptConfig(thinking=True, video_form="release")
        self._encoder = PromptEncoder(processor, shown, keep_clips=True)
        self._policies: dict[WritableTokens, HFPolicy | VLLMPolicy] = {}
        self._lock = threading.Lock()
        if make_policy is None:
            model.requires_grad_(False)
            model.eval()

            def make_policy(vocabulary: Vocabulary) -> HFPolicy:
                return HFPolicy(model, processor, engine, vocabulary=vocabulary)

        self._make_policy = make_policy

    def head(self) -> dict[str, np.ndarray]:
        """``lm_head``'s rows, for clients that ask for hidden states. Raises :class:`Refused` where it has
        another arithmetic than a product of matrices."""
        layer = getattr(self.model, "lm_head", None)
        if type(layer) is not torch.nn.Linear:
            raise Refused(BAD, "this model's lm_head cannot be sent; ask for whole distributions")
        return {"weight": _array(layer.weight)}

    def encode(self, request: ScoreRequest | SampleRequest) -> list[EncodedPrompt]:
        """The prompts of a request with their pixels. Raises :class:`Refused` for what cannot be answered."""
        if request.model != self.facts.fingerprint:
            raise Refused(
                CONFLICT,
                f"this server holds the model {self.facts.fingerprint}, not {request.model!r:.60}",
            )
        if request.computation != self.facts.computation:
            raise Refused(
                CONFLICT,
                f"this server computes in {self.facts.computation}, and the request expects "
                f"{request.computation!s:.120}; start it with the run's --dtype, --quantization and --engine",
            )
        self.limits.check(request)
        self._check_vocabulary(request.vocabulary)
        rows = self.model.config.text_config.vocab_size
        shown = [self._shown(number, clip) for number, clip in enumerate(request.clips)]
        prompts = []
        for prompt in request.prompts:
            ids = prompt.token_ids
            if int(ids.min()) < 0 or int(ids.max()) >= rows:
                raise Refused(BAD, f"{prompt.id!r:.60}: a prompt token is not from 0 to {rows - 1}")
            prompts.append(self._prompt(prompt, shown[prompt.clip]))
        policy = self._policy(request.vocabulary)
        if isinstance(request, SampleRequest):
            _check_sampling(request)
        for prompt in request.prompts:
            for response in prompt.responses:
                token = policy.vocabulary.first_unwritable(response.tolist())
                if token is not None:
                    raise Refused(BAD, f"{prompt.id!r:.60}: no response holds token {token}")
        return prompts

    def answer(
        self,
        requests: Sequence[ScoreRequest | SampleRequest],
        prompts: Sequence[Sequence[EncodedPrompt]],
    ) -> Sequence[ScoreReply | SampleReply]:
        """The replies to requests that share their ``settings``. ``prompts`` are theirs, all together."""
        asked = [prompt for group in prompts for prompt in group]
        if isinstance(requests[0], SampleRequest):
            return self._sample(cast("Sequence[SampleRequest]", requests), asked)
        return self._score(cast("Sequence[ScoreRequest]", requests), asked)

    def _score(self, requests: Sequence[ScoreRequest], prompts: Sequence[EncodedPrompt]) -> list[ScoreReply]:
        began = time.perf_counter()
        first, policy = requests[0], self._policy(requests[0].vocabulary)
        responses = [[r.tolist() for r in p.responses] for request in requests for p in request.prompts]
        wanted: dict[str, torch.Tensor] = {}
        if first.hidden or first.top_k:
            need(isinstance(policy, HFPolicy), "vLLM gives neither hidden states nor likeliest tokens")
            assert isinstance(policy, HFPolicy)
            wanted = _looked_into(policy, prompts, responses, first)
        else:
            scores = policy.logprobs(prompts, responses, full=first.full, temperature=first.temperature)
            wanted["logprobs"] = scores.logprobs_BT.float()
            if scores.full_BTV is not None:
                wanted["full"] = scores.full_BTV.float()
        seconds, replies, start = time.perf_counter() - began, [], 0
        for request in requests:
            lengths = request.response_lengths
            rows = slice(start, start + len(lengths))
            start += len(lengths)
            arrays = {name: _array(tensor[rows, : max(lengths)]) for name, tensor in wanted.items()}
            replies.append(ScoreReply(**arrays, seconds=seconds))
        return replies

    def _sample(
        self, requests: Sequence[SampleRequest], prompts: Sequence[EncodedPrompt]
    ) -> list[SampleReply]:
        began = time.perf_counter()
        first = requests[0]
        seeds = [p.seeds.tolist() for request in requests for p in request.prompts if p.seeds is not None]
        groups = self._policy(first.vocabulary).sample(
            prompts,
            n=first.n,
            max_new_tokens=first.max_new_tokens,
            temperature=first.temperature,
            top_p=first.top_p,
            top_k=first.top_k,
            seeds=seeds or None,
        )
        seconds, replies, left = time.perf_counter() - began, [], iter(groups)
        for request in requests:
            own = [rollout for _ in request.prompts for rollout in next(left)]
            replies.append(SampleReply(rollouts=tuple(own), seconds=seconds))
        return replies

    def _check_vocabulary(self, asked: WritableTokens) -> None:
        rows = self.model.config.text_config.vocab_size
        if not 0 < asked.size <= rows:
            raise Refused(
                CONFLICT, f"the student has {asked.size} tokens, and this model {rows} embedding rows"
            )

    def _policy(self, asked: WritableTokens) -> HFPolicy | VLLMPolicy:
        with self._lock:
            if asked not in self._policies:
                if len(self._policies) >= 16:  # of a client that makes them up
                    self._policies.clear()
                vocabulary = Vocabulary(
                    size=asked.size,
                    forbidden_ids=asked.forbidden_ids,
                    eos_ids=self.own.eos_ids,
                    pad_id=min(self.own.eos_ids),
                )
                self._policies[asked] = self._make_policy(vocabulary)
            return self._policies[asked]

    def _shown(self, number: int, message: ClipMessage) -> EncodedPrompt:
        """A prompt about the clip, of which its pixels and times are used."""
        clip = (
            self._by_value(number, message) if message.path is None else self._by_reference(number, message)
        )
        if clip.digest != message.digest:
            raise Refused(
                CONFLICT,
                f"clip {number} has other frames or times here ({clip.digest}; sent: {message.digest!r:.60})",
            )
        return self._encoder.encode(clip, "?", "?")

    def _by_value(self, number: int, message: ClipMessage) -> Clip:
        frames, times_s = message.frames, message.times_s
        assert frames is not None and times_s is not None
        height, width = frames.shape[1:3]
        if height % CELL_PX or width % CELL_PX or not height or not width:
            raise Refused(
                BAD, f"clip {number} has frames of {height} × {width} px; sides are multiples of {CELL_PX}"
            )
        return Clip(
            path=Path(f"clip {number}"),
            frames=frames,
            times_s=times_s,
            frame_indices=np.arange(len(frames)),
            source_fps=0.0,
            duration_s=message.duration_s,
            source_size_px=(height, width),
            digest=clip_digest(frames, times_s),
        )

    def _by_reference(self, number: int, message: ClipMessage) -> Clip:
        try:
            budget = read_settings(VideoConfig, dict(message.budget or {}))
        except UserError as error:
            raise Refused(BAD, f"clip {number}: its budget: {error}") from error
        if budget.max_video_tokens > self.limits.prompt_tokens:
            raise Refused(TOO_LARGE, f"clip {number}: max_video_tokens is above {self.limits.prompt_tokens}")
        path = self._allowed(number, str(message.path))
        try:
            if self._cache is not None:
                return self._cache.load(path, budget, budget.backend)
            return load_clip(path, budget, budget.backend)
        except VideoError as error:
            raise Refused(CONFLICT, f"clip {number}: {error.reason}") from error
        except UserError as error:
            raise Refused(BAD, f"clip {number}: {error}") from error

    def _allowed(self, number: int, name: str) -> Path:
        """The file ``name``, with links followed, if it lies in one of the roots."""
        if not self.roots:
            raise Refused(FORBIDDEN, "this server reads no files (--root); send clips by value")
        try:
            path = Path(name).resolve()
            inside = any(path.is_relative_to(root) for root in self.roots)
            if inside and path.is_file():
                return path
        except (OSError, ValueError, RuntimeError):
            inside = False
        if inside:
            raise Refused(MISSING, f"clip {number}: there is no such file here")
        raise Refused(FORBIDDEN, f"clip {number}: its file is outside of the folders that this server reads")

    def _prompt(self, message: PromptMessage, shown: EncodedPrompt) -> EncodedPrompt:
        """Raises :class:`Refused` unless the tokens are a prompt about this clip: as many placeholders for
        each pair of frames as it has tokens, and the pairs' times before them."""
        ids = torch.from_numpy(message.token_ids.astype(np.int64))
        places = ids == self.processor.video_token_id
        grid = shown.tensors["video_grid_thw"][0]
        a_pair = int(grid[1] * grid[2]) // self.processor.video_processor.merge_size**2
        runs = _runs(places)
        if runs != [a_pair] * int(grid[0]):
            raise Refused(
                BAD,
                f"{message.id!r:.60}: the clip has {int(grid[0])} pairs of {a_pair} tokens, and the prompt "
                f"has {len(runs)} runs of {sorted(set(runs))[:4]} placeholders",
            )
        written = TIMESTAMP.findall(self.processor.tokenizer.decode(ids[~places].tolist()))
        expected = [f"{time_s:.1f}" for time_s in shown.pair_times_s]
        if written[: len(expected)] != expected:
            raise Refused(
                BAD, f"{message.id!r:.60}: the times in the prompt are not those of the clip's frames"
            )
        types = torch.where(places, 2, 0)[None]
        return replace(
            shown,
            sample_id=message.id,
            input_ids=ids[None],
            tensors={**shown.tensors, "mm_token_type_ids": types},
            text="",
        )


def _looked_into(
    policy: HFPolicy, prompts: Sequence[EncodedPrompt], responses: Responses, wanted: ScoreRequest
) -> dict[str, torch.Tensor]:
    """The arrays of a reply, from the hidden states, which the log-probs are made of as ever."""
    hidden_BRD, mask_BR = policy.hidden_states(prompts, responses)
    tokens = [torch.tensor(response) for group in responses for response in group]
    ids_N = torch.cat(tokens).to(hidden_BRD.device)
    with torch.no_grad():
        hidden_ND = hidden_BRD[mask_BR]
        logprobs_N, full_NV = policy.head.score(
            hidden_ND, ids_N, temperature=wanted.temperature, full=wanted.full
        )

    found = {"logprobs": scattered(logprobs_N.float(), mask_BR)}
    if full_NV is not None:
        found["full"] = scattered(full_NV.float(), mask_BR)
    if wanted.top_k:
        with torch.no_grad():
            ids_NK, values_NK = policy.head.likeliest(hidden_ND, wanted.top_k, temperature=wanted.temperature)
        found |= {
            "top_ids": scattered(ids_NK.int(), mask_BR),
            "top_logprobs": scattered(values_NK.float(), mask_BR),
        }
    if wanted.hidden:
        found["hidden"] = hidden_BRD
    return found


def _array(tensor: torch.Tensor) -> np.ndarray:
    """numpy has no bfloat16: its bits, as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _check_sampling(request: SampleRequest) -> None:
    try:
        SamplingSettings(temperature=request.temperature, top_p=request.top_p, top_k=request.top_k)
    except ValueError as error:
        raise Refused(BAD, str(error)) from error
    if request.n < 1 or request.max_new_tokens < 1:
        raise Refused(BAD, f"n is {request.n}, max_new_tokens {request.max_new_tokens}; both are at least 1")
    for prompt in request.prompts:
        if prompt.seeds is not None and int(prompt.seeds.min()) < 0:
            raise Refused(BAD, f"{prompt.id!r:.60}: a seed is below 0")


def _runs(places: torch.Tensor) -> list[int]:
    """The lengths of the runs of True."""
    edges = torch.diff(torch.cat([torch.zeros(1), places.float(), torch.zeros(1)]))
    return ((edges < 0).nonzero() - (edges > 0).nonzero()).flatten().tolist()
