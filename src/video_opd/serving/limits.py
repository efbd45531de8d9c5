"""What a request may ask for, and how one is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from video_opd.serving.messages import SampleRequest, ScoreRequest

BAD, FORBIDDEN, MISSING, CONFLICT, TOO_LARGE = 400, 403, 404, 409, 413
BUSY, TIMED_OUT = 503, 504  # the same request may be answered later; the model was at work on it for too long


class Refused(Exception):
    """A request that is not answered: an HTTP status, and one line for the client."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


HIDDEN = 8192  # of the widest model, for a bound


def token_bytes(vocabulary: int, *, full: bool = False, top_k: int = 0, hidden: bool = False) -> int:
    """Bytes that a reply has at most for a token of a response, by what is wanted of it."""
    return 4 * (1 + vocabulary * full + 2 * top_k + HIDDEN * hidden)


def reply_bytes(lengths: Sequence[int], a_token: int) -> int:
    """Bytes of a reply about responses of these lengths, which are padded to the longest. ``a_token`` is
    :func:`token_bytes`."""
    return len(lengths) * max(lengths) * a_token


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 512 << 20
    held_bytes: int = 8 << 30  # of all requests that are not answered yet
    prompt_tokens: int = 131_072
    response_tokens: int = 32_768
    reply_bytes: int = 1 << 30
    rollouts: int = 1024  # of one request

    def check(self, request: ScoreRequest | SampleRequest) -> None:
        """Raises :class:`Refused` for a prompt, a response or a reply that is too large."""
        for prompt in request.prompts:
            if (length := len(prompt.token_ids)) > self.prompt_tokens:
                raise Refused(
                    TOO_LARGE, f"{prompt.id!r:.60}: {length} prompt tokens, above {self.prompt_tokens}"
                )
        if isinstance(request, SampleRequest):
            self._check_rollouts(len(request.prompts) * request.n)
            longest = request.max_new_tokens
        else:
            longest = max(request.response_lengths)
            self._check_reply(request)
        if longest > self.response_tokens:
            raise Refused(TOO_LARGE, f"a response of {longest} tokens, above {self.response_tokens}")

    def _check_rollouts(self, count: int) -> None:
        if count > self.rollouts:
            raise Refused(TOO_LARGE, f"{count} rollouts, above {self.rollouts}; ask for fewer at a time")

    def _check_reply(self, request: ScoreRequest) -> None:
        if request.top_k > request.vocabulary.size:
            raise Refused(BAD, f"top_k is {request.top_k}, of {request.vocabulary.size} tokens")
        a_token = token_bytes(
            request.vocabulary.size, full=request.full, top_k=request.top_k, hidden=request.hidden
        )
        size = reply_bytes(request.response_lengths, a_token)
        if size > self.reply_bytes:
            raise Refused(
                TOO_LARGE,
                f"a reply of {size >> 20} MiB, above {self.reply_bytes >> 20}; ask about fewer responses at "
                "a time, or for hidden states in place of distributions",
            )
