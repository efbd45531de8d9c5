"""A teacher in other processes: :class:`RemoteTeacher` asks one or several servers."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from video_opd.config import VideoConfig
from video_opd.models.head import ResponseHead
from video_opd.models.interfaces import Responses
from video_opd.models.prefix import Unprefilled, prompts_of
from video_opd.models.prompt_batch import scattered
from video_opd.models.sampling import seeds_of_rollouts
from video_opd.models.teachers import Nonfinite, finite_scores, join_logprobs
from video_opd.models.vocabulary import Vocabulary
from video_opd.serving.limits import reply_bytes, token_bytes
from video_opd.serving.messages import (
    DEFLATE,
    SAMPLE,
    SCORE,
    ClipMessage,
    PromptMessage,
    SampleReply,
    SampleRequest,
    ScoreReply,
    ScoreRequest,
    WritableTokens,
    pack_request,
    unpack_sample_reply,
    unpack_score_reply,
)
from video_opd.serving.servers import Described, Servers
from video_opd.types import EncodedPrompt, Rollout, TokenLogprobs

T = TypeVar("T")
BYTES_A_REQUEST = 256 << 20  # of frames
PROBE = 256 << 10  # bytes of a body that are compressed to find out whether that pays
Send = Literal["value", "reference"]
REQUESTS_A_SERVER = 2  # in flight at a time: the next one is there when a server has answered one


class RemoteTeacher:
    """A :class:`~video_opd.models.interfaces.DistantTeacher`, and a
    :class:`~video_opd.models.interfaces.Policy` without gradients, in other processes.

    Prompts must carry their clips (``PromptEncoder(keep_clips=True)``). They are divided among the servers,
    one request each, and more where a request or its reply would be too large; the result has the order of
    ``prompts``. ``served`` is what all servers said of themselves; one that is started again as another
    teacher refuses. ``send`` says whether the servers get frames, or read the video files themselves with the
    budget ``video``; a server that sees other frames refuses.

    ``nonfinite`` decides about scores that are not finite, as in
    :class:`~video_opd.models.teachers.LocalTeacher`. With ``head``, the model's ``lm_head``, servers send
    hidden states in place of whole distributions, and these are made here. What waits for servers raises
    :class:`~video_opd.serving.servers.TeacherAway` if none answers in time, and
    :class:`~video_opd.serving.servers.TeacherSlow` if the model needs longer than they allow.
    """

    def __init__(
        self,
        servers: Servers,
        vocabulary: Vocabulary,
        served: Described,
        *,
        send: Send = "value",
        video: VideoConfig | None = None,
        nonfinite: Nonfinite = "raise",
        device: torch.device | None = None,
        head: torch.nn.Linear | None = None,
    ) -> None:
        assert send == "value" or video is not None, "a reference needs the video budget"
        self.servers, self.served, self.send, self.video = servers, served, send, video
        self.vocabulary = WritableTokens.of(vocabulary.size, vocabulary.forbidden_ids)
        self.nonfinite = nonfinite
        self.head = None if head is None else ResponseHead(head, vocabulary)
        self.device = device or torch.device("cpu")
        # The bodies of requests hold frames; those that are not sent yet are not made.
        self._turn = threading.BoundedSemaphore(REQUESTS_A_SERVER * len(servers.servers))

    def prefill(self, prompts: Sequence[EncodedPrompt], *, grad: bool = False) -> Unprefilled:
        assert not grad, "no gradient comes from a server"
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
        """As :meth:`Policy.sample`."""
        asked = prompts_of(prompts)
        drawn = None if temperature == 0 else seeds_of_rollouts(seeds, len(asked), n)

        def sampled(piece: slice) -> SampleReply:
            own = asked[piece]
            extras: list[dict[str, Any]] = [{} for _ in own]
            if drawn is not None:
                extras = [{"seeds": np.array(row, np.int64)} for row in drawn[piece]]
            clips, messages = self._messages(own, extras)
            request = SampleRequest(
                model=self.served.model,
                computation=self.served.computation,
                vocabulary=self.vocabulary,
                clips=clips,
                prompts=messages,
                n=n,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
            )
            return self._answer(SAMPLE, request, lambda body: unpack_sample_reply(body, request))

        replies = [wait() for wait in self._divide(asked, sampled)]
        rollouts = [rollout for reply in replies for rollout in reply.rollouts]
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
        """As :meth:`Teacher.logprobs`."""
        assert not grad, "no gradient comes from a server"
        return self.ask(prompts, responses, full=full, temperature=temperature)()

    def ask(
        self,
        prompts: Sequence[EncodedPrompt] | Unprefilled,
        responses: Responses,
        *,
        full: bool = False,
        temperature: float = 1.0,
    ) -> Callable[[], TokenLogprobs]:
        """As :meth:`DistantTeacher.ask`."""
        asked = prompts_of(prompts)
        assert len(asked) == len(responses) and all(responses), "one or several responses for each prompt"
        wanted = {"full": full and self.head is None, "hidden": full and self.head is not None}
        a_token = token_bytes(self.vocabulary.size, **wanted)

        def fits(groups: Responses) -> bool:
            lengths = [len(response) for group in groups for response in group]
            return reply_bytes(lengths, a_token) <= self.served.reply_bytes

        parts = _in_parts(asked, responses, fits)

        def scored(piece: slice) -> tuple[ScoreReply, ScoreRequest]:
            extras = [
                {"responses": tuple(np.array(response, np.int32) for response in group)}
                for _, group in parts[piece]
            ]
            clips, messages = self._messages([prompt for prompt, _ in parts[piece]], extras)
            request = ScoreRequest(
                model=self.served.model,
                computation=self.served.computation,
                vocabulary=self.vocabulary,
                clips=clips,
                prompts=messages,
                **wanted,
                temperature=temperature,
            )
            reply = self._answer(SCORE, request, lambda body: unpack_score_reply(body, request))
            return reply, request

        shown = [prompt for prompt, _ in parts]
        waits = self._divide(shown, scored, lambda piece: fits([group for _, group in parts[piece]]))

        def scores() -> TokenLogprobs:
            whole = join_logprobs([self._scores(*wait()) for wait in waits])
            return finite_scores(whole, asked, responses, self.nonfinite)

        return scores

    def _scores(self, reply: ScoreReply, request: ScoreRequest) -> TokenLogprobs:
        lengths = torch.tensor(request.response_lengths)
        mask_BT = torch.arange(int(lengths.max())) < lengths[:, None]
        full_BTV = None if reply.full is None else torch.from_numpy(reply.full)
        if reply.hidden is not None:
            full_BTV = self._distributions(bfloat16_or_float32(reply.hidden), mask_BT, request)
        return TokenLogprobs(
            logprobs_BT=torch.from_numpy(reply.logprobs), mask_BT=mask_BT, full_BTV=full_BTV
        ).to(self.device)

    def _distributions(
        self, hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, request: ScoreRequest
    ) -> torch.Tensor:
        assert self.head is not None, "hidden states are asked for where there is a head"
        mask_BT = mask_BT.to(self.device)
        ids = [torch.from_numpy(response).long() for p in request.prompts for response in p.responses]
        with torch.no_grad():
            _, full_NV = self.head.score(
                hidden_BTD.to(self.device)[mask_BT],
                torch.cat(ids).to(self.device),
                temperature=request.temperature,
                full=True,
            )
        assert full_NV is not None
        return scattered(full_NV, mask_BT)

    def _divide(
        self,
        prompts: Sequence[EncodedPrompt],
        work: Callable[[slice], T],
        reply_fits: Callable[[slice], bool] = lambda piece: True,
    ) -> list[Callable[[], T]]:
        """Begins ``work`` on the prompts in pieces of nearly equal size, as many as there are servers, and
        more where a request or its reply would be too large. Returns what waits for each piece's result."""
        size = -(-len(prompts) // len(self.servers.servers))
        # Half of a body: token ids and digests come to the frames.
        most = min(BYTES_A_REQUEST, self.served.body_bytes // 2)

        def fits(piece: slice) -> bool:
            small = piece.stop - piece.start <= size and self._frame_bytes(prompts[piece]) <= most
            return small and reply_fits(piece)

        return [_in_background(work, piece) for piece in _cut(len(prompts), fits)]

    def _frame_bytes(self, prompts: Sequence[EncodedPrompt]) -> int:
        """Bytes of the prompts' frames as they are sent, each clip once."""
        if self.send == "reference":
            return 0
        clips = {prompt.clip_digest: prompt.clip for prompt in prompts}
        return sum(clip.frames.nbytes for clip in clips.values() if clip is not None)

    def _answer(self, path: str, request: ScoreRequest | SampleRequest, read: Callable[[bytes], T]) -> T:
        with self._turn:
            body, encoding = compressed(pack_request(request))
            return self.servers.ask("POST", path, body, read, encoding)

    def _messages(
        self, prompts: Sequence[EncodedPrompt], extras: Sequence[dict[str, Any]]
    ) -> tuple[tuple[ClipMessage, ...], tuple[PromptMessage, ...]]:
        """(their clips, each once; the prompts), as they are sent. ``extras`` belong to the prompts."""
        numbers: dict[str, int] = {}
        clips: list[ClipMessage] = []
        messages = []
        for prompt, extra in zip(prompts, extras, strict=True):
            if prompt.clip_digest not in numbers:
                numbers[prompt.clip_digest] = len(clips)
                clips.append(self._clip(prompt))
            messages.append(
                PromptMessage(
                    id=prompt.sample_id,
                    clip=numbers[prompt.clip_digest],
                    token_ids=prompt.input_ids[0].numpy(),
                    **extra,
                )
            )
        return tuple(clips), tuple(messages)

    def _clip(self, prompt: EncodedPrompt) -> ClipMessage:
        clip = prompt.clip
        assert clip is not None, "this prompt was encoded without its clip"
        if self.send == "reference":
            assert self.video is not None
            return ClipMessage(
                digest=clip.digest,
                duration_s=clip.duration_s,
                path=str(clip.path.resolve()),
                budget=self.video.model_dump(),
            )
        return ClipMessage(
            digest=clip.digest, duration_s=clip.duration_s, frames=clip.frames, times_s=clip.times_s
        )


def _cut(count: int, fits: Callable[[slice], bool]) -> list[slice]:
    """The numbers below ``count`` in pieces that are as long as ``fits`` allows, and at least 1."""
    pieces: list[slice] = []
    for number in range(count):
        if pieces and fits(slice(pieces[-1].start, number + 1)):
            pieces[-1] = slice(pieces[-1].start, number + 1)
        else:
            pieces.append(slice(number, number + 1))
    return pieces


def _in_parts(
    prompts: Sequence[EncodedPrompt], responses: Responses, fits: Callable[[Responses], bool]
) -> list[tuple[EncodedPrompt, Sequence[Sequence[int]]]]:
    """Each prompt with its responses; one whose responses do not fit a reply stands there several times, each
    time with some of them."""
    parts = []
    for prompt, group in zip(prompts, responses, strict=True):
        pieces = _cut(len(group), lambda piece, whole=group: fits([whole[piece]]))  # type: ignore[misc]
        parts += [(prompt, group[piece]) for piece in pieces]
    return parts


def compressed(body: bytes) -> tuple[bytes, str | None]:
    """The body as it is sent, and its encoding: compressed if that makes it half as long or shorter, which it
    does with drawings and not with films."""
    probe = body[len(body) // 2 :][:PROBE]
    if len(zlib.compress(probe, level=1)) > len(probe) / 2:
        return body, None
    return zlib.compress(body, level=1), DEFLATE


def bfloat16_or_float32(array: np.ndarray) -> torch.Tensor:
    """numpy has no bfloat16: its bits come as uint16."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def _in_background(work: Callable[[slice], T], piece: slice) -> Callable[[], T]:
    """Begins ``work(piece)`` in a thread that does not keep an interrupted process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(piece))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result
