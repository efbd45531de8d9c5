"""What is kept of an evaluation for reports; the signal of each token against the models' own numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import encode, model, processor
from prediction_cases import rows_of
from video_cases import write_video

from video_opd.evaluation.failure_records import FRAMES, explainer, write_annotations, write_failures
from video_opd.evaluation.predict import GenerationSettings
from video_opd.models.alternatives import likeliest, text_of_token
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher
from video_opd.types import EncodedPrompt, Prediction, Sample

SETTINGS = GenerationSettings(max_new_tokens=4)


@pytest.fixture(scope="module")
def student() -> HFPolicy:
    return HFPolicy(model(0, sharpness=8.0), processor())


def response(student: HFPolicy, prompt: EncodedPrompt) -> Any:
    return student.sample([prompt], max_new_tokens=4, temperature=0.0)[0][0]


def test_a_response_is_explained_token_by_token(student: HFPolicy) -> None:
    prompt, other = encode("when?"), HFPolicy(model(1, sharpness=8.0), processor())
    decode = text_of_token(processor())
    rollout = response(student, prompt)
    found = explainer(student, LocalTeacher(other), decode, SETTINGS)([prompt], [rollout.text])[0]
    n = len(rollout.token_ids)
    assert found["tokens"] == [decode(token) for token in rollout.token_ids]
    for name, policy in (("student", student), ("teacher", other)):
        scores = policy.logprobs([prompt], [[rollout.token_ids]], full=True)
        assert scores.full_BTV is not None
        full_TV = scores.full_BTV[0].tolist()
        assert found[f"{name}_logprobs"] == pytest.approx(scores.logprobs_BT[0].tolist())
        for t in range(n):
            order = sorted(range(len(full_TV[t])), key=full_TV[t].__getitem__, reverse=True)[:3]
            assert [text for text, _ in found[f"{name}_top"][t]] == [decode(v) for v in order]
            values = [value for _, value in found[f"{name}_top"][t]]
            assert values == pytest.approx([full_TV[t][v] for v in order])
    # Greedy: the likeliest token is the one that was written. eq 5: r = log π_tea − log π_old.
    assert [top[0][0] for top in found["student_top"]] == found["tokens"]
    both = zip(found["teacher_logprobs"], found["student_logprobs"], strict=True)
    assert found["r"] == pytest.approx([teacher - own for teacher, own in both])


def test_without_a_teacher_or_its_distributions_there_is_less(student: HFPolicy) -> None:
    prompt = encode("when?")
    rollout, decode = response(student, prompt), text_of_token(processor())
    alone = explainer(student, None, decode, SETTINGS)([prompt], [rollout.text])[0]
    assert alone["teacher_logprobs"] is None and alone["r"] == [None] * len(rollout.token_ids)
    assert alone["student_top"] and alone["teacher_top"] is None
    teacher = LocalTeacher(student)
    short = explainer(student, teacher, decode, SETTINGS, distributions=False)([prompt], [rollout.text])[0]
    assert short["teacher_top"] is None and short["r"] == pytest.approx(
        [0.0] * len(rollout.token_ids), abs=1e-5
    )


def test_a_response_that_comes_out_otherwise_is_not_explained(student: HFPolicy) -> None:
    assert explainer(student, None, text_of_token(processor()), SETTINGS)([encode("when?")], ["else"]) == [{}]


def test_responses_are_explained_together_as_alone(student: HFPolicy) -> None:
    prompts = [encode("when?"), encode("when does it rain?"), encode("where?")]
    recorded = [response(student, prompt).text for prompt in prompts]
    explain = explainer(
        student,
        LocalTeacher(HFPolicy(model(1, sharpness=8.0), processor())),
        text_of_token(processor()),
        SETTINGS,
    )
    first, second, third = explain(prompts, [recorded[0], "else", recorded[2]])
    assert second == {}
    for found, prompt, text in ((first, prompts[0], recorded[0]), (third, prompts[2], recorded[2])):
        (alone,) = explain([prompt], [text])
        assert found["tokens"] == alone["tokens"]
        for key in ("student_logprobs", "teacher_logprobs", "r"):
            assert found[key] == pytest.approx(alone[key], abs=1e-4)
        for key in ("student_top", "teacher_top"):
            assert [[t for t, _ in top] for top in found[key]] == [[t for t, _ in top] for top in alone[key]]


def test_the_likeliest_tokens_of_a_small_vocabulary() -> None:
    assert likeliest(torch.tensor([[-1.0, -0.5], [-0.25, -3.0]])) == [
        [(1, -0.5), (0, -1.0)],
        [(0, -0.25), (1, -3.0)],
    ]


def test_annotations_and_failures_are_written(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 40)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    spans = {"a": ((1.0, 2.0),), "b": ((1.0, 2.0),), "c": ((1.0, 2.0),), "d": ()}
    videos = {"a": "a.mp4", "b": "broken.mp4", "c": "gone.mp4", "d": "a.mp4"}
    samples = [
        Sample(id=i, video=tmp_path / videos[i], query=f"query {i}", spans=spans[i], row={"video": videos[i]})
        for i in "abcd"
    ]
    write_annotations(samples, tmp_path / "annotations.jsonl")
    rows = rows_of(tmp_path / "annotations.jsonl")
    assert [row["id"] for row in rows] == ["a", "b", "c"] and rows[0]["video"] == "a.mp4"
    assert rows[0] | {"spans": [[1.0, 2.0]], "duration": None, "source": None} == rows[0]
    predictions = {
        i: Prediction(id=i, responses=("x",), spans=(None,), rules=("none",)) for i in ("a", "b", "c", "d")
    }
    asked: list[str] = []

    def load(wanted: Sequence[Sample]) -> Iterator[tuple[Sample, EncodedPrompt]]:
        return ((each, encode("when?")) for each in wanted if each.id != "c")

    def explain(prompts: Sequence[EncodedPrompt], texts: Sequence[str]) -> list[dict[str, Any]]:
        asked.extend(texts)
        return [{"tokens": ["x"]} for _ in prompts]

    write_failures(samples, predictions, tmp_path / "failures.jsonl", load, explain)
    first, second = rows_of(tmp_path / "failures.jsonl")  # the third has no prompt
    assert first["id"] == "a" and first["tokens"] == ["x"] and asked == ["x", "x"]
    assert len(first["frames"]) == len(first["frame_times_s"]) == FRAMES
    assert first["frame_times_s"][0] == 0 and all(
        uri.startswith("data:image/jpeg;") for uri in first["frames"]
    )
    assert second["id"] == "b" and second["frames"] == []
    write_failures(samples, {}, tmp_path / "failures.jsonl", load, explain)
    assert rows_of(tmp_path / "failures.jsonl") == []
