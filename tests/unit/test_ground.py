"""The answer for one video: clamped, noted, shown; then real decoding and a real (random) model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from answer_cases import FakePolicy, make_prompt
from model_cases import model, processor
from video_cases import write_video

from video_opd.data.budget import VideoBudget
from video_opd.data.encode import PromptEncoder
from video_opd.data.loader import PromptLoader
from video_opd.data.video import VideoError, load_clip
from video_opd.errors import UserError
from video_opd.evaluation.ground import GroundedAnswer, ground, is_thinned
from video_opd.evaluation.metrics import evaluate
from video_opd.evaluation.predict import AnswerSettings, PredictResult, predict
from video_opd.evaluation.predictions import read_predictions
from video_opd.evaluation.resume import model_fingerprint
from video_opd.models.policy import HFPolicy
from video_opd.types import Clip, EncodedPrompt, Sample

SMALL = VideoBudget(min_frame_tokens=1)
REAL = Path(os.environ.get("VIDEO_OPD_REAL", Path(__file__).parents[3] / "shared" / "real"))


class FakeEncoder:
    def encode_many(
        self, clip: Clip, queries: Sequence[str], sample_ids: Sequence[str]
    ) -> list[EncodedPrompt]:
        return [
            make_prompt(Sample(id=identity, video=clip.path, query=query))
            for query, identity in zip(queries, sample_ids, strict=True)
        ]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "v.mp4", 40, fps=10.0, size=(64, 64))  # 4 s


def answers_to(video: Path, *texts: str, budget: VideoBudget = SMALL) -> list[GroundedAnswer]:
    policy: Any = FakePolicy(lambda identity, seed: texts[int(identity.rpartition(" ")[2])])
    encoder: Any = FakeEncoder()
    return ground(policy, encoder, budget, video, [f"query {i}" for i in range(len(texts))])


def test_answers_lie_within_the_video(video: Path) -> None:
    inside, past, outside, silent, reversed_ = answers_to(
        video, "1.00 to 2.50", "3.00 to 9.00", "7.00 to 9.00", "never", "2.50 to 1.00"
    )
    assert (inside.span, inside.clamped, inside.rule) == ((1.0, 2.5), False, "exact")
    assert past.span == (3.0, past.duration_s) and past.clamped
    assert outside.span is None and outside.clamped and outside.rule == "exact"
    assert silent.span is None and not silent.clamped and silent.rule == "none"
    assert reversed_.span is None and reversed_.rule == "exact"
    assert inside.duration_s == pytest.approx(4.0, abs=0.1)
    assert inside.frames == 8 and not inside.thinned  # 2 fps


def test_lines_for_people(video: Path) -> None:
    inside, past, outside, silent = answers_to(video, "1.00 to 2.50", "3.00 to 9.00", "7.00 to 9.00", "never")
    assert inside.line() == "00:01.00 → 00:02.50 (1.5 s)"
    assert past.line() == "00:03.00 → 00:04.00 (1.0 s) [cut to the video]"
    assert outside.line() == "no answer: the model wrote '7.00 to 9.00' (outside the video)"
    assert silent.line() == "no answer: the model wrote 'never' (no time span in it)"


def test_records_are_json(video: Path) -> None:
    record = json.loads(json.dumps(answers_to(video, "1.00 to 2.50")[0].to_json()))
    assert record["span"] == [1.0, 2.5] and record["query"] == "query 0"
    assert {"text", "rule", "clamped", "duration", "frames", "thinned"} <= set(record)


@pytest.mark.parametrize(
    ("budget", "thinned"),
    [
        (SMALL, False),
        (replace(SMALL, fps=10.0), False),  # every frame there is
        (replace(SMALL, fps=20.0), False),  # the source has no more
        (replace(SMALL, fps=10.0, max_frames=8), True),
        (replace(SMALL, fps=10.0, max_video_tokens=5), True),
        (replace(SMALL, min_frames=16), False),  # more than its rate asks for
    ],
)
def test_thinned_means_fewer_frames_than_the_rate_asks_for(
    video: Path, budget: VideoBudget, thinned: bool
) -> None:
    clip = load_clip(video, budget)
    assert is_thinned(clip, budget) == thinned
    answer = answers_to(video, "1.00 to 2.50", budget=budget)[0]
    assert ("a long video" in answer.line()) == thinned


def test_what_cannot_be_asked(video: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty query"):
        ground(FakePolicy(lambda *_: ""), FakeEncoder(), SMALL, video, ["a", " "])  # type: ignore[arg-type]
    with pytest.raises(VideoError):
        answers_to(tmp_path / "missing.mp4", "1 to 2")


# --- with a real processor, a real decoder and a tiny random model


@pytest.fixture(scope="module")
def policy() -> HFPolicy:
    return HFPolicy(model(), processor())


def test_a_random_model_answers_something_within_the_video(policy: HFPolicy, video: Path) -> None:
    settings = AnswerSettings(max_new_tokens=6)
    encoder = PromptEncoder(processor())
    answers = ground(policy, encoder, SMALL, video, ["the red circle", "the blue square"], settings=settings)
    assert [answer.query for answer in answers] == ["the red circle", "the blue square"]
    for answer in answers:
        assert answer.span is None or 0 <= answer.span[0] < answer.span[1] <= answer.duration_s
        assert answer.line()


def test_predicting_files_with_a_random_model(policy: HFPolicy, video: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    samples = [
        Sample(id="a", video=video, query="the red circle", duration_s=4.0, spans=((1.0, 2.0),)),
        Sample(
            id="b", video=tmp_path / "broken.mp4", query="the red circle", duration_s=4.0, spans=((1.0, 2.0),)
        ),
        Sample(id="c", video=video, query="a small green triangle", duration_s=4.0, spans=((2.0, 3.0),)),
    ]
    policy.model.save_pretrained(tmp_path / "model")
    encoder = PromptEncoder(processor())

    def open_loader(todo: Sequence[Sample]) -> PromptLoader:
        return PromptLoader(todo, encoder, SMALL, workers=0, max_failed_share=1.0)

    settings = AnswerSettings(n=2, temperature=1.0, max_new_tokens=5)
    rows = {}
    for batch_size in (1, 2):
        out = tmp_path / f"{batch_size}.jsonl"
        made_by = {"model": model_fingerprint(tmp_path / "model")}
        result = predict(
            policy, samples, open_loader, out, made_by=made_by, settings=settings, batch_size=batch_size
        )
        assert result == PredictResult(kept=0, answered=2, failed=1)
        rows[batch_size] = read_predictions(out)
        metrics = evaluate(samples, rows[batch_size])
        assert (metrics.n, metrics.missing) == (3, 1)
    assert rows[1] == rows[2]


@pytest.mark.skipif(not (REAL / "OHOFG.mp4").exists(), reason="the real videos are not here")
def test_a_real_video(policy: HFPolicy) -> None:
    answer = ground(
        policy,
        PromptEncoder(processor()),
        VideoBudget(max_video_tokens=256, min_frame_tokens=1),
        REAL / "OHOFG.mp4",
        ["a person sits on a chair by a table."],
        settings=AnswerSettings(max_new_tokens=3),
    )[0]
    assert (answer.frames, answer.thinned) == (70, False)
    assert answer.duration_s == pytest.approx(35.2, abs=0.2)
