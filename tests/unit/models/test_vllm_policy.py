"""What vLLM is handed and what comes back are checked here; vLLM itself by ``make test-vllm``."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from typing import Any

import model_cases as cases
import pytest
import serving_cases
import torch

from video_opd.config import PromptConfig
from video_opd.data.encode import PromptEncoder
from video_opd.errors import UserError
from video_opd.models.vllm_policy import VLLMPolicy, check_ids, folded
from video_opd.models.vllm_worker import RestrictedWorker
from video_opd.models.vocabulary import Vocabulary
from video_opd.types import EncodedPrompt


def prompt(form: Any = "nested", frames: int = 6) -> EncodedPrompt:
    encoder = PromptEncoder(cases.processor(), PromptConfig(video_form=form), keep_clips=True)
    return encoder.encode(serving_cases.clip(0, frames=frames), "the ring grows", "row")


@pytest.mark.parametrize("form", ["nested", "release"])
@pytest.mark.parametrize("frames", [6, 7])
def test_a_video_is_folded_into_one_placeholder(form: Any, frames: int) -> None:
    """As the processor is given it, but for the markers that the release's form does not have."""
    asked = prompt(form, frames)
    tokenizer = cases.processor().tokenizer
    text = tokenizer.decode(folded(asked, cases.processor()))
    assert text.count("<|video_pad|>") == 1 and "seconds>" not in text
    outer = "<|vision_start|><|video_pad|><|vision_end|>"
    assert (outer in text) == (form == "nested") and "the ring grows" in text


def test_a_video_that_is_written_otherwise_is_not_folded() -> None:
    asked = prompt()
    times = tuple(time_s + 1 for time_s in asked.pair_times_s)
    with pytest.raises(UserError, match=r"row: its video is not written as .* 3 pairs of frames"):
        folded(replace(asked, pair_times_s=times), cases.processor())


def test_the_first_place_where_vllm_reads_another_prompt_is_named() -> None:
    asked, processor = prompt(), cases.processor()
    ids = asked.input_ids[0].tolist()
    check_ids(asked, (5, 9), processor, [*ids, 5, 9])
    first = ids.index(processor.video_token_id)
    more = [*ids[:first], *[processor.video_token_id] * 2, *ids[first + 1 :]]
    wrong = {
        r"token 3 is \d+ .*, ours \d+": [*ids[:3], ids[3] + 1, *ids[4:]],
        rf"token {len(ids) - 1} is none, ours": ids[:-1],
        rf"token {len(ids)} is 7 .*, ours none": [*ids, 7],
        rf"{asked.video_tokens + 1} placeholders of the video, ours {asked.video_tokens}": more,
    }
    for message, found in wrong.items():
        with pytest.raises(UserError, match=rf"row: vLLM read another prompt: .*{message}"):
            check_ids(asked, (), processor, found)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_it_is_said_how_to_get_it() -> None:
    vocabulary = Vocabulary.of(cases.model(0), cases.processor())
    with pytest.raises(UserError, match=r'vLLM is not installed: pip install "video-opd\[vllm\]"'):
        VLLMPolicy("model", cases.processor(), vocabulary, dtype="float32")


def test_a_worker_restricts_its_model_again_and_again() -> None:
    class Model:
        def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
            return hidden

    class Runner:
        model = Model()

        def get_model(self) -> Model:
            return self.model

    worker = RestrictedWorker()
    worker.model_runner = Runner()

    def forbidden(count: int) -> list[list[bool]]:
        logits = Runner.model.compute_logits(torch.zeros(count, 8))
        assert logits is not None
        return (logits == -1e30).tolist()

    worker.allow_tokens(6, [1, 2], -1e30, os.getpid())
    assert forbidden(2) == [[i in (1, 2, 6, 7) for i in range(8)]] * 2
    worker.allow_tokens(8, [0], -1e30, os.getpid())  # not on top of the first
    assert forbidden(1) == [[i == 0 for i in range(8)]]
