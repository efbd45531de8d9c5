"""What a request may ask for, and how one is refused."""

from __future__ import annotations

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
            self._check_reply(request, longest)
        if longest > self.response_tokens:
            raise Refused(TOO_LARGE, f"a response of {longest} tokens, above {self.response_tokens}")

    def _check_rollouts(self, count: int) -> None:
        if count > self.rollouts:
            raise Refused(TOO_LARGE, f"{count} rollouts, above {self.rollouts}; ask for fewer at a time")

    def _check_reply(self, request: ScoreRequest, longest: int) -> None:
        if request.top_k > request.vocabulary.size:
            raise Refused(BAD, f"top_k is {request.top_k}, of {request.vocabulary.size} tokens")
        width = 1 + request.vocabulary.size * request.full + 2 * request.top_k + HIDDEN * request.hidden
        numbers = 4 * len(request.response_lengths) * longest * width
        if numbers > self.reply_bytes:
            raise Refused(
                TOO_LARGE,
                f"a reply of {numbers >> 20} MiB, above {self.reply_bytes >> 20}; ask with fewer rows",
            )
