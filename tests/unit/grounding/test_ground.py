"""The answer for one video: clamped, noted, shown; then real decoding and a real (random) model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from answer_cases import FakePolicy, make_prompt
from model_cases import model, processor
from places import REAL
from video_cases import write_video

from video_opd.config import VideoConfig
from video_opd.data.encode import PromptEncoder
from video_opd.data.loader import PromptLoader
from video_opd.data.video import VideoError, load_windows
from video_opd.errors import UserError
from video_opd.evaluation.metrics import evaluate
from video_opd.evaluation.predict import GenerationSettings, PredictResult, predict
from video_opd.evaluation.predictions import read_predictions
from video_opd.grounding.ground import GroundedAnswer, ground
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.policy import HFPolicy
from video_opd.types import Clip, EncodedPrompt, Sample

SMALL = VideoConfig(min_frame_tokens=1)


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


def answers_to(video: Path, *texts: str, budget: VideoConfig = SMALL) -> list[GroundedAnswer]:
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
    inside, past, outside, silent, reversed_ = answers_to(
        video, "1.00 to 2.50", "3.00 to 9.00", "7.00 to 9.00", "never", "2.50 to 1.00"
    )
    assert inside.line() == "00:01.00 → 00:02.50 (1.5 s)"
    assert past.line() == "00:03.00 → 00:04.00 (1.0 s) [cut to the video]"
    assert outside.line() == "no answer: the model wrote '7.00 to 9.00' (outside the video)"
    assert silent.line() == "no answer: the model wrote 'never' (no time span in it)"
    assert reversed_.line() == "no answer: the model wrote '2.50 to 1.00' (it does not end after it begins)"


def test_records_are_json(video: Path) -> None:
    record = json.loads(json.dumps(answers_to(video, "1.00 to 2.50")[0].to_json()))
    assert record["span"] == [1.0, 2.5] and record["query"] == "query 0"
    assert {"text", "rule", "clamped", "duration", "frames", "thinned"} <= set(record)


@pytest.mark.parametrize(
    ("budget", "thinned"),
    [
        (SMALL, False),
        (SMALL.changed(fps=10.0), False),  # every frame there is
        (SMALL.changed(fps=20.0), False),  # the source has no more
        (SMALL.changed(fps=10.0, max_frames=8), True),
        (SMALL.changed(fps=10.0, max_video_tokens=5), True),
        (SMALL.changed(min_frames=16), False),  # more than its rate asks for
    ],
)
def test_thinned_means_fewer_frames_than_the_rate_asks_for(
    video: Path, budget: VideoConfig, thinned: bool
) -> None:
    answer = answers_to(video, "1.00 to 2.50", budget=budget)[0]
    assert answer.thinned == thinned
    assert ("a long video" in answer.line()) == thinned


@pytest.mark.parametrize(("max_frames", "thinned"), [(768, False), (4, True)])
def test_a_screen_that_stands_still_is_not_thinned(tmp_path: Path, max_frames: int, thinned: bool) -> None:
    """There is nothing new to be shown: that is not the budget's bound."""
    video = write_video(tmp_path / "v.mp4", 62, times_s=[*np.arange(60) / 30, 19.9, 20.0], size=(64, 64))
    answer = answers_to(video, "1.00 to 2.50", budget=SMALL.changed(min_frames=2, max_frames=max_frames))[0]
    assert answer.thinned == thinned
    assert ("a long video" in answer.line()) == thinned


def test_a_window_is_thinned_by_the_rate_of_its_own_frames(tmp_path: Path) -> None:
    """Ten seconds at 30 fps, then a frame every ten seconds: the mean rate says nothing of the beginning."""
    times_s = [*np.arange(300) / 30, *range(20, 200, 10)]
    video = write_video(tmp_path / "v.mp4", len(times_s), times_s=times_s, size=(64, 64))
    budget = SMALL.changed(fps=4.0, min_frames=2, max_frames=8)
    first, *others = load_windows(video, budget, 10.0)
    assert first.thinned and len(first.clip.frames) == 8
    assert others and not any(window.thinned for window in others)


def test_what_cannot_be_asked(video: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty query"):
        ground(FakePolicy(lambda *_: ""), FakeEncoder(), SMALL, video, ["a", " "])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="empty query"):
        answers_to(video)
    with pytest.raises(VideoError):
        answers_to(tmp_path / "missing.mp4", "1 to 2")


# --- several samples


def test_the_answer_of_several_samples_is_their_consensus(video: Path) -> None:
    texts = ("1.00 to 2.00", "0.00 to 2.00", "0.50 to 2.00", "nothing", "3.00 to 9.00")
    order: dict[int | None, str] = {}

    def write(identity: str, seed: int | None) -> str:
        return order.setdefault(seed, texts[len(order)])

    settings = GenerationSettings(n=5, temperature=1.0)
    policy: Any = FakePolicy(write)
    (found,) = ground(policy, FakeEncoder(), SMALL, video, ["query"], settings=settings)  # type: ignore[arg-type]
    assert [response.text for response in found.samples] == list(texts)
    assert len(order) == 5 and None not in order  # each draw has its own seed
    # Mean IoUs with the others: (1/2 + 2/3) / 4, (1/2 + 3/4) / 4, (2/3 + 3/4) / 4, 0, 0.
    assert found.span == (0.5, 2.0) and found.text == texts[2]
    assert found.agreement == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 10)
    assert [response.clamped for response in found.samples] == [False, False, False, False, True]
    assert found.samples[3].span is None and found.samples[4].span == (3.0, found.duration_s)


def test_draws_depend_on_the_seed_and_the_query_alone(video: Path) -> None:
    seen: dict[str, list[int | None]] = {}

    def write(identity: str, seed: int | None) -> str:
        seen.setdefault(identity, []).append(seed)
        return "1.00 to 2.00"

    def seeds(queries: list[str], seed: int = 0, **options: Any) -> list[int | None]:
        seen.clear()
        settings = GenerationSettings(n=6, temperature=1.0, seed=seed)
        policy: Any = FakePolicy(write)
        ground(policy, FakeEncoder(), SMALL, video, queries, settings=settings, **options)  # type: ignore[arg-type]
        return seen[f"{video.name}: b"]

    alone = seeds(["b"])
    assert len(set(alone)) == 6
    assert seeds(["a", "b", "c"]) == alone
    assert seeds(["a", "b"], batch_size=1) == seeds(["b"], batch_size=4) == alone
    assert not set(seeds(["b"], seed=1)) & set(alone)


@pytest.mark.parametrize(("queries", "n", "batch_size"), [(5, 1, 2), (5, 3, 7), (1, 10, 4), (3, 2, 100)])
def test_no_more_answers_at_a_time_than_asked_for_from_one_reading(
    video: Path, queries: int, n: int, batch_size: int
) -> None:
    policy: Any = FakePolicy(lambda identity, seed: f"1.00 to {identity.rpartition(' ')[2]}.00")
    settings = GenerationSettings(n=n, temperature=1.0)
    words = [f"query {i + 2}" for i in range(queries)]
    encoder: Any = FakeEncoder()
    answers = ground(policy, encoder, SMALL, video, words, settings=settings, batch_size=batch_size)
    assert all(len(call["ids"]) * call["n"] <= max(batch_size, 1) for call in policy.calls)
    assert sum(len(call["ids"]) * call["n"] for call in policy.calls) == queries * n
    assert len(policy.read) == 1
    assert [a.text for a in answers] == [f"1.00 to {i + 2}.00" for i in range(queries)]


# --- windows


def test_a_window_speaks_in_its_own_seconds(video: Path) -> None:
    """4 s in windows of 2 s, one every second: what the model says counts from each one's beginning."""
    texts = {"0.000": "0.50 to 1.00", "1.000": "0.25 to 0.75", "2.000": "1.50 to 7.00"}
    logprobs = {"0.000": -0.5, "1.000": -0.1, "2.000": -0.3}

    def start_of(identity: str) -> str:
        assert identity.startswith("v.mp4 from ") and identity.endswith(" s: the query")
        return identity.split()[2]

    class Confident(FakePolicy):
        def sample(self, prompts: Any, **options: Any) -> Any:
            self.logprob = logprobs[start_of(prompts[0].sample_id)]
            return super().sample(prompts, **options)

    policy: Any = Confident(lambda identity, seed: texts[start_of(identity)])
    encoder: Any = FakeEncoder()
    (found,) = ground(policy, encoder, SMALL, video, ["the query"], window_s=2.0)
    assert [w.window for w in found.windows] == [  # the likeliest first
        pytest.approx(w) for w in ((1.0, 3.0), (2.0, 4.0), (0.0, 2.0))
    ]
    assert found.span == pytest.approx((1.25, 1.75)) and found.text == "0.25 to 0.75"
    assert found.windows[1].response.span == pytest.approx((3.5, 4.0)) and found.windows[1].response.clamped
    assert found.windows[2].response.span == pytest.approx((0.5, 1.0))
    assert found.duration_s == pytest.approx(4.0) and found.frames == 4
    assert len(policy.read) == 3  # once a window
    record = found.to_json()
    assert record["window"] == pytest.approx([1.0, 3.0]) and len(record["windows"]) == 3
    assert "best of 3 windows: 00:01.00 to 00:03.00" in found.line()


def test_a_window_without_an_answer_is_the_last_choice(video: Path) -> None:
    class Confident(FakePolicy):
        def sample(self, prompts: Any, **options: Any) -> Any:
            self.logprob = 0.0 if "from 0.000" in prompts[0].sample_id else -3.0
            return super().sample(prompts, **options)

    policy: Any = Confident(lambda identity, seed: "no" if "from 0.000" in identity else "0.00 to 1.00")
    encoder: Any = FakeEncoder()
    (found,) = ground(policy, encoder, SMALL, video, ["q"], window_s=2.0, overlap_s=0.0)
    assert found.span == pytest.approx((2.0, 3.0)) and found.windows[1].response.text == "no"
    nobody: Any = FakePolicy(lambda identity, seed: "no")
    (none,) = ground(nobody, encoder, SMALL, video, ["q"], window_s=2.0)
    assert none.span is None and none.line().startswith("no answer")


def test_windows_of_several_samples_are_ranked_by_agreement(video: Path) -> None:
    def write(identity: str, seed: int | None) -> str:
        return "0.00 to 1.00" if "from 2.000" in identity or (seed or 0) % 2 else "1.00 to 2.00"

    class Confident(FakePolicy):
        def sample(self, prompts: Any, **options: Any) -> Any:
            self.logprob = -1.0 if "from 2.000" in prompts[0].sample_id else -0.1
            return super().sample(prompts, **options)

    policy: Any = Confident(write)
    encoder: Any = FakeEncoder()
    settings = GenerationSettings(n=8, temperature=1.0)
    (found,) = ground(policy, encoder, SMALL, video, ["q"], settings=settings, window_s=2.0, overlap_s=0.0)
    assert found.span == pytest.approx((2.0, 3.0)) and found.agreement == 1.0
    assert 0 < (found.windows[1].agreement or 0) < 1


# --- with a real processor, a real decoder and a tiny random model


@pytest.fixture(scope="module")
def policy() -> HFPolicy:
    return HFPolicy(model(), processor())


def test_a_random_model_answers_something_within_the_video(policy: HFPolicy, video: Path) -> None:
    settings = GenerationSettings(max_new_tokens=6)
    encoder = PromptEncoder(processor())
    answers = ground(policy, encoder, SMALL, video, ["the red circle", "the blue square"], settings=settings)
    assert [answer.query for answer in answers] == ["the red circle", "the blue square"]
    for answer in answers:
        assert answer.span is None or 0 <= answer.span[0] < answer.span[1] <= answer.duration_s
        assert answer.line()


def test_windows_and_samples_of_a_real_model(policy: HFPolicy, video: Path) -> None:
    """The window of the whole video is the video; batches change nothing; a seed is a set of draws."""
    encoder = PromptEncoder(processor())
    queries = ["the red circle", "the blue square", "a small green triangle"]

    def run(**options: Any) -> list[GroundedAnswer]:
        settings = GenerationSettings(n=3, temperature=1.0, max_new_tokens=6, seed=options.pop("seed", 0))
        return ground(policy, encoder, SMALL, video, queries, settings=settings, **options)

    def texts(answers: list[GroundedAnswer]) -> list[list[str]]:
        return [[response.text for response in answer.samples] for answer in answers]

    whole = run()
    assert texts(run(window_s=60.0)) == texts(run(batch_size=1)) == texts(run(batch_size=100)) == texts(whole)
    assert texts(run(seed=1)) != texts(whole)
    searched = run(window_s=2.0)
    assert {len(answer.windows) for answer in searched} == {3}
    assert all(0 <= answer.agreement <= 1 for answer in searched if answer.agreement is not None)


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

    settings = GenerationSettings(n=2, temperature=1.0, max_new_tokens=5)
    rows = {}
    for batch_size in (1, 2):
        out = tmp_path / f"{batch_size}.jsonl"
        provenance = {"model": model_fingerprint(tmp_path / "model")}
        result = predict(
            policy, samples, open_loader, out, provenance=provenance, settings=settings, batch_size=batch_size
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
        VideoConfig(max_video_tokens=256, min_frame_tokens=1),
        REAL / "OHOFG.mp4",
        ["a person sits on a chair by a table."],
        settings=GenerationSettings(max_new_tokens=3),
    )[0]
    assert (answer.frames, answer.thinned) == (70, False)
    assert 0 < answer.video_tokens <= 256 and answer.video_tokens % 35 == 0  # 35 pairs of frames
    assert answer.duration_s == pytest.approx(35.2, abs=0.2)
