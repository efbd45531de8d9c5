"""A policy that vLLM runs: our clips, times and token ids as they are; no gradients, no whole distributions.

vLLM expands a video's placeholder and writes the times by itself. It is handed each prompt with its video
folded into one placeholder again, the frames, and the times as they stand in the prompt; every answer must
come back with our own token ids, else it is refused.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from video_opd.config import VLLMConfig
from video_opd.errors import Unavailable, UserError, need
from video_opd.models.interfaces import Responses
from video_opd.models.prefix import Unprefilled, prompts_of
from video_opd.models.sampling import SamplingSettings, seeds_of_rollouts
from video_opd.models.vllm_worker import EXTENSION
from video_opd.models.vocabulary import FORBIDDEN_LOGIT, Vocabulary
from video_opd.progress import log
from video_opd.types import EncodedPrompt, Rollout, TokenLogprobs

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor
    from vllm import LLM

    from video_opd.models.policy import HFPolicy

CHECKED_TOKENS = 16  # of the response on which vLLM is compared
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}  # nats; bfloat16 rounds differently in every kernel
MISSING = (
    'vLLM is not installed: pip install "video-opd[vllm]", in an environment of its own if it asks for other '
    "versions than the one you train in"
)


@dataclass(kw_only=True)
class _Running:
    """The engine, once it is started, and the tokens that its model can write now."""

    engine: LLM | None = None
    vocabulary: Vocabulary | None = None


class VLLMPolicy:
    """A :class:`~video_opd.models.interfaces.Policy` without gradients, on vLLM.

    ``path`` is a model folder. Prompts must carry their clips (``PromptEncoder(keep_clips=True)``). The
    engine is started by the first prompt. Before that, with ``settings.check``, ``reference`` loads the same
    model on this package's own engine, which answers that prompt and is freed again; vLLM must score the
    answer alike. Raises :class:`UserError` if it does not, and if vLLM is not installed; an engine that dies
    raises :class:`Unavailable`, and the next prompt starts another.
    """

    def __init__(
        self,
        path: str,
        processor: Qwen3VLProcessor,
        vocabulary: Vocabulary,
        *,
        dtype: str,
        settings: VLLMConfig | None = None,
        reference: Callable[[Vocabulary], HFPolicy] | None = None,
    ) -> None:
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise UserError(MISSING) from error
        self.path, self.processor, self.vocabulary, self.dtype = path, processor, vocabulary, dtype
        self.settings, self.reference = settings or VLLMConfig(), reference
        self._running = _Running()

    def with_vocabulary(self, vocabulary: Vocabulary) -> VLLMPolicy:
        """The same engine for a student that writes other tokens."""
        policy = copy.copy(self)
        policy.vocabulary = vocabulary
        return policy

    def prefill(self, prompts: Sequence[EncodedPrompt], *, grad: bool = False) -> Unprefilled:
        assert not grad, "vLLM has no gradients"
        return Unprefilled(prompts)

    def sample(
        self,
        prompts: Sequence[EncodedPrompt] | Unprefilled,
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seeds: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Rollout]]:
        """As :meth:`Policy.sample`. A prompt is prefilled once: its prefix is cached.

        The draws are vLLM's own: from equal seeds it samples other responses than this package's engine, from
        the same distribution.
        """
        from vllm import SamplingParams

        settings = SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k)
        asked = prompts_of(prompts)
        if n < 1 or max_new_tokens < 1:
            raise ValueError(f"n is {n}, max_new_tokens is {max_new_tokens}; both must be at least 1")
        rows: Sequence[Sequence[int | None]] = [[None] * n] * len(asked)
        if not settings.greedy:
            rows = seeds_of_rollouts(seeds, len(asked), n)
        if not asked:
            return []
        engine = self._started(asked[0])
        self._check_lengths(engine, [(prompt, prompt.length + max_new_tokens) for prompt in asked])

        def how(seed: int | None) -> SamplingParams:
            return SamplingParams(
                max_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                logprobs=0,
                ignore_eos=True,  # it would be the model folder's; ours are all that end a response
                stop_token_ids=sorted(self.vocabulary.eos_ids),
                detokenize=False,
            )

        requests = [(prompt, how(seed)) for prompt, row in zip(asked, rows, strict=True) for seed in row]
        given = [self._request(prompt, ()) for prompt, _ in requests]
        answers = self._generate(engine, given, [way for _, way in requests])
        rollouts = []
        for (prompt, _), answer in zip(requests, answers, strict=True):
            check_ids(prompt, (), self.processor, answer.prompt_token_ids)
            (output,) = answer.outputs
            ids = tuple(output.token_ids)
            logprobs = [found[token].logprob for token, found in zip(ids, output.logprobs, strict=True)]
            rollouts.append(
                Rollout(
                    token_ids=ids,
                    logprobs=tuple(logprobs),
                    text=self.processor.tokenizer.decode(ids, skip_special_tokens=True),
                    truncated=ids[-1] not in self.vocabulary.eos_ids,
                )
            )
        return [rollouts[i * n : (i + 1) * n] for i in range(len(asked))]

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt] | Unprefilled,
        responses: Responses,
        *,
        grad: bool = False,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """As :meth:`Policy.logprobs`, at temperature 1, without distributions."""
        assert not grad, "vLLM has no gradients"
        need(
            not full,
            "vLLM gives no whole distributions: leave out --engine vllm, or what needs them "
            "(loss.estimator sampled, run.analytic_kl false)",
        )
        need(temperature == 1.0, f"vLLM scores at temperature 1, not {temperature:g}")
        asked = prompts_of(prompts)
        assert len(asked) == len(responses) and all(responses), "one or several responses for each prompt"
        return self._logprobs(self._started(asked[0]), asked, responses)

    def _logprobs(self, engine: LLM, prompts: Sequence[EncodedPrompt], responses: Responses) -> TokenLogprobs:
        from vllm import SamplingParams

        pairs = [
            (prompt, tuple(response))
            for prompt, group in zip(prompts, responses, strict=True)
            for response in group
        ]
        self._check_lengths(engine, [(prompt, prompt.length + len(r) + 1) for prompt, r in pairs])
        way = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        given = [self._request(prompt, response) for prompt, response in pairs]
        answers = self._generate(engine, given, [way] * len(pairs))
        lengths = [len(response) for _, response in pairs]
        logprobs_BT = torch.zeros(len(pairs), max(lengths))
        for row, ((prompt, response), answer) in enumerate(zip(pairs, answers, strict=True)):
            check_ids(prompt, response, self.processor, answer.prompt_token_ids)
            found = answer.prompt_logprobs[-len(response) :]
            values = [position[token].logprob for token, position in zip(response, found, strict=True)]
            logprobs_BT[row, : len(response)] = torch.tensor(values)
        mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return TokenLogprobs(logprobs_BT=logprobs_BT, mask_BT=mask_BT)

    def _check_lengths(self, engine: LLM, lengths: Sequence[tuple[EncodedPrompt, int]]) -> None:
        most = engine.llm_engine.model_config.max_model_len
        for prompt, length in lengths:
            need(
                length <= most,
                f"{prompt.sample_id}: {length} tokens of prompt and response, and vLLM was started for "
                f"{most} (vllm.max_tokens): raise that, or shorten the query or the response",
            )

    def _generate(self, engine: LLM, requests: Sequence[dict[str, Any]], ways: Sequence[Any]) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return engine.generate(list(requests), list(ways), use_tqdm=False)
        except EngineDeadError as error:
            self._running.engine = self._running.vocabulary = None
            raise Unavailable("vLLM's engine died; its own output says why") from error

    def load_weights(self, folder: str | Path) -> None:
        """Gives the engine, if it runs, the weights of a model folder. What it kept of prompts is dropped."""
        if (engine := self._running.engine) is not None:
            engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            engine.llm_engine.reset_encoder_cache()
            if not engine.reset_prefix_cache():
                raise RuntimeError("vLLM kept prompts of the weights before (reset_prefix_cache)")

    def close(self) -> None:
        """Ends the engine and frees its memory; another prompt would start another."""
        if self._running.engine is not None:
            self._running.engine.llm_engine.engine_core.shutdown()
            self._running.engine = self._running.vocabulary = None

    def _started(self, prompt: EncodedPrompt) -> LLM:
        """The engine; ``prompt`` is what it is checked on when it is started."""
        running = self._running
        if running.engine is None:
            expected = None
            if self.settings.check and self.reference is not None:
                expected = _answered(self.reference(self.vocabulary), prompt)
            running.engine = self._start()
            self._allow_tokens(running)
            try:
                if expected is not None:
                    self._compare(running.engine, prompt, expected)
            except BaseException:  # what was found wrong once is not used the next time
                self.close()
                raise
        elif running.vocabulary != self.vocabulary:
            self._allow_tokens(running)
        return running.engine

    def _allow_tokens(self, running: _Running) -> None:
        assert running.engine is not None
        given = (self.vocabulary.size, sorted(self.vocabulary.forbidden_ids), FORBIDDEN_LOGIT, os.getpid())
        running.engine.collective_rpc("allow_tokens", args=given)
        running.vocabulary = self.vocabulary

    def _start(self) -> LLM:
        from vllm import LLM

        settings, cuda = self.settings, torch.cuda.is_available()
        return LLM(
            self.path,
            dtype=self.dtype,
            generation_config="vllm",  # no sampling settings of the folder
            max_model_len=settings.max_tokens,
            gpu_memory_utilization=settings.memory,
            tensor_parallel_size=settings.gpus,
            enforce_eager=settings.eager or not cuda,
            enable_chunked_prefill=cuda,  # on a CPU a prompt in chunks cannot be sampled with a seed
            limit_mm_per_prompt={"image": 0, "video": 1},
            mm_processor_kwargs={"videos_kwargs": {"do_resize": False}},  # a clip has its size
            logprobs_mode="processed_logprobs",  # of the distribution that is sampled, filters included
            worker_extension_cls=EXTENSION,
        )

    def _request(self, prompt: EncodedPrompt, response: Sequence[int]) -> dict[str, Any]:
        clip = prompt.clip
        assert clip is not None, "this prompt was encoded without its clip"
        # A pair's time is the mean of its frames' times: with the time of the pair for both, it is just that.
        times_s = np.repeat(prompt.pair_times_s, 2)[: len(clip.frames)].tolist()
        metadata = {
            "fps": 1.0,
            "duration": clip.duration_s,
            "total_num_frames": len(clip.frames),
            "frames_indices": times_s,
            "video_backend": "video-opd",
            "do_sample_frames": False,
        }
        return {
            "prompt_token_ids": [*folded(prompt, self.processor), *response],
            "multi_modal_data": {"video": [(clip.frames, metadata)]},
            "multi_modal_uuids": {"video": [prompt.clip_digest]},
        }

    def _compare(self, engine: LLM, prompt: EncodedPrompt, expected: Rollout) -> None:
        """Raises :class:`UserError` unless vLLM scores our own engine's answer alike."""
        ids = expected.token_ids
        found = self._logprobs(engine, [prompt], [[ids]]).logprobs_BT[0].tolist()
        allowed = TOLERANCE[self.dtype]
        off = [abs(a - b) for a, b in zip(found, expected.recorded, strict=True)]
        place = max(range(len(ids)), key=off.__getitem__)
        if not off[place] <= allowed:
            raise UserError(
                f"{prompt.sample_id}: vLLM gives response token {place} "
                f"({self.processor.tokenizer.decode([ids[place]])!r}) the log-prob {found[place]:.4f}, and "
                f"this package's engine {expected.recorded[place]:.4f}; {allowed:g} is allowed: leave out "
                "--engine vllm, or see what differs (--vllm.check false runs it all the same)"
            )
        log(f"check: vLLM's log-probs on {prompt.sample_id} are off by at most {off[place]:.1e} nats")


def _answered(policy: HFPolicy, prompt: EncodedPrompt) -> Rollout:
    from video_opd.models.loading import release_memory

    ((rollout,),) = policy.sample([prompt], max_new_tokens=CHECKED_TOKENS, temperature=0.0)
    del policy
    release_memory()
    return rollout


def folded(prompt: EncodedPrompt, processor: Qwen3VLProcessor) -> list[int]:
    """The prompt's ids with one placeholder in place of its video and times, whatever stands around them."""
    ids = prompt.input_ids[0].tolist()
    tokenizer, pad = processor.tokenizer, processor.video_token_id
    begin, end = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    pairs = len(prompt.pair_times_s)
    written: list[int] = []
    for time_s in prompt.pair_times_s:
        written += tokenizer.encode(f"<{time_s:.1f} seconds>", add_special_tokens=False)
        written += [begin, *[pad] * (prompt.video_tokens // pairs), end]
    start = ids.index(pad) - written.index(pad)
    if start < 0 or ids[start : start + len(written)] != written:
        raise UserError(
            f"{prompt.sample_id}: its video is not written as the times and placeholders of its {pairs} "
            "pairs of frames, so vLLM cannot be given it"
        )
    return [*ids[:start], pad, *ids[start + len(written) :]]


def check_ids(
    prompt: EncodedPrompt, response: Sequence[int], processor: Qwen3VLProcessor, found: Sequence[int]
) -> None:
    """Raises :class:`UserError`, with the first place that differs, unless vLLM saw our own token ids."""
    ours = [*prompt.input_ids[0].tolist(), *response]
    if list(found) == ours:
        return
    both = zip(ours, found, strict=False)
    place = next((i for i, (a, b) in enumerate(both) if a != b), min(len(ours), len(found)))
    pad = processor.video_token_id

    def token(ids: Sequence[int]) -> str:
        return f"{ids[place]} ({processor.tokenizer.decode([ids[place]])!r})" if place < len(ids) else "none"

    raise UserError(
        f"{prompt.sample_id}: vLLM read another prompt: token {place} is {token(found)}, ours {token(ours)}; "
        f"{list(found).count(pad)} placeholders of the video, ours {ours.count(pad)}; this release of vLLM "
        "cannot run these prompts: leave out --engine vllm"
    )
