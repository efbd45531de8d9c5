"""What a run and a scoring server say to each other: safetensors with JSON in its header, never pickle.

A request holds the token ids of prompts and responses, and for each clip either its frames (by value) or the
file and the video budget that they come from (by reference). A clip has the digest of its frames and times in
any case: a server that sees other frames refuses. A reply holds log-probabilities of the responses' tokens.

Shapes: ``T`` frames of ``H`` × ``W`` pixels, ``P`` prompt tokens, ``N`` responses, ``R`` tokens of the
longest response, ``V`` vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

PROTOCOL = 1
SCORE, MODEL, FILES, HEALTH, METRICS = "/v1/score", "/v1/model", "/v1/files", "/health", "/metrics"
BODY = "application/octet-stream"
_KEY = "video-opd"  # of the header's metadata, whose values are texts
_MOST_RANGES = 1 << 16


class BadMessage(ValueError):
    """A message that is not of this protocol. The text is one line for whoever sent it."""


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
    """A prompt, its clip's number and its responses, as token ids."""

    id: str
    clip: int
    token_ids: np.ndarray  # int32 [P]
    responses: tuple[np.ndarray, ...]  # int32 [R] each


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
class ScoreRequest:
    """Prompts and responses to score. ``model`` is the fingerprint of the teacher that is meant."""

    model: str
    vocabulary: WritableTokens
    clips: tuple[ClipMessage, ...]
    prompts: tuple[PromptMessage, ...]
    full: bool = False
    temperature: float = 1.0

    @property
    def response_lengths(self) -> list[int]:
        return [len(response) for prompt in self.prompts for response in prompt.responses]


@dataclass(frozen=True, kw_only=True)
class ScoreReply:
    """``logprobs`` [N, R] float32, 0 behind a response's end; ``full`` [N, R, V] where it was asked for."""

    logprobs: np.ndarray
    full: np.ndarray | None = None
    seconds: float = field(default=0.0, compare=False)  # that the server worked on it


def pack_request(request: ScoreRequest) -> bytes:
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
    prompts = []
    for n, prompt in enumerate(request.prompts):
        arrays[f"prompt-{n}"] = np.asarray(prompt.token_ids, dtype=np.int32)
        joined = [np.asarray(response, dtype=np.int32) for response in prompt.responses]
        arrays[f"responses-{n}"] = np.concatenate(joined)
        prompts.append({"id": prompt.id, "clip": prompt.clip, "lengths": [len(one) for one in joined]})
    head = {
        "protocol": PROTOCOL,
        "model": request.model,
        "vocabulary": {"size": request.vocabulary.size, "forbidden": request.vocabulary.forbidden},
        "full": request.full,
        "temperature": request.temperature,
        "clips": clips,
        "prompts": prompts,
    }
    return _pack(head, arrays)


def unpack_request(body: bytes) -> ScoreRequest:
    """Reads a request. Raises :class:`BadMessage` for anything else, whatever its bytes are."""
    head, arrays = _unpack(body)
    reader = _Reader(arrays)
    clips = tuple(reader.clip(n, entry) for n, entry in enumerate(_list(head, "clips")))
    prompts = tuple(reader.prompt(n, entry, len(clips)) for n, entry in enumerate(_list(head, "prompts")))
    if not prompts:
        raise BadMessage("there is no prompt in it")
    if arrays:
        raise BadMessage(f"an array that nothing names: {min(arrays)!r:.60}")
    vocabulary = _object(head, "vocabulary")
    temperature = _number(head, "temperature")
    if not temperature > 0:
        raise BadMessage(f"temperature is {temperature}; it must be above 0")
    return ScoreRequest(
        model=_text(head, "model"),
        vocabulary=WritableTokens(size=_whole(vocabulary, "size"), forbidden=_ranges(vocabulary)),
        clips=clips,
        prompts=prompts,
        full=_switch(head, "full"),
        temperature=temperature,
    )


def pack_reply(reply: ScoreReply) -> bytes:
    arrays = {"logprobs": np.ascontiguousarray(reply.logprobs, dtype=np.float32)}
    if reply.full is not None:
        arrays["full"] = np.ascontiguousarray(reply.full, dtype=np.float32)
    return _pack({"protocol": PROTOCOL, "seconds": reply.seconds}, arrays)


def unpack_reply(body: bytes, request: ScoreRequest) -> ScoreReply:
    """Reads the reply to ``request``. Raises :class:`BadMessage` if it is none, or one to something else."""
    head, arrays = _unpack(body)
    lengths = request.response_lengths
    shape = (len(lengths), max(lengths))
    logprobs = _array(arrays, "logprobs", np.float32, shape)
    full = _array(arrays, "full", np.float32, (*shape, request.vocabulary.size)) if request.full else None
    return ScoreReply(logprobs=logprobs, full=full, seconds=_number(head, "seconds"))


def _pack(head: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    return bytes(save(dict(arrays), metadata={_KEY: json.dumps(head)}))


def _unpack(body: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the header's JSON, the arrays)."""
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
    return head, arrays


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

    def clip(self, number: int, entry: Any) -> ClipMessage:
        entry = _mapping(entry, "a clip")
        digest, duration_s = _text(entry, "digest"), _number(entry, "duration_s")
        if "path" in entry:
            return ClipMessage(
                digest=digest,
                duration_s=duration_s,
                path=_text(entry, "path"),
                budget=_object(entry, "budget"),
            )
        frames = _array(self.arrays, f"clip-{number}-frames", np.uint8, (None, None, None, 3))
        times_s = _array(self.arrays, f"clip-{number}-times", np.float64, (len(frames),))
        if not len(frames) or not np.isfinite(times_s).all():
            raise BadMessage(f"clip {number} has no frames, or times that are not finite")
        return ClipMessage(digest=digest, duration_s=duration_s, frames=frames, times_s=times_s)

    def prompt(self, number: int, entry: Any, clips: int) -> PromptMessage:
        entry = _mapping(entry, "a prompt")
        clip, lengths = (
            _whole(entry, "clip"),
            [_whole({"length": n}, "length") for n in _list(entry, "lengths")],
        )
        if clip >= clips:
            raise BadMessage(f"prompt {number} is about clip {clip}, and there are {clips}")
        if not lengths or 0 in lengths:
            raise BadMessage(f"prompt {number} has no response, or an empty one")
        tokens = _array(self.arrays, f"prompt-{number}", np.int32, (None,))
        joined = _array(self.arrays, f"responses-{number}", np.int32, (sum(lengths),))
        if not len(tokens):
            raise BadMessage(f"prompt {number} has no tokens")
        responses = tuple(np.split(joined, np.cumsum(lengths)[:-1]))
        return PromptMessage(id=_text(entry, "id"), clip=clip, token_ids=tokens, responses=responses)


def _array(arrays: dict[str, np.ndarray], name: str, dtype: type, shape: Sequence[int | None]) -> np.ndarray:
    """Takes an array out of ``arrays``; None in ``shape`` is any length."""
    found = arrays.pop(name, None)
    if found is None:
        raise BadMessage(f"the array {name!r} is missing")
    fits = found.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
    if found.dtype != dtype or not fits:
        wanted = " × ".join("any" if n is None else str(n) for n in shape)
        raise BadMessage(
            f"{name!r} is {found.dtype} {list(found.shape)}, not {np.dtype(dtype)} of {wanted} numbers"
        )
    return found


def _ranges(vocabulary: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    size, found = _whole(vocabulary, "size"), _list(vocabulary, "forbidden")
    if len(found) > _MOST_RANGES:
        raise BadMessage("too many ranges of forbidden tokens")
    for entry in found:
        whole = isinstance(entry, list) and len(entry) == 2 and all(type(n) is int for n in entry)
        if not whole or not 0 <= entry[0] <= entry[1] < size:
            raise BadMessage(f"{entry!r:.60} is no range of token ids below {size}")
    return tuple((a, b) for a, b in found)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadMessage(f"{what} is {value!r:.40}, not an object")
    return value


def _get(tree: Mapping[str, Any], name: str, kind: type | tuple[type, ...], said: str) -> Any:
    value = tree.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadMessage(f"{name} is {value!r:.40}, not {said}")
    return value


def _object(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    return dict(_get(tree, name, dict, "an object"))


def _list(tree: Mapping[str, Any], name: str) -> list[Any]:
    return list(_get(tree, name, list, "a list"))


def _text(tree: Mapping[str, Any], name: str) -> str:
    return str(_get(tree, name, str, "a text"))


def _switch(tree: Mapping[str, Any], name: str) -> bool:
    return bool(_get(tree, name, bool, "true or false"))


def _whole(tree: Mapping[str, Any], name: str) -> int:
    value = int(_get(tree, name, int, "a whole number"))
    if not 0 <= value < 1 << 31:
        raise BadMessage(f"{name} is {value}; it must be from 0 to 2147483647")
    return value


def _number(tree: Mapping[str, Any], name: str) -> float:
    value = _get(tree, name, (int, float), "a number")
    if not abs(value) < 1e12:  # no NaN either
        raise BadMessage(f"{name} is {value}; it must be an ordinary number")
    return float(value)
