"""Requests that are worked on together are answered as if each of them were alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import serving_cases as cases

from video_opd.errors import UserError
from video_opd.serving.messages import ScoreReply, ScoreRequest
from video_opd.serving.queue import ScoringQueue, Waiting


class Refusing:
    """A scorer that refuses a batch with the prompt ``"wrong"`` in it. It waits before its first batch."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.began, self.go_on = threading.Event(), threading.Event()

    def answer(self, requests: Sequence[ScoreRequest], prompts: Any) -> list[ScoreReply]:
        self.began.set()
        self.go_on.wait(20)
        names = [prompt.id for request in requests for prompt in request.prompts]
        self.batches.append(names)
        if "wrong" in names:
            raise UserError("a prompt of 9 tokens, above 8")
        return [ScoreReply(logprobs=np.full((1, 1), len(names[0]), np.float32)) for _ in requests]


def waiting(name: str) -> Waiting:
    return Waiting(cases.score_request(name), [None])  # type: ignore[list-item]


def test_an_error_is_given_to_the_request_that_causes_it_alone() -> None:
    scorer = Refusing()
    scoring = ScoringQueue(scorer)  # type: ignore[arg-type]
    scoring.put(waiting("first"))
    assert scorer.began.wait(20)  # the others come meanwhile
    replies = {name: scoring.put(waiting(name)) for name in ("right", "wrong", "right too")}
    scorer.go_on.set()
    scoring.close()
    assert scorer.batches == [["first"], ["right", "wrong", "right too"], ["right"], ["wrong"], ["right too"]]
    with pytest.raises(UserError, match="9 tokens"):
        replies["wrong"].result(0)
    for name in ("right", "right too"):
        reply = replies[name].result(0)
        assert isinstance(reply, ScoreReply) and reply.logprobs.item() == len(name)
