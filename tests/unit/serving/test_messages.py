"""Messages come back as they were, and nothing else is read as one."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save

from video_opd.serving.messages import (
    BadMessage,
    ClipMessage,
    Computation,
    PromptMessage,
    SampleReply,
    SampleRequest,
    ScoreReply,
    ScoreRequest,
    WritableTokens,
    pack_request,
    pack_sample_reply,
    pack_score_reply,
    unpack_sample_reply,
    unpack_sample_request,
    unpack_score_reply,
    unpack_score_request,
)
from video_opd.types import Rollout


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def request(full: bool = False) -> ScoreRequest:
    frames = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    return ScoreRequest(
        model="f" * 32,
        computation=Computation(dtype="bfloat16", quantization="int8", engine="hf"),
        vocabulary=WritableTokens.of(50, frozenset({3, 4, 5, 9})),
        clips=(
            ClipMessage(digest="a", duration_s=2.0, frames=frames, times_s=np.array([0.0, 0.5])),
            ClipMessage(digest="b", duration_s=3.5, path="/videos/b.mp4", budget={"fps": 2.0}),
        ),
        prompts=(
            PromptMessage(
                id="row 1",
                clip=1,
                token_ids=tokens(1, 2, 3),
                responses=(tokens(7, 8), tokens(9)),
            ),
            PromptMessage(id="ö", clip=0, token_ids=tokens(4), responses=(tokens(5),)),
        ),
        full=full,
        temperature=0.5,
    )


def test_a_request_comes_back_as_it_was() -> None:
    sent = request()
    found = unpack_score_request(pack_request(sent))
    assert (found.model, found.vocabulary, found.full, found.temperature) == (
        "f" * 32,
        sent.vocabulary,
        False,
        0.5,
    )
    assert found.computation == sent.computation
    assert found.vocabulary.forbidden == ((3, 5), (9, 9))
    assert found.vocabulary.forbidden_ids == {3, 4, 5, 9}
    first, second = found.clips
    assert first.frames is not None and first.times_s is not None and sent.clips[0].frames is not None
    assert np.array_equal(first.frames, sent.clips[0].frames) and first.times_s.tolist() == [0.0, 0.5]
    assert (second.path, second.budget, second.duration_s) == ("/videos/b.mp4", {"fps": 2.0}, 3.5)
    assert [p.id for p in found.prompts] == ["row 1", "ö"] and [p.clip for p in found.prompts] == [1, 0]
    assert [[r.tolist() for r in p.responses] for p in found.prompts] == [[[7, 8], [9]], [[5]]]
    assert found.response_lengths == [2, 1, 1]


@pytest.mark.parametrize("full", [False, True])
def test_a_reply_fits_its_request(full: bool) -> None:
    asked = request(full)
    logprobs = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    whole = np.zeros((3, 2, 50), dtype=np.float32) if full else None
    found = unpack_score_reply(
        pack_score_reply(ScoreReply(logprobs=logprobs, full=whole, seconds=1.5)), asked
    )
    assert np.array_equal(found.logprobs, logprobs) and found.seconds == 1.5
    assert (found.full is not None) == full
    for wrong in (logprobs[:2], logprobs[:, :1], logprobs.astype(np.float64).T):
        with pytest.raises(BadMessage, match="logprobs"):
            unpack_score_reply(pack_score_reply(ScoreReply(logprobs=wrong, full=whole)), asked)


def sample_request() -> SampleRequest:
    asked = request()
    prompts = [
        replace(prompt, responses=(), seeds=np.array([2**62, n])) for n, prompt in enumerate(asked.prompts)
    ]
    return SampleRequest(
        model=asked.model,
        computation=asked.computation,
        vocabulary=asked.vocabulary,
        clips=asked.clips,
        prompts=tuple(prompts),
        n=2,
        max_new_tokens=3,
        temperature=0.7,
        top_p=0.9,
        top_k=4,
    )


def test_a_request_for_rollouts_comes_back_as_it_was() -> None:
    sent = sample_request()
    found = unpack_sample_request(pack_request(sent))
    assert found.settings == sent.settings
    assert found.settings == (SampleRequest, sent.vocabulary, 2, 3, 0.7, 0.9, 4)
    assert [p.seeds.tolist() for p in found.prompts if p.seeds is not None] == [[2**62, 0], [2**62, 1]]
    greedy = replace(sent, temperature=0.0, prompts=tuple(replace(p, seeds=None) for p in sent.prompts))
    assert [p.seeds for p in unpack_sample_request(pack_request(greedy)).prompts] == [None, None]


def test_rollouts_come_back_as_they_were() -> None:
    asked = sample_request()
    made = [
        Rollout(token_ids=(7, 8), logprobs=(-0.5, -0.25), text="ä", truncated=False),
        Rollout(token_ids=(1, 2, 3), logprobs=(-1.0, -2.0, -3.0), text="", truncated=True),
    ]
    reply = SampleReply(rollouts=(*made, *made), seconds=0.5)
    assert unpack_sample_reply(pack_sample_reply(reply), asked) == reply
    for wrong, message in (
        (SampleReply(rollouts=tuple(made)), "2 rollouts, and 4 were asked for"),
        (SampleReply(rollouts=(*made, made[0], replace(made[0], token_ids=(), logprobs=()))), "empty"),
        (SampleReply(rollouts=(*made, *made[:1], replace(made[1], token_ids=(1,) * 4, logprobs=(0.0,) * 4))),
         "longer than was asked"),
    ):  # fmt: skip
        with pytest.raises(BadMessage, match=message):
            unpack_sample_reply(pack_sample_reply(wrong), asked)
    assert (
        unpack_score_reply(
            pack_score_reply(ScoreReply(logprobs=np.zeros((3, 2), np.float32))), request()
        ).full
        is None
    )
    with pytest.raises(BadMessage, match="'logprobs'"):
        unpack_score_reply(pack_sample_reply(reply), request())


def changed(**changes: object) -> bytes:
    """A request whose JSON says something else."""
    body = pack_request(request())
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    head = json.loads(header["__metadata__"]["video-opd"])
    for path, value in changes.items():
        *sections, name = path.split("__")
        node = head
        for section in sections:
            node = node[int(section) if section.isdigit() else section]
        node[name] = value
    header["__metadata__"]["video-opd"] = json.dumps(head)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body[8 + length :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": 1}, "protocol is 1; this is version 2"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": {}}, "prompts is {}, not a list"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True, not a number"),
        ({"full": 1}, "full is 1, not true or false"),
        ({"model": None}, "model is None, not a text"),
        ({"dtype": None}, "dtype is None, not a text"),
        ({"quantization": 8}, "quantization is 8, not a text"),
        ({"engine": 1}, "engine is 1, not a text"),
        ({"clips": [1, 2]}, "a clip is 1, not an object"),
        ({"vocabulary__size": -1}, "size is -1"),
        ({"vocabulary__size": 1 << 40}, "size is 1099511627776"),
        ({"vocabulary__forbidden": [[0, 99]]}, "no range of token ids below 50"),
        ({"vocabulary__forbidden": [[5, 3]]}, "no range of token ids below 50"),
        ({"prompts__0__clip": 2}, "about clip 2, and there are 2"),
        ({"prompts__0__lengths": []}, "no response"),
        ({"prompts__0__lengths": [3, 0]}, "no response, or an empty one"),
        ({"prompts__0__lengths": [1, 1]}, "'responses-0' is int32 \\[3\\], not int32 of 2 numbers"),
        ({"clips__1__budget": []}, "budget is \\[\\], not an object"),
        ({"clips__0__path": "x"}, "budget is None"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadMessage, match=message):
        unpack_score_request(changed(**changes))


def test_arrays_that_do_not_belong_are_refused() -> None:
    with pytest.raises(BadMessage, match="has no text 'video-opd'"):
        unpack_score_request(save({"a": np.zeros(3)}))
    with pytest.raises(BadMessage, match="not safetensors"):
        unpack_score_request(b"")
    with pytest.raises(BadMessage, match="longer than itself"):
        unpack_score_request((1 << 60).to_bytes(8, "little") + b"{}")


def test_mutated_messages_are_read_or_refused_and_nothing_else_happens() -> None:
    rng = random.Random(0)
    kinds = (
        (pack_request(request()), unpack_score_request),
        (pack_request(sample_request()), unpack_sample_request),
    )
    read = 0
    for number in range(4000):
        body, unpack = kinds[number % 2]
        mutated = bytearray(body)
        for _ in range(rng.randint(1, 8)):
            kind, at = rng.randrange(4), rng.randrange(len(mutated))
            if kind == 0:
                mutated[at] = rng.randrange(256)
            elif kind == 1:
                del mutated[at : at + rng.randint(1, 50)]
            elif kind == 2:
                mutated[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 20)))
            else:  # mostly the lengths and the header
                mutated[rng.randrange(min(600, len(mutated)))] = rng.choice(b'0123456789-e"[]{},:')
            if not mutated:
                break
        try:
            unpack(bytes(mutated))
            read += 1
        except BadMessage as error:
            assert len(str(error).splitlines()) == 1
    assert read < 3000
