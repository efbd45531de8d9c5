"""The model's input: the processor's own tensors, with our frames and our times."""

import math
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import model, processor, stock_logprobs
from places import REAL

from video_opd.config import PromptConfig, VideoConfig, VideoForm
from video_opd.data.encode import PromptEncoder
from video_opd.data.prompts import CONTROL_TOKEN, build_messages, opens_thinking
from video_opd.data.video import clip_digest, load_clip
from video_opd.errors import UserError
from video_opd.models.policy import HFPolicy
from video_opd.models.sharing import find_trunks
from video_opd.types import Clip
from video_opd.world.tiny import build_processor

QUERY = "the red circle appears"


@lru_cache(maxsize=1)
def encoder() -> PromptEncoder:
    return encoder_of("nested")


@lru_cache(maxsize=2)
def encoder_of(form: VideoForm) -> PromptEncoder:
    return PromptEncoder(build_processor(), PromptConfig(video_form=form))


def make_clip(times_s: list[float], height_px: int = 64, width_px: int = 96, seed: int = 0) -> Clip:
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (len(times_s), height_px, width_px, 3), dtype=np.uint8)
    times = np.array(times_s, dtype=np.float64)
    return Clip(
        path=Path("v.mp4"),
        frames=frames,
        times_s=times,
        frame_indices=np.arange(len(times_s)),
        source_fps=10.0,
        duration_s=times_s[-1] + 0.1,
        source_size_px=(height_px, width_px),
        digest=clip_digest(frames, times),
    )


def by_hand(clip: Clip, query: str) -> dict[str, torch.Tensor]:
    """The processor asked plainly, with nominal metadata: frame numbers at a constant rate."""
    processor = build_processor()
    text = processor.apply_chat_template(build_messages(query), tokenize=False, add_generation_prompt=True)
    rate = 1 / (clip.times_s[1] - clip.times_s[0])
    return processor(
        text=[text],
        videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2)],
        video_metadata=[
            {
                "fps": rate,
                "frames_indices": list(range(len(clip.frames))),
                "total_num_frames": len(clip.frames),
            }
        ],
        do_resize=False,
        do_sample_frames=False,
        cap_pixels_per_frame=False,
        return_tensors="pt",
    )


def test_at_a_constant_rate_it_is_what_the_processor_makes():
    clip = make_clip([0.0, 0.5, 1.0, 1.5])
    prompt, plain = encoder().encode(clip, QUERY, "a"), by_hand(clip, QUERY)
    assert torch.equal(prompt.input_ids, plain["input_ids"])
    for key in ("pixel_values_videos", "video_grid_thw", "mm_token_type_ids"):
        assert torch.equal(prompt.tensors[key], torch.as_tensor(plain[key])), key
    assert prompt.tensors["pixel_values_videos"].dtype == torch.float32
    assert prompt.pair_times_s == (0.25, 1.25)
    assert (prompt.sample_id, prompt.clip_digest, prompt.duration_s) == ("a", clip.digest, clip.duration_s)


# The ids that the processor of transformers 4.57.1 (Qwen's release) makes of such a clip and QUERY, style
# question, with the tiny tokenizer. 485, 486 and 489 are the vision's start, end and video token.
IRREGULAR = [0.0, 0.31, 0.47, 2.9, 3.5]
PAIR = [485, 489, 489, 489, 489, 489, 489, 486]
RELEASED = [
    *(483, 472, 198),
    *(27, 15, 13, 17, 478, 29, *PAIR),
    *(27, 16, 13, 22, 478, 29, *PAIR),
    *(27, 18, 13, 20, 478, 29, *PAIR),
    *(269, 317, 302, 461, 484, 198, 483, 479, 198),
]


def test_both_forms_of_a_video_are_those_of_their_releases():
    clip = make_clip(IRREGULAR)
    made = {}
    for form in ("release", "nested"):
        asked = PromptConfig(style="question", video_form=form)
        prompt = PromptEncoder(build_processor(), asked).encode(clip, QUERY, "a")
        made[form] = prompt.input_ids[0].tolist()
        pads = prompt.input_ids == build_processor().video_token_id
        assert torch.equal(prompt.tensors["mm_token_type_ids"], torch.where(pads, 2, 0))
        assert prompt.video_tokens == int(pads.sum()) == prompt.tensors["video_grid_thw"].prod() // 4 == 18
        assert prompt.pair_times_s == pytest.approx((0.155, 1.685, 3.5))
    assert made["release"] == RELEASED
    assert made["nested"] == [*RELEASED[:3], 485, *RELEASED[3:45], 486, *RELEASED[45:]]


@pytest.mark.parametrize("style", ["paper", "timelens"])
def test_queries_share_their_video_in_both_forms(style: Any):
    clip, queries = make_clip(IRREGULAR), ["a", "<0.2 seconds> a blue square", "3 ein Würfel — 立方体"]
    for form in ("release", "nested"):
        asked = PromptEncoder(build_processor(), PromptConfig(style=style, video_form=form))
        together = asked.encode_many(clip, queries, queries)
        for query, prompt in zip(queries, together, strict=True):
            assert torch.equal(prompt.input_ids, asked.encode(clip, query, query).input_ids)
        trunks = find_trunks(together, build_processor().video_token_id)
        assert trunks is not None and trunks.of_prompt == (0, 0, 0)


@pytest.mark.parametrize("engine", ["plain", "prefix"])
def test_both_forms_are_scored_as_by_the_stock_model(engine: Any):
    """Positions included: the stock model numbers them from the ids alone."""
    for form in ("release", "nested"):
        clip = make_clip(IRREGULAR)
        prompts = encoder_of(form).encode_many(clip, [QUERY, "another query"], ["a", "b"])
        got = HFPolicy(model(sharpness=8), processor(), engine).logprobs(prompts, [[[9, 10, 11]]] * 2)
        for row, prompt in enumerate(prompts):
            expected = stock_logprobs(model(sharpness=8), prompt, (9, 10, 11))
            expected = expected[torch.arange(3), torch.tensor([9, 10, 11])]
            torch.testing.assert_close(got.logprobs_BT[row], expected, atol=1e-4, rtol=0)


def test_a_processor_that_nests_otherwise_is_found_out():
    def nested_again(real: Any, kwargs: Any) -> Any:
        markers = f"<|vision_start|>{real.video_token}<|vision_end|>"
        return real(**{**kwargs, "text": [kwargs["text"][0].replace(real.video_token, markers)]})

    with pytest.raises(UserError, match="around the video"):
        PromptEncoder(Spoilt(nested_again))


def thinking_processor() -> Any:
    """A processor whose template opens <think> behind the prompt, as the Thinking checkpoints do."""
    made = build_processor()
    made.chat_template = made.chat_template + "{%- if add_generation_prompt -%}<think>\n{%- endif -%}"
    return made


def test_a_template_that_opens_reasoning_needs_the_setting():
    with pytest.raises(UserError, match=r"opens <think>.*set prompt\.thinking"):
        PromptEncoder(thinking_processor())
    asked = PromptEncoder(thinking_processor(), PromptConfig(thinking=True, video_form="release"))
    assert asked.encode(make_clip([0.0, 0.5]), QUERY, "a").text.rstrip().endswith("<think>")


@pytest.mark.parametrize(
    ("end", "opened"),
    [
        ("<think>\n", True),
        ("<think>\n\n</think>\n\n", False),  # reasoning that the template switches off
        ("", False),
    ],
)
def test_an_open_thought_is_told_from_a_closed_one(end: str, opened: bool):
    asked = "<|im_start|>user\nThink first between <think> and </think>, then answer <think>.<|im_end|>\n"
    assert opens_thinking(asked + "<|im_start|>assistant\n" + end) == opened


def test_pixels_are_normalised_patches_in_the_models_order():
    clip = make_clip([0.0, 0.5])
    pixels = encoder().encode(clip, QUERY, "a").tensors["pixel_values_videos"]
    first = pixels[0].reshape(3, 2, 16, 16)  # channel, frame of the pair, y, x
    expected = clip.frames[:, :16, :16].transpose(3, 0, 1, 2).astype(np.float32) / 127.5 - 1
    assert torch.allclose(first, torch.from_numpy(expected), atol=1e-5)


@pytest.mark.parametrize("times_s", [[0.0, 0.31, 0.47, 2.9], [0.0, 0.31, 4.44, 4.45, 9.99], [0.0]])
def test_true_times_are_written_before_their_pairs(times_s):
    clip = make_clip(times_s)
    prompt = encoder().encode(clip, QUERY, "a")
    whole = times_s + times_s[-1:] * (len(times_s) % 2)
    pairs = [(a + b) / 2 for a, b in zip(whole[::2], whole[1::2], strict=True)]
    assert prompt.pair_times_s == pytest.approx(pairs)
    decoded = encoder().processor.tokenizer.decode(prompt.input_ids[0])
    blocks = re.findall(
        r"<(\d+\.\d) seconds><\|vision_start\|>((?:<\|video_pad\|>)+)<\|vision_end\|>", decoded
    )
    assert [time for time, _ in blocks] == [f"{t:.1f}" for t in pairs]
    assert [pads.count("<|video_pad|>") for _, pads in blocks] == [2 * 3] * len(pairs)
    assert clip.times_s.tolist() == times_s  # the processor changes the list it is given


def test_counts_agree_for_any_size():
    for height_px, width_px, frames in [(32, 320, 6), (320, 32, 3), (64, 64, 12), (96, 160, 1)]:
        clip = make_clip([0.5 * i for i in range(frames)], height_px, width_px)
        prompt = encoder().encode(clip, QUERY, "a")
        pairs = (frames + 1) // 2
        assert prompt.video_tokens == pairs * (height_px // 32) * (width_px // 32)
        assert prompt.tensors["video_grid_thw"].tolist() == [[pairs, height_px // 16, width_px // 16]]
        assert (prompt.tensors["mm_token_type_ids"] == 2).sum() == prompt.video_tokens


def test_several_queries_are_what_each_would_be_alone_and_share_their_pixels():
    clip = make_clip([0.0, 0.5, 1.0])
    queries = [QUERY, "a blue square {moves} “left” <think> 12.5", "3 ein Würfel — 立方体"]
    together = encoder().encode_many(clip, queries, ["a", "b", "c"])
    for query, prompt in zip(queries, together, strict=True):
        alone = encoder().encode(clip, query, prompt.sample_id)
        assert torch.equal(prompt.input_ids, alone.input_ids)
        assert torch.equal(prompt.tensors["mm_token_type_ids"], alone.tensors["mm_token_type_ids"])
        assert prompt.tensors["pixel_values_videos"] is together[0].tensors["pixel_values_videos"]
        assert query in encoder().processor.tokenizer.decode(prompt.input_ids[0])
        assert query in prompt.text
    assert encoder().encode_many(clip, [], []) == []


def test_threads_get_what_one_thread_gets():
    clips = [make_clip([0.0, 0.5], seed=seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda c: encoder().encode(c, QUERY, c.digest), clips))
    for clip, prompt in zip(clips, made, strict=True):
        alone = encoder().encode(clip, QUERY, clip.digest)
        assert torch.equal(prompt.input_ids, alone.input_ids) and prompt.clip_digest == clip.digest
        assert torch.equal(prompt.tensors["pixel_values_videos"], alone.tensors["pixel_values_videos"])


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|im_end|>", "<|vision_end|>", "<|image_pad|>"])
def test_a_query_cannot_hold_a_control_token(token):
    with pytest.raises(UserError, match=re.escape(token)):
        encoder().encode(make_clip([0.0, 0.5]), f"a cat {token} jumps", "row 7")


def test_every_control_token_is_known_to_a_check_without_the_model():
    added = build_processor().tokenizer.get_added_vocab()
    refused = [token for token in added if encoder().refusal(f"x {token}") is not None]
    assert {"<|im_start|>", "<|im_end|>", "<|video_pad|>", "<|vision_start|>"} <= set(refused)
    assert all(CONTROL_TOKEN.fullmatch(token) for token in refused)
    assert all(token in refused for token in added if token.startswith("<|"))


def test_thinking_changes_the_prompt():
    thinking = PromptEncoder(build_processor(), PromptConfig(thinking=True, video_form="nested"))
    clip = make_clip([0.0, 0.5])
    assert thinking.encode(clip, QUERY, "a").length > encoder().encode(clip, QUERY, "a").length


class Spoilt:
    """A processor whose answer is changed on the way."""

    def __init__(self, spoil: Any) -> None:
        self._real, self._spoil = build_processor(), spoil

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, **kwargs: Any) -> Any:
        return self._spoil(self._real, kwargs)


def one_pad_less(real, kwargs):
    out = real(**kwargs)
    at = int((out["input_ids"][0] == real.video_token_id).nonzero()[0])
    for key in ("input_ids", "mm_token_type_ids"):
        out[key] = torch.cat([out[key][:, :at], out[key][:, at + 1 :]], dim=1)
    return out


def nominal_times(real, kwargs):
    kwargs["video_metadata"] = [m | {"fps": 24.0} for m in kwargs["video_metadata"]]
    return real(**kwargs)


def no_types(real, kwargs):
    out = real(**kwargs)
    out["mm_token_type_ids"] = torch.zeros_like(out["input_ids"])
    return out


@pytest.mark.parametrize(
    ("spoil", "word"), [(one_pad_less, "tokens"), (nominal_times, "times"), (no_types, "video")]
)
def test_a_processor_that_disagrees_is_found_out(spoil, word):
    with pytest.raises(UserError, match=f"cannot encode a video .*{word}"):
        PromptEncoder(Spoilt(spoil))


ABSURD: list[tuple[str, Any]] = [
    *(("patch_size", value) for value in (0, -16, 10**9, "16", None, 16.0, math.nan, 1e300)),
    *(("merge_size", value) for value in (0, -2, "2", None)),
    *(("temporal_patch_size", value) for value in (0, 1, "2", None, 1e300)),
    *(("image_mean", value) for value in ([math.nan] * 3, [1e300] * 3, ["x"] * 3, [0.5] * 2, None, "0.5")),
    *(("image_std", value) for value in ([0.0] * 3, [math.nan] * 3, [1e-320] * 3, [None] * 3, [])),
    *(("rescale_factor", value) for value in (math.nan, math.inf, 1e300, "x")),
]


@pytest.mark.parametrize(("name", "value"), ABSURD)
def test_a_processor_that_can_encode_no_video_is_refused(name: str, value: Any) -> None:
    absurd = build_processor()
    setattr(absurd.video_processor, name, value)
    with pytest.raises(UserError, match=r"processor's video tokens|cannot encode a video") as refused:
        PromptEncoder(absurd)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


def test_another_family_of_processors_is_refused():
    real = build_processor()
    other = SimpleNamespace(
        video_processor=SimpleNamespace(patch_size=14, merge_size=2, temporal_patch_size=2),
        tokenizer=real.tokenizer,
    )
    with pytest.raises(UserError, match="28 px"):
        PromptEncoder(other)
    with pytest.raises(UserError, match="style"):
        PromptEncoder(real, PromptConfig.model_construct(style="none", video_form="nested"))


@pytest.mark.skipif(not REAL.exists(), reason="the real videos are not here")
def test_a_real_video_has_seventy_frames_in_thirty_five_pairs():
    clip = load_clip(REAL / "OHOFG.mp4", VideoConfig())
    prompt = encoder().encode(clip, "a person sits on a chair by a table.", "OHOFG")
    assert len(clip.frames) == 70 and len(prompt.pair_times_s) == 35
    assert prompt.tensors["video_grid_thw"][0, 0] == 35 and prompt.video_tokens <= 8192
    numbers = np.linspace(0, 334, 70).round()
    expected = (numbers[::2] + numbers[1::2]) / 2 * 0.1049
    assert np.array(prompt.pair_times_s) == pytest.approx(expected, abs=1e-3)
