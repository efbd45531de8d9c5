"""Requests wait here for the one model, which works on those together that can be."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

from video_opd.serving.messages import SampleReply, SampleRequest, ScoreReply, ScoreRequest
from video_opd.serving.scorer import Scorer
from video_opd.types import EncodedPrompt

_STOP = None
Answer: TypeAlias = Future[ScoreReply | SampleReply]  # while it runs, the model is at work on it


@dataclass(frozen=True, eq=False)
class Waiting:
    """A request whose clips have been looked at, and the future of its reply."""

    request: ScoreRequest | SampleRequest
    prompts: Sequence[EncodedPrompt]
    reply: Answer = field(default_factory=Future)


class ScoringQueue:
    """One thread takes what waits, up to ``batch_size`` prompts at a time, and answers it.

    A request is never divided, and none waits for others to come. After an error the requests of a batch are
    answered one by one, so that a request gets no error that another one caused. :meth:`close` ends the
    thread when everything that waits has been answered.
    """

    def __init__(self, scorer: Scorer, batch_size: int = 8) -> None:
        self.scorer, self.batch_size = scorer, batch_size
        self._waiting: queue.Queue[Waiting | None] = queue.Queue()
        self._next: Waiting | None = None
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    def put(self, waiting: Waiting) -> Answer:
        self._waiting.put(waiting)
        return waiting.reply

    def __len__(self) -> int:
        return self._waiting.qsize()

    def close(self) -> None:
        self._waiting.put(_STOP)
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            asked = [one for one in batch if one.reply.set_running_or_notify_cancel()]
            if asked:
                self._answer(asked)

    def _answer(self, asked: Sequence[Waiting]) -> None:
        """Gives each request its reply, or the error that it raises by itself."""
        try:
            replies = self.scorer.answer([one.request for one in asked], [one.prompts for one in asked])
        except BaseException as error:  # the waiting requests are told, and the next batch is another
            if len(asked) == 1:
                asked[0].reply.set_exception(error)
                return
            for one in asked:  # the fault may be that of one of them, and others may be another client's
                self._answer([one])
            return
        for one, reply in zip(asked, replies, strict=True):
            one.reply.set_result(reply)

    def _take(self) -> list[Waiting] | None:
        """What is scored next; None at the end."""
        first = self._next or self._waiting.get()
        self._next = None
        if first is None:
            return None
        batch, count = [first], len(first.prompts)
        while count < self.batch_size:
            try:
                other = self._waiting.get_nowait()
            except queue.Empty:
                break
            if other is None:
                self._waiting.put(None)
                break
            if (
                first.request.settings != other.request.settings
                or count + len(other.prompts) > self.batch_size
            ):
                self._next = other
                break
            batch.append(other)
            count += len(other.prompts)
        return batch
