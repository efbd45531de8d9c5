"""Scores of candidates: means against hand-made ones, reuse of the teacher, kills, the reverse KL."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from answer_cases import FakeLoader, FakePolicy, make_samples
from model_cases import mixed_prompts, model, processor
from training_cases import in_processes

from video_opd.config import SelectionConfig
from video_opd.curriculum.lazy_scores import score_for_topk
from video_opd.curriculum.pool import LazyShardedPolicy
from video_opd.curriculum.samplers import select
from video_opd.curriculum.score_files import read_scores
from video_opd.curriculum.scores import ScoreResult, ScoreSettings, score
from video_opd.errors import UserError
from video_opd.models.placed_teachers import ShardedPolicy
from video_opd.models.policy import HFPolicy
from video_opd.processes import Processes
from video_opd.seeds import derive_seed
from video_opd.temporal import iou, parse_answer
from video_opd.types import ForTopK

PROVENANCE = {"student": "s", "teacher": "t", "input": {"fps": 2.0}}


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


def good(sample_id: str, seed: int | None) -> str:
    return "5.00 to 10.00"


def wavering(sample_id: str, seed: int | None) -> str:
    """Right, half right, reversed, or speechless, by the seed."""
    return ["5.00 to 10.00", "5.00 to 7.50", "10.00 to 5.00", "well"][(seed or 0) % 4]


def run(out: Path, count: int = 6, **more: Any) -> tuple[ScoreResult, FakePolicy, FakePolicy]:
    student, teacher = FakePolicy(wavering, logprob=-0.5), FakePolicy(good, logprob=-2.0)
    more.setdefault("provenance", PROVENANCE)
    loader = more.pop("loader", FakeLoader())
    samples = more.pop("samples", make_samples(count))
    return score(student, teacher, samples, loader, out, batch_size=2, **more), student, teacher


def test_ious_are_means_and_unparsed_counts_zero(tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    result, student, _ = run(out, settings=ScoreSettings(k=3, student_k=8))
    assert result == ScoreResult(kept=0, scored=6, failed=0, unannotated=0, reused=0)
    kinds = set()
    for row in rows_of(out).values():
        assert row["teacher_iou"] == 1.0 and len(row["teacher_spans"]) == 3
        assert len(row["student_responses"]) == len(row["student_rules"]) == len(row["student_spans"]) == 8
        spans = [parse_answer(text).span for text in row["student_responses"]]
        assert row["student_spans"] == [None if span is None else list(span) for span in spans]
        assert row["student_iou"] == pytest.approx(sum(iou(span, (5.0, 10.0)) for span in spans) / 8)
        assert "reverse_kl" not in row
        kinds |= set(row["student_rules"])
    assert kinds == {"exact", "none"}
    assert {call["n"] for call in student.calls} == {8}
    assert read_scores(out)["s0"].teacher_iou == 1.0


def test_student_and_teacher_draw_different_numbers(tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    both = FakePolicy(lambda i, seed: f"{(seed or 0) % 1000}.00 to 2000.00")
    score(both, both, make_samples(2), FakeLoader(), out, provenance=PROVENANCE)
    for row in rows_of(out).values():
        assert row["student_responses"] != row["teacher_responses"]


def test_reverse_kl_is_mean_and_sum_over_the_students_tokens(tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    run(out, settings=ScoreSettings(k=2, reverse_kl=True))
    for row in rows_of(out).values():
        tokens = [len(text) for text in row["student_responses"]]
        assert [len(gaps) for gaps in row["reverse_kl_tokens"]] == tokens
        assert row["reverse_kl"] == pytest.approx(-0.5 - -2.0)  # nats a token
        assert row["reverse_kl_sum"] == pytest.approx(1.5 * sum(tokens) / 2)
    assert read_scores(out)["s1"].reverse_kl == pytest.approx(1.5)


def test_rows_without_annotation(tmp_path: Path) -> None:
    samples = make_samples(3)
    samples[1] = replace(samples[1], spans=())
    result, _, _ = run(tmp_path / "a.jsonl", samples=samples)
    assert (result.scored, result.unannotated) == (2, 1)
    result, _, _ = run(tmp_path / "b.jsonl", samples=samples, settings=ScoreSettings(reverse_kl=True))
    assert (result.scored, result.unannotated) == (3, 0)
    row = rows_of(tmp_path / "b.jsonl")["s1"]
    assert (
        row["teacher_iou"] is None and row["student_iou"] is None and row["reverse_kl"] == pytest.approx(1.5)
    )


def test_a_kill_loses_nothing_and_only_the_rest_is_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, undisturbed = tmp_path / "s.jsonl", tmp_path / "u.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(out, 12, loader=FakeLoader(kill_after=9))
    finished = set(rows_of(out))
    assert len(finished) == 8
    loader = FakeLoader(failing=["s11"])
    result, _, _ = run(out, 12, loader=loader)
    assert (result.kept, result.scored, result.failed) == (8, 3, 1)
    assert not finished & set(loader.opened[0])
    assert "8 of 12 rows are there, 4 to score" in capsys.readouterr().err
    run(out, 12)
    run(undisturbed, 12)
    assert rows_of(out) == rows_of(undisturbed)


def test_another_model_or_setting_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    run(out)
    with pytest.raises(UserError, match="student"):
        run(out, provenance={**PROVENANCE, "student": "trained"})
    with pytest.raises(UserError, match=r"teacher_answers\.n"):
        run(out, settings=ScoreSettings(k=5))
    assert run(out, settings=ScoreSettings(k=5), overwrite=True)[0].scored == 6


def test_the_teachers_part_is_made_once(tmp_path: Path) -> None:
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    run(first, 4)
    trained = {**PROVENANCE, "student": "trained"}
    result, student, teacher = run(second, 6, provenance=trained, teacher_from=[first])
    assert result.reused == 4 and result.scored == 6
    assert sorted(i for call in teacher.calls for i in call["ids"]) == ["s4", "s5"]
    assert len([i for call in student.calls for i in call["ids"]]) == 6
    before, after = rows_of(first), rows_of(second)
    assert all(after[i]["teacher_responses"] == before[i]["teacher_responses"] for i in before)
    assert all(row["teacher_iou"] == 1.0 for row in after.values())
    with pytest.raises(UserError, match="teacher"):
        run(tmp_path / "3.jsonl", provenance={**PROVENANCE, "teacher": "other"}, teacher_from=[first])
    with pytest.raises(UserError, match="another 'teacher_dtype'"):
        run(
            tmp_path / "3.jsonl", provenance={**PROVENANCE, "teacher_dtype": "bfloat16"}, teacher_from=[first]
        )
    with pytest.raises(UserError, match="another 'teacher_quantization'"):
        run(
            tmp_path / "3.jsonl",
            provenance={**PROVENANCE, "teacher_quantization": "int8"},
            teacher_from=[first],
        )
    with pytest.raises(UserError, match="teacher_answers"):
        run(tmp_path / "4.jsonl", settings=ScoreSettings(k=2), teacher_from=[first])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("reverse_kl", [False, True])
def test_each_model_reads_a_prompt_once(tmp_path: Path, reverse_kl: bool, temperature: float) -> None:
    settings = ScoreSettings(k=2, reverse_kl=reverse_kl, temperature=temperature)
    first = tmp_path / "1.jsonl"
    _, student, teacher = run(first, 6, settings=settings)
    for policy in (student, teacher):
        assert sorted(i for ids in policy.read for i in ids) == [f"s{i}" for i in range(6)]
        assert len(policy.read) == 3  # batches
    # Scores that another file knows are read for the reverse KL only; the models are asked nothing.
    trained = {**PROVENANCE, "student": "trained"}
    second = tmp_path / "2.jsonl"
    samples = [*make_samples(7)[5:], *make_samples(5)]
    _, student, teacher = run(
        second, provenance=trained, teacher_from=[first], settings=settings, samples=samples
    )
    assert sorted(i for call in teacher.calls for i in call["ids"]) == ["s6"]
    read = ["s6"] if not reverse_kl else [f"s{i}" for i in range(7)]
    assert sorted(i for ids in teacher.read for i in ids) == read
    assert sorted(i for ids in student.read for i in ids) == [f"s{i}" for i in range(7)]
    before, after = rows_of(first), rows_of(second)
    assert all(after[i]["teacher_responses"] == before[i]["teacher_responses"] for i in before)
    assert all((row.get("reverse_kl") == pytest.approx(1.5)) == reverse_kl for row in after.values())


def test_real_models_see_each_video_once_a_batch(tmp_path: Path) -> None:
    """Two models, k responses each and the reverse KL: one forward a level of the tree, then responses."""
    prompts = mixed_prompts()
    samples = [replace(s, id=p.sample_id) for s, p in zip(make_samples(3), prompts, strict=True)]
    student, teacher = (HFPolicy(model(seed), processor()) for seed in (0, 1))
    passes: dict[str, list[int]] = {"student": [], "teacher": []}
    tokens: dict[str, list[tuple[int, ...]]] = {"student": [], "teacher": []}
    for name, policy in (("student", student), ("teacher", teacher)):
        policy.model.model.visual.register_forward_pre_hook(
            lambda _, args, name=name: passes[name].append(len(args[0]))
        )
        policy.model.model.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: tokens[name].append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
    settings = ScoreSettings(k=2, student_k=3, reverse_kl=True, max_new_tokens=4, temperature=0.8)
    out = tmp_path / "s.jsonl"
    score(
        student,
        teacher,
        samples,
        lambda todo: list(zip(todo, prompts, strict=True)),
        out,
        provenance=PROVENANCE,
        settings=settings,
    )
    patches = sum(len(p.tensors["pixel_values_videos"]) for p in prompts[:2])  # the third shows the second's
    assert passes == {"student": [patches], "teacher": [patches]}
    for name, k in (("student", 3), ("teacher", 2)):
        (videos, _), (queries, _), *written = tokens[name]
        assert (videos, queries) == (2, 3)
        assert written[:-1] == [(3, k)] * (len(written) - 1)  # k responses to a prompt, side by side
        rows, columns = written[-1]  # the student's three, scored
        assert rows == 3 and columns % 3 == 0 and columns <= 3 * 3  # at most max_new_tokens - 1 each
    # And the figures are those of the plain engine, one prompt at a time.
    fresh = [HFPolicy(model(seed), processor(), "plain") for seed in (0, 1)]
    for row, prompt in zip(rows_of(out).values(), prompts, strict=True):
        seeds = [[derive_seed(0, "score student", prompt.sample_id, j) for j in range(3)]]
        (group,) = fresh[0].sample([prompt], n=3, max_new_tokens=4, temperature=0.8, seeds=seeds)
        assert [r.text for r in group] == row["student_responses"]
        ours, theirs = (p.logprobs([prompt], [[r.token_ids for r in group]]).logprobs_BT for p in fresh)
        for j, gaps in enumerate(row["reverse_kl_tokens"]):
            torch.testing.assert_close(torch.tensor(gaps), (ours - theirs)[j, : len(gaps)], atol=1e-4, rtol=0)


def test_a_teacher_in_shards_of_two_processes_scores_as_a_whole_one(tmp_path: Path) -> None:
    """One process has the rows of a video that is asked twice, the other those of one; then all, and lazily.
    The last start has nothing left to ask, and loads no teacher."""
    prompts = mixed_prompts()
    places = [Path("b.mp4"), Path("a.mp4"), Path("a.mp4")]
    samples = [
        replace(sample, id=prompt.sample_id, video=place)
        for sample, prompt, place in zip(make_samples(3), prompts, places, strict=True)
    ]
    prompt_of = {prompt.sample_id: prompt for prompt in prompts}
    loaded: list[int] = []

    def load() -> ShardedPolicy:
        loaded.append(1)
        return ShardedPolicy(model(1), processor(), device=torch.device("cpu"))

    def scored(folder: Path, processes: Processes | None, teacher: Any) -> list[Any]:
        shared: dict[str, Any] = {"provenance": PROVENANCE, "processes": processes, "batch_size": 2}

        def loader(todo: Any) -> Any:
            return [(sample, prompt_of[sample.id]) for sample in todo]

        settings = ScoreSettings(k=2, student_k=1, max_new_tokens=6, temperature=0.8)
        for name in ("full", "full"):
            with_kl = replace(settings, reverse_kl=True)
            out = folder / name
            score(
                HFPolicy(model(0), processor()), teacher(), samples, loader, out, settings=with_kl, **shared
            )
        for _ in range(2):
            blocks = nullcontext(HFPolicy(model(0), processor())), nullcontext(teacher())
            topk = ForTopK(k=2, min_teacher_iou=0.0)
            out = folder / "lazy"
            score_for_topk(*blocks, samples, loader, out, for_topk=topk, settings=settings, **shared)
        return [rows_of(folder / name) for name in ("full", "lazy")]

    def work(processes: Processes) -> Any:
        return scored(tmp_path / "two", processes, lambda: LazyShardedPolicy(load)), len(loaded)

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    whole = scored(tmp_path / "one", None, lambda: HFPolicy(model(1), processor()))
    for (full, lazy), times in in_processes(2, work, tmp_path):
        assert times == 2 and lazy == whole[1]
        for identity, row in whole[0].items():
            assert full[identity].keys() == row.keys()
            for key in row:
                mine, theirs = full[identity][key], row[key]
                if key.startswith("reverse_kl"):
                    mine, theirs = torch.tensor(mine), torch.tensor(theirs)
                    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
                else:
                    assert mine == theirs, key


def test_greedy_needs_one_answer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="greedy"):
        run(tmp_path / "s.jsonl", settings=ScoreSettings(temperature=0.0))
    assert not (tmp_path / "s.jsonl").exists()
    _, student, _ = run(tmp_path / "s.jsonl", settings=ScoreSettings(k=1, temperature=0.0))
    assert {call["temperature"] for call in student.calls} == {0.0}


def test_without_a_teacher_only_the_student_is_scored(tmp_path: Path) -> None:
    """Scores of the student alone are enough for GRPO's choice by difficulty (eqs 30–31)."""
    out = tmp_path / "s.jsonl"
    student = FakePolicy(wavering)
    score(student, None, make_samples(4), FakeLoader(), out, provenance={**PROVENANCE, "teacher": None})
    assert all("teacher_iou" not in row and row["student_iou"] >= 0 for row in rows_of(out).values())
    scores = list(read_scores(out).values())
    assert select(scores, SelectionConfig(strategy="gaussian", k=2)).candidates == 4
    assert select(scores, SelectionConfig(k=2)).candidates == 0  # δ needs both
    for more in ({"settings": ScoreSettings(reverse_kl=True)}, {"teacher_from": [out]}):
        with pytest.raises(UserError, match="name the teacher"):
            score(student, None, make_samples(4), FakeLoader(), out, provenance=PROVENANCE, **more)
