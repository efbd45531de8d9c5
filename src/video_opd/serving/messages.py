"""What a run and a scoring server say to each other: safetensors with JSON in its header, never pickle.

A request holds the token ids of prompts and responses, and for each clip either its frames (by value) or the
file and the video budget that they come from (by reference). A clip has the digest of its frames and times in
any case: a server that sees other frames refuses. A reply holds log-probabilities of the responses' tokens,
or rollouts.

Shapes: ``T`` frames of ``H`` × ``W`` pixels, ``P`` prompt tokens, ``N`` responses, ``R`` tokens of the
longest response, ``V`` vocabulary, ``K`` likeliest tokens, ``D`` hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from video_opd.serving.reading import (
    BadMessage,
    as_mapping,
    list_of,
    number_of,
    object_of,
    switch_of,
    take_array,
    text_of,
    whole_of,
)
from video_opd.types import Rollout

PROTOCOL = 2
SCORE, SAMPLE, MODEL, FILES, HEAD = "/v1/score", "/v1/sample", "/v1/model", "/v1/files", "/v1/head"
HEALTH, METRICS = "/health", "/metrics"
BODY = "application/octet-stream"
DEFLATE = "deflate"  # HTTP's name of zlib's format
_KEY = "video-opd"  # of the header's metadata, whose values are texts
_MOST_RANGES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ClipMessage:
    """A clip by value (``frames`` and ``times_s``), or by reference (``path`` and ``budget``)."""

    digest: str
    duration_s: float
    frames: np.ndarray | None = None  # uint8 [T, H, W, 3]
    times_s: np.ndarray | None = None  # float64 [T]
    path: str | None = None
    budget: Mapping[str, Any] | None = None  # the settings of ``video``, by their names


@dataclass(frozen=True, kw_only=True)
class PromptMessage:
    """A prompt and its clip's number, with the responses to score or the seeds to sample with."""

    id: str
    clip: int
    token_ids: np.ndarray  # int32 [P]
    responses: tuple[np.ndarray, ...] = ()  # int32 [R] each
    seeds: np.ndarray | None = None  # int64, one a rollout; None: greedy


@dataclass(frozen=True, kw_only=True)
class WritableTokens:
    """The student's vocabulary: ids below ``size``, but for the closed ``forbidden`` ranges."""

    size: int
    forbidden: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, size: int, forbidden_ids: frozenset[int]) -> WritableTokens:
        ranges: list[list[int]] = []
        for token in sorted(forbidden_ids):
            if ranges and ranges[-1][1] == token - 1:
                ranges[-1][1] = token
            else:
                ranges.append([token, token])
        return cls(size=size, forbidden=tuple((a, b) for a, b in ranges))

    @property
    def forbidden_ids(self) -> frozenset[int]:
        return frozenset(token for a, b in self.forbidden for token in range(a, b + 1))


@dataclass(frozen=True, kw_only=True)
class Computation:
    """How a server runs its model: servers that differ in it give different scores."""

    dtype: str
    quantization: str | None
    engine: str

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Computation:
        """The one that ``tree`` names. Raises :class:`BadMessage` if it names none."""
        quantization = None if tree.get("quantization") is None else text_of(tree, "quantization")
        return cls(dtype=text_of(tree, "dtype"), quantization=quantization, engine=text_of(tree, "engine"))

    def __str__(self) -> str:
        return f"{self.dtype} with quantization {self.quantization or 'none'} on engine {self.engine}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts about clips. ``model`` is the fingerprint of the teacher that is meant, and ``computation`` how
    that teacher computes; ``vocabulary`` is what the student can write."""

    model: str
    computation: Computation
    vocabulary: WritableTokens
    clips: tuple[ClipMessage, ...]
    prompts: tuple[PromptMessage, ...]

    @property
    def settings(self) -> tuple[Any, ...]:
        """Requests that share them can be worked on together."""
        return (type(self), self.vocabulary)


@dataclass(frozen=True, kw_only=True)
class ScoreRequest(Request):
    """The prompts' responses are scored: log-probs, and what else is wanted at each of their tokens."""

    full: bool = False  # log-probs over the vocabulary
    top_k: int = 0  # the likeliest tokens, this many; 0: none
    hidden: bool = False  # what lm_head is applied to
    temperature: float = 1.0

    @property
    def settings(self) -> tuple[Any, ...]:
        return (*super().settings, self.full, self.top_k, self.hidden, self.temperature)

    @property
    def response_lengths(self) -> list[int]:
        return [len(response) for prompt in self.prompts for response in prompt.responses]


@dataclass(frozen=True, kw_only=True)
class SampleRequest(Request):
    """``n`` rollouts of each prompt are sampled; ``temperature`` 0 is greedy."""

    n: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def settings(self) -> tuple[Any, ...]:
        own = (self.n, self.max_new_tokens, self.temperature, self.top_p, self.top_k)
        return (*super().settings, *own)


@dataclass(frozen=True, kw_only=True)
class ScoreReply:
    """``logprobs`` [N, R] float32, 0 behind a response's end; and what was asked for: ``full`` [N, R, V],
    ``top_ids`` and ``top_logprobs`` [N, R, K], the likeliest first, and ``hidden`` [N, R, D], in float32 or
    as the bits of bfloat16 (uint16)."""

    logprobs: np.ndarray
    full: np.ndarray | None = None
    top_ids: np.ndarray | None = None  # int32
    top_logprobs: np.ndarray | None = None  # float32
    hidden: np.ndarray | None = None
    seconds: float = field(default=0.0, compare=False)  # that the server worked on it


@dataclass(frozen=True, kw_only=True)
class SampleReply:
    """The rollouts of all prompts, prompt-major."""

    rollouts: tuple[Rollout, ...]
    seconds: float = field(default=0.0, compare=False)


def pack_request(request: ScoreRequest | SampleRequest) -> bytes:
    arrays: dict[str, np.ndarray] = {}
    clips: list[dict[str, Any]] = []
    for n, clip in enumerate(request.clips):
        entry: dict[str, Any] = {"digest": clip.digest, "duration_s": clip.duration_s}
        if clip.frames is not None and clip.times_s is not None:
            arrays[f"clip-{n}-frames"] = np.ascontiguousarray(clip.frames)
            arrays[f"clip-{n}-times"] = np.ascontiguousarray(clip.times_s, dtype=np.float64)
        else:
            entry |= {"path": clip.path, "budget": dict(clip.budget or {})}
        clips.append(entry)
    prompts: list[dict[str, Any]] = []
    for n, prompt in enumerate(request.prompts):
        entry = {"id": prompt.id, "clip": prompt.clip}
        arrays[f"prompt-{n}"] = np.asarray(prompt.token_ids, dtype=np.int32)
        if prompt.responses:
            joined = [np.asarray(response, dtype=np.int32) for response in prompt.responses]
            arrays[f"responses-{n}"] = np.concatenate(joined)
            entry["lengths"] = [len(one) for one in joined]
        if prompt.seeds is not None:
            arrays[f"seeds-{n}"] = np.asarray(prompt.seeds, dtype=np.int64)
        prompts.append(entry)
    head: dict[str, Any] = {
        "protocol": PROTOCOL,
        "model": request.model,
        **asdict(request.computation),
        "vocabulary": {"size": request.vocabulary.size, "forbidden": request.vocabulary.forbidden},
        "temperature": request.temperature,
        "clips": clips,
        "prompts": prompts,
    }
    if isinstance(request, ScoreRequest):
        head |= {"full": request.full, "top_k": request.top_k, "hidden": request.hidden}
    else:
        own = ("n", "max_new_tokens", "top_p", "top_k")
        head |= {name: getattr(request, name) for name in own}
    return _pack(head, arrays)


def unpack_score_request(body: bytes) -> ScoreRequest:
    """Reads a request. Raises :class:`BadMessage` for anything else, whatever its bytes are."""
    head, reader = _open(body)
    shared = reader.request(head, reader.responses)
    temperature = number_of(head, "temperature")
    if not temperature > 0:
        raise BadMessage(f"temperature is {temperature}; it must be above 0")
    wanted = {"full": False, "top_k": 0, "hidden": False} | head
    return ScoreRequest(
        **shared,
        full=switch_of(wanted, "full"),
        top_k=whole_of(wanted, "top_k"),
        hidden=switch_of(wanted, "hidden"),
        temperature=temperature,
    )


def unpack_sample_request(body: bytes) -> SampleRequest:
    """As :func:`unpack_score_request`. Whether the numbers can be sampled with, the sampler says."""
    head, reader = _open(body)
    n, temperature = whole_of(head, "n"), number_of(head, "temperature")
    seeds = None if temperature == 0 else n
    shared = reader.request(head, lambda number, _: reader.seeds(number, seeds))
    return SampleRequest(
        **shared,
        n=n,
        max_new_tokens=whole_of(head, "max_new_tokens"),
        temperature=temperature,
        top_p=number_of(head, "top_p"),
        top_k=whole_of(head, "top_k"),
    )


def pack_score_reply(reply: ScoreReply) -> bytes:
    arrays = {"logprobs": np.ascontiguousarray(reply.logprobs, dtype=np.float32)}
    if reply.full is not None:
        arrays["full"] = np.ascontiguousarray(reply.full, dtype=np.float32)
    if reply.top_ids is not None and reply.top_logprobs is not None:
        arrays["top_ids"] = np.ascontiguousarray(reply.top_ids, dtype=np.int32)
        arrays["top_logprobs"] = np.ascontiguousarray(reply.top_logprobs, dtype=np.float32)
    if reply.hidden is not None:
        arrays["hidden"] = np.ascontiguousarray(reply.hidden)
    return _pack({"protocol": PROTOCOL, "seconds": reply.seconds}, arrays)


def unpack_score_reply(body: bytes, request: ScoreRequest) -> ScoreReply:
    """Reads the reply to ``request``. Raises :class:`BadMessage` if it is none, or one to something else."""
    head, reader = _open(body)
    lengths = request.response_lengths
    shape = (len(lengths), max(lengths))
    logprobs = reader.take("logprobs", np.float32, shape)
    top = (*shape, request.top_k)
    return ScoreReply(
        logprobs=logprobs,
        full=reader.take("full", np.float32, (*shape, request.vocabulary.size)) if request.full else None,
        top_ids=reader.take("top_ids", np.int32, top) if request.top_k else None,
        top_logprobs=reader.take("top_logprobs", np.float32, top) if request.top_k else None,
        hidden=reader.hidden((*shape, None)) if request.hidden else None,
        seconds=number_of(head, "seconds"),
    )


def pack_sample_reply(reply: SampleReply) -> bytes:
    rollouts = reply.rollouts
    head = {
        "protocol": PROTOCOL,
        "seconds": reply.seconds,
        "lengths": [len(rollout.token_ids) for rollout in rollouts],
        "texts": [rollout.text for rollout in rollouts],
        "truncated": [rollout.truncated for rollout in rollouts],
    }
    tokens = [token for rollout in rollouts for token in rollout.token_ids]
    logprobs = [value for rollout in rollouts for value in rollout.recorded]
    return _pack(head, {"tokens": np.array(tokens, np.int32), "logprobs": np.array(logprobs, np.float64)})


def unpack_sample_reply(body: bytes, request: SampleRequest) -> SampleReply:
    """As :func:`unpack_score_reply`."""
    head, reader = _open(body)
    lengths, texts, truncated = (list_of(head, name) for name in ("lengths", "texts", "truncated"))
    count = len(request.prompts) * request.n
    if not len(lengths) == len(texts) == len(truncated) == count:
        raise BadMessage(f"{len(lengths)} rollouts, and {count} were asked for")
    if not all(type(n) is int and 0 < n <= request.max_new_tokens for n in lengths):
        raise BadMessage("a rollout is empty, or longer than was asked for")
    if not all(isinstance(text, str) for text in texts) or not all(
        isinstance(cut, bool) for cut in truncated
    ):
        raise BadMessage("a rollout without its text, or its end")
    tokens = reader.take("tokens", np.int32, (sum(lengths),)).tolist()
    logprobs = reader.take("logprobs", np.float64, (sum(lengths),)).tolist()
    rollouts, start = [], 0
    for length, text, cut in zip(lengths, texts, truncated, strict=True):
        part, start = slice(start, start + length), start + length
        rollouts.append(
            Rollout(token_ids=tuple(tokens[part]), logprobs=tuple(logprobs[part]), text=text, truncated=cut)
        )
    return SampleReply(rollouts=tuple(rollouts), seconds=number_of(head, "seconds"))


def _pack(head: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    return bytes(save(dict(arrays), metadata={_KEY: json.dumps(head)}))


def _open(body: bytes) -> tuple[dict[str, Any], _Reader]:
    """(the header's JSON, the reader of what it names)."""
    text = _metadata(body)
    try:
        arrays = load(body)
        head = json.loads(text)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise BadMessage(f"not safetensors with JSON in it ({reason:.120})") from error
    if not isinstance(head, dict):
        raise BadMessage("its header is no JSON object")
    if head.get("protocol") != PROTOCOL:
        raise BadMessage(f"protocol is {head.get('protocol')!r:.40}; this is version {PROTOCOL}")
    return head, _Reader(arrays)


def _metadata(body: bytes) -> str:
    """Our text in the header of a safetensors file, which the library's reader of bytes leaves out."""
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or not 2 <= length <= len(body) - 8:
        raise BadMessage("not safetensors: it is cut off, or its header is longer than itself")
    try:
        header = json.loads(body[8 : 8 + length])
        text = header["__metadata__"][_KEY]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadMessage(f"its header has no text {_KEY!r}") from error
    if not isinstance(text, str):
        raise BadMessage(f"{_KEY!r} in its header is no text")
    return text


class _Reader:
    """Takes the arrays that entries of the header name out of ``arrays``."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    def take(self, name: str, dtype: type, shape: Sequence[int | None]) -> np.ndarray:
        return take_array(self.arrays, name, dtype, shape)

    def hidden(self, shape: Sequence[int | None]) -> np.ndarray:
        found = self.arrays.get("hidden")
        reduced = found is not None and found.dtype == np.uint16
        return self.take("hidden", np.uint16 if reduced else np.float32, shape)

    def request(
        self, head: Mapping[str, Any], extra: Callable[[int, Mapping[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        """The fields of :class:`Request`. ``extra`` reads what else belongs to a prompt."""
        clips = tuple(self.clip(n, entry) for n, entry in enumerate(list_of(head, "clips")))
        prompts = tuple(
            self.prompt(n, as_mapping(entry, "a prompt"), len(clips), extra)
            for n, entry in enumerate(list_of(head, "prompts"))
        )
        if not prompts:
            raise BadMessage("there is no prompt in it")
        if self.arrays:
            raise BadMessage(f"an array that nothing names: {min(self.arrays)!r:.60}")
        vocabulary = object_of(head, "vocabulary")
        writable = WritableTokens(size=whole_of(vocabulary, "size"), forbidden=_ranges(vocabulary))
        return {
            "model": text_of(head, "model"),
            "computation": Computation.of(head),
            "vocabulary": writable,
            "clips": clips,
            "prompts": prompts,
        }

    def clip(self, number: int, entry: Any) -> ClipMessage:
        entry = as_mapping(entry, "a clip")
        digest, duration_s = text_of(entry, "digest"), number_of(entry, "duration_s")
        if "path" in entry:
            return ClipMessage(
                digest=digest,
                duration_s=duration_s,
                path=text_of(entry, "path"),
                budget=object_of(entry, "budget"),
            )
        frames = self.take(f"clip-{number}-frames", np.uint8, (None, None, None, 3))
        times_s = self.take(f"clip-{number}-times", np.float64, (len(frames),))
        if not len(frames) or not np.isfinite(times_s).all():
            raise BadMessage(f"clip {number} has no frames, or times that are not finite")
        return ClipMessage(digest=digest, duration_s=duration_s, frames=frames, times_s=times_s)

    def prompt(
        self,
        number: int,
        entry: Mapping[str, Any],
        clips: int,
        extra: Callable[[int, Mapping[str, Any]], dict[str, Any]],
    ) -> PromptMessage:
        clip = whole_of(entry, "clip")
        if clip >= clips:
            raise BadMessage(f"prompt {number} is about clip {clip}, and there are {clips}")
        tokens = self.take(f"prompt-{number}", np.int32, (None,))
        if not len(tokens):
            raise BadMessage(f"prompt {number} has no tokens")
        return PromptMessage(id=text_of(entry, "id"), clip=clip, token_ids=tokens, **extra(number, entry))

    def responses(self, number: int, entry: Mapping[str, Any]) -> dict[str, Any]:
        lengths = [whole_of({"length": n}, "length") for n in list_of(entry, "lengths")]
        if not lengths or 0 in lengths:
            raise BadMessage(f"prompt {number} has no response, or an empty one")
        joined = self.take(f"responses-{number}", np.int32, (sum(lengths),))
        return {"responses": tuple(np.split(joined, np.cumsum(lengths)[:-1]))}

    def seeds(self, number: int, count: int | None) -> dict[str, Any]:
        return {"seeds": None if count is None else self.take(f"seeds-{number}", np.int64, (count,))}


def _ranges(vocabulary: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    size, found = whole_of(vocabulary, "size"), list_of(vocabulary, "forbidden")
    if len(found) > _MOST_RANGES:
        raise BadMessage("too many ranges of forbidden tokens")
    for entry in found:
        whole = isinstance(entry, list) and len(entry) == 2 and all(type(n) is int for n in entry)
        if not whole or not 0 <= entry[0] <= entry[1] < size:
            raise BadMessage(f"{entry!r:.60} is no range of token ids below {size}")
    return tuple((a, b) for a, b in found)
