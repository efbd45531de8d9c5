"""Lazy scores against full ones: the same rows, the same selection, kills, other k, several processes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from answer_cases import FakeLoader, FakePolicy, make_samples
from training_cases import in_processes

from video_opd.config import SelectionConfig
from video_opd.curriculum.lazy_scores import TopKScoreResult, score_for_topk
from video_opd.curriculum.scores import ScoreSettings, score
from video_opd.curriculum.tvdf import explain_file, select_file
from video_opd.data.annotations import write_rows
from video_opd.errors import UserError
from video_opd.processes import Processes
from video_opd.types import EncodedPrompt, ForTopK, Sample

PROVENANCE = {"student": "s", "teacher": "t", "input": {"fps": 2.0}}
SETTINGS = ScoreSettings(k=2, student_k=3)
COUNT = 160
TOPK = ForTopK(k=6, min_teacher_iou=0.5)


def respond(skill: float, sample_id: str, seed: int | None) -> str:
    """A span that overlaps the annotation, 5 s to 10 s, by an amount that is drawn for row and seed."""
    draws = random.Random(f"{sample_id} {seed}")
    share = random.Random(f"{sample_id} {skill}").random() ** (1 / skill) * draws.choice([1.0, 0.5])
    return f"5.00 to {5 + 5 * share:.1f}0"


def teacher_text(sample_id: str, seed: int | None) -> str:
    return respond(3.0, sample_id, seed)


def student_text(sample_id: str, seed: int | None) -> str:
    return respond(1.0, sample_id, seed)


def trained_text(sample_id: str, seed: int | None) -> str:
    return respond(1.5, sample_id, seed)


class Turn(FakePolicy):
    """A policy that is in memory only during its block. ``events`` tells the order of all of them."""

    def __init__(self, name: str, text: Any, events: list[str]) -> None:
        super().__init__(text)
        self.name, self.events = name, events

    @contextmanager
    def block(self) -> Iterator[Turn]:
        self.events.append(f"{self.name} in")
        yield self
        self.events.append(f"{self.name} out")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lazily(
    out: Path, samples: Sequence[Sample] | None = None, *, student: Any = student_text, **more: Any
) -> tuple[TopKScoreResult, Turn, Turn]:
    events: list[str] = []
    policies = Turn("student", student, events), Turn("teacher", teacher_text, events)
    arguments: dict[str, Any] = {
        "make_loader": FakeLoader(),
        "for_topk": TOPK,
        "provenance": PROVENANCE,
        "settings": SETTINGS,
        "batch_size": 2,
        **more,
    }
    loader = arguments.pop("make_loader")
    samples = make_samples(COUNT) if samples is None else samples
    blocks = [policy.block() for policy in policies]
    result = score_for_topk(blocks[0], blocks[1], samples, loader, out, **arguments)
    assert events == ["student in", "student out", "teacher in", "teacher out"]
    return result, *policies


def asked(policy: FakePolicy) -> list[str]:
    return [row for call in policy.calls for row in call["ids"]]


def fully(out: Path, samples: Sequence[Sample] | None = None, **more: Any) -> dict[str, dict[str, Any]]:
    samples = make_samples(COUNT) if samples is None else samples
    arguments: dict[str, Any] = {"provenance": PROVENANCE, "settings": SETTINGS, "batch_size": 2, **more}
    student, teacher = FakePolicy(student_text), FakePolicy(teacher_text)
    score(student, teacher, samples, FakeLoader(), out, **arguments)
    return {row["id"]: row for row in rows_of(out)}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("full") / "s.jsonl"
    fully(out)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "d.jsonl"
    rows = [
        {"id": s.id, "video": str(s.video), "query": s.query, "spans": [list(span) for span in s.spans]}
        for s in make_samples(COUNT)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def lazy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lazy") / "s.jsonl"
    lazily(out)
    return out


def test_rows_are_those_of_full_scores_without_the_answers_that_do_not_matter(
    full: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.jsonl"
    result, student, teacher = lazily(out)
    complete = {row["id"]: row for row in rows_of(full)}
    assert [row["id"] for row in rows_of(out)] == [sample.id for sample in make_samples(COUNT)]
    answered = set(asked(teacher))
    assert len(asked(student)) == COUNT and len(answered) == len(asked(teacher)) < COUNT
    for row in rows_of(out):
        if row["id"] in answered:
            assert list(row.items()) == list(complete[row["id"]].items())
        else:
            assert row.pop("for_topk") == {"k": 6, "min_teacher_iou": 0.5}
            assert row == {k: v for k, v in complete[row["id"]].items() if not k.startswith("teacher")}
    assert asdict(result) == {
        "kept": 0,
        "scored": COUNT,
        "failed": 0,
        "unannotated": 0,
        "reused": 0,
        "answered": len(answered),
        "needed": result.needed,
    }
    assert result.needed <= result.answered < COUNT / 2
    settings = SelectionConfig(k=6)
    chosen, _ = select_file(data, full, settings)
    found, summary = select_file(data, out, settings)
    assert found == chosen and summary.not_asked == COUNT - len(answered)
    assert {path.name for path in tmp_path.iterdir()} == {"s.jsonl", "s.jsonl.meta.json"}
    # A second start asks nobody.
    before = out.read_bytes()
    result, student, teacher = lazily(out)
    assert (result.kept, result.scored) == (COUNT, 0) and not student.calls and not teacher.calls
    assert out.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_the_queries_on_a_video_are_prefilled_together(tmp_path: Path) -> None:
    samples = [replace(s, video=Path(f"{int(s.id[1:]) // 5}.mp4")) for s in make_samples(COUNT)]
    _, _, teacher = lazily(tmp_path / "s.jsonl", samples, batch_size=5)
    opened = [row for batch in teacher.read for row in {int(i[1:]) // 5 for i in batch}]
    assert len(opened) <= 1.25 * len(set(opened)) < 0.8 * len(asked(teacher))


def test_a_killed_pass_goes_on_and_ends_the_same(lazy: Path, tmp_path: Path) -> None:
    draws = random.Random(0)
    for trial in range(8):
        out = tmp_path / f"{trial}.jsonl"
        kills = 0
        while not out.exists():
            loader = FakeLoader(kill_after=draws.randrange(1, 60) if kills < 6 else None)
            try:
                lazily(out, make_loader=loader, repeatable=bool(trial % 2))
            except KeyboardInterrupt:
                kills += 1
                assert kills <= 6
        assert kills
        assert out.read_bytes() == lazy.read_bytes()
        assert json.loads(Path(f"{out}.meta.json").read_text())["for_topk"] == asdict(TOPK)
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".json"}


def test_a_larger_k_extends_the_file(full: Path, data: Path, lazy: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.jsonl"
    out.write_bytes(lazy.read_bytes())
    Path(f"{out}.meta.json").write_bytes(Path(f"{lazy}.meta.json").read_bytes())
    known = {row["id"] for row in rows_of(out) if "teacher_iou" in row}
    result, student, teacher = lazily(out, for_topk=ForTopK(k=20, min_teacher_iou=0.7))
    assert not student.calls and result.kept == COUNT
    assert asked(teacher) and not known & set(asked(teacher))
    for k, gate in ((20, 0.7), (20, 0.5), (6, 0.7), (6, 0.0)):
        settings = SelectionConfig(k=k, min_teacher_iou=gate)
        assert select_file(data, out, settings)[0] == select_file(data, full, settings)[0]
    # Full scores have nothing to extend; and they are not made of lazy ones unnoticed.
    copy = tmp_path / "f.jsonl"
    copy.write_bytes(full.read_bytes())
    Path(f"{copy}.meta.json").write_bytes(Path(f"{full}.meta.json").read_bytes())
    assert not lazily(copy)[2].calls and copy.read_bytes() == full.read_bytes()
    with pytest.raises(UserError, match=r"was made with for_topk\.k = 20"):
        fully(out)


def test_another_student_or_setting_is_refused(lazy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was made with student = 's', this is 'trained'"):
        lazily(lazy, provenance={**PROVENANCE, "student": "trained"})
    with pytest.raises(UserError, match=r"teacher_answers\.n"):
        lazily(lazy, settings=ScoreSettings(k=5, student_k=3))
    with pytest.raises(UserError, match="reverse KL"):
        lazily(tmp_path / "r.jsonl", settings=ScoreSettings(reverse_kl=True))
    # Also while it is being made.
    out = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        lazily(out, make_loader=FakeLoader(kill_after=50))
    with pytest.raises(UserError, match="was made with student = 's', this is 'trained'"):
        lazily(out, provenance={**PROVENANCE, "student": "trained"})
    assert lazily(out, overwrite=True)[0].scored == COUNT


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"strategy": "dsus"}, "strategy dsus needs the scores of all rows"),
        ({"strategy": "gaussian", "min_teacher_iou": 0.5}, "strategy gaussian needs"),
        ({"k": 40}, "first 40 with min_teacher_iou 0.5: extend the file, .*--for-topk 40"),
        ({"min_teacher_iou": 0.95}, "could be among the first 6 with min_teacher_iou 0.95"),
    ],
)
def test_other_selections_are_refused(
    lazy: Path, data: Path, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=rf"cannot be among the first 6 .* 0\.5; .*{expected}"):
        select_file(data, lazy, SelectionConfig(**{"k": 6, **settings}))


def test_selections_that_the_scores_are_enough_for(
    full: Path, lazy: Path, data: Path, tmp_path: Path
) -> None:
    """The bound decides, not the wording: fewer rows, a lower gate, the student's part alone."""
    for settings in (
        SelectionConfig(k=3),
        SelectionConfig(k=6, min_teacher_iou=0.0),
        SelectionConfig(k=30, strategy="gaussian"),
    ):
        found, chosen = (select_file(data, scores, settings)[0] for scores in (lazy, full))
        assert [row["id"] for row in found] == [row["id"] for row in chosen]
    # Without the rows that were selected, others could be.
    best = {row["id"] for row in select_file(data, full, SelectionConfig(k=6))[0]}
    with pytest.raises(UserError, match="could be among the first 6"):
        select_file(data, lazy, SelectionConfig(k=6), exclude=best)
    with pytest.raises(UserError, match="score without --for-topk"):
        explain_file(data, lazy, 6)
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"id": "a", "student_iou": 0.5, "for_topk": {"k": "six"}}\n')
    with pytest.raises(UserError, match=r'b\.jsonl:1: "for_topk" must be'):
        select_file(data, broken, SelectionConfig(k=6))


def test_answers_of_earlier_files_are_extended_as_the_student_changes(
    lazy: Path, data: Path, tmp_path: Path
) -> None:
    out, trained = tmp_path / "2.jsonl", {**PROVENANCE, "student": "trained"}
    known = {row["id"]: row for row in rows_of(lazy) if "teacher_iou" in row}
    result, student, teacher = lazily(out, student=trained_text, provenance=trained, teacher_from=[lazy])
    assert len(asked(student)) == COUNT and not known.keys() & set(asked(teacher))
    assert result.reused == len(known) and result.answered == len(known) + len(asked(teacher))
    assert all(
        row["teacher_responses"] == known[row["id"]]["teacher_responses"]
        for row in rows_of(out)
        if row["id"] in known
    )
    alone = tmp_path / "alone.jsonl"
    lazily(alone, student=trained_text, provenance=trained)
    settings = SelectionConfig(k=6)
    assert select_file(data, out, settings)[0] == select_file(data, alone, settings)[0]
    with pytest.raises(UserError, match="another 'teacher'"):
        lazily(tmp_path / "3.jsonl", provenance={**PROVENANCE, "teacher": "other"}, teacher_from=[lazy])


def test_rows_without_annotation_or_video(full: Path, tmp_path: Path) -> None:
    samples = make_samples(COUNT)
    samples[3] = replace(samples[3], spans=())
    out = tmp_path / "s.jsonl"
    result, _, _ = lazily(out, samples, make_loader=FakeLoader(failing=["s7", "s8"]))
    assert (result.scored, result.failed, result.unannotated) == (COUNT - 3, 2, 1)
    assert not {"s3", "s7", "s8"} & {row["id"] for row in rows_of(out)}

    class Vanishing(FakeLoader):
        """The video of a row that the teacher must answer cannot be read a second time."""

        def __call__(self, samples: Sequence[Sample]) -> Any:
            self.failing = {lowest} if len(self.opened) else set()
            return super().__call__(samples)

    complete = {row["id"]: row["student_iou"] for row in rows_of(full)}
    lowest = min(complete, key=lambda row: (complete[row], row))
    out = tmp_path / "v.jsonl"
    lazily(out, make_loader=Vanishing())
    row = next(row for row in rows_of(out) if row["id"] == lowest)
    assert "teacher_iou" not in row and "for_topk" not in row  # asked, without an answer
    lazily(out)
    assert next(row for row in rows_of(out) if row["id"] == lowest)["teacher_iou"] >= 0


@pytest.mark.parametrize("repeatable", [False, True])
def test_two_processes_ask_the_same_rows(lazy: Path, tmp_path: Path, repeatable: bool) -> None:
    out = tmp_path / "s.jsonl"

    def work(processes: Processes) -> Any:
        result, student, teacher = lazily(out, processes=processes, repeatable=repeatable)
        return [result.answered, asked(student), asked(teacher)]

    one, two = in_processes(2, work, tmp_path)
    assert one[0] == two[0] and not set(one[1]) & set(two[1]) and not set(one[2]) & set(two[2])
    assert min(len(one[2]), len(two[2])) > 0.3 * one[0]
    assert out.read_bytes() == lazy.read_bytes()
    assert Path(f"{out}.meta.json").read_bytes() == Path(f"{lazy}.meta.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"s.jsonl", "s.jsonl.meta.json"}


class DyingLoader(FakeLoader):
    """Is killed after so many prompts, however often it is opened."""

    def __init__(self, prompts: int) -> None:
        super().__init__()
        self.left = prompts

    def __call__(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, EncodedPrompt]]:
        for item in super().__call__(samples):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            yield item


def corrected() -> list[Sample]:
    """The rows after somebody annotated every third one anew."""
    new = ((0.0, 6.0), (12.0, 20.0))
    return [replace(s, spans=new) if i % 3 == 0 else s for i, s in enumerate(make_samples(COUNT))]


@pytest.fixture
def corrected_data(tmp_path: Path) -> Path:
    path = tmp_path / "corrected.jsonl"
    write_rows(path, corrected())
    return path


def test_scores_are_compared_with_annotations_that_were_corrected_since(
    full: Path, data: Path, corrected_data: Path, tmp_path: Path
) -> None:
    """No model is asked, and the selection is that of scores which were made with the new annotations."""
    anew = fully(tmp_path / "anew.jsonl", corrected())
    changed = sum(
        any(row[key] != anew[row["id"]][key] for key in ("teacher_iou", "student_iou"))
        for row in rows_of(full)
    )
    assert changed > COUNT / 5
    for settings in (SelectionConfig(k=6), SelectionConfig(k=COUNT, min_teacher_iou=0)):
        found, summary = select_file(corrected_data, full, settings)
        wanted, of_new = select_file(corrected_data, tmp_path / "anew.jsonl", settings)
        assert found == wanted and (summary.judged_again, of_new.judged_again) == (changed, 0)
        assert summary.delta_after == of_new.delta_after
    assert explain_file(corrected_data, full, 6) == explain_file(corrected_data, tmp_path / "anew.jsonl", 6)
    assert select_file(data, full, SelectionConfig(k=6))[1].judged_again == 0
    with pytest.raises(UserError, match="could be among the first 6"):  # rows that were out may be in by now
        lazily(tmp_path / "old.jsonl")
        select_file(corrected_data, tmp_path / "old.jsonl", SelectionConfig(k=6))


@pytest.mark.parametrize("teacher", [{"teacher_responses": None}, {"teacher_spans": [[0.0, 1.0]]}])
def test_scores_of_other_tools_are_taken_as_they_are(
    teacher: dict[str, Any], full: Path, corrected_data: Path, tmp_path: Path
) -> None:
    """Without responses, or with spans of some of them only, nobody knows what an IoU is the mean of."""
    other = [{**row, **teacher, "student_responses": None} for row in rows_of(full)]
    scores = tmp_path / "other.jsonl"
    scores.write_text("".join(json.dumps(row) + "\n" for row in other))
    rows, summary = select_file(corrected_data, scores, SelectionConfig(k=COUNT, min_teacher_iou=0))
    stated = {row["id"]: (row["teacher_iou"], row["student_iou"]) for row in other}
    assert summary.judged_again == 0 and len(rows) == COUNT
    assert all((r["tvdf"]["teacher_iou"], r["tvdf"]["student_iou"]) == stated[r["id"]] for r in rows)


@pytest.mark.parametrize("way", ["extended", "from earlier scores", "killed"])
def test_lazy_scores_go_on_with_corrected_annotations(way: str, corrected_data: Path, tmp_path: Path) -> None:
    old, out = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    more: dict[str, Any] = {}
    if way == "killed":
        for rows in (100, 100):  # in the student's pass, and in the teacher's
            with pytest.raises(KeyboardInterrupt):
                lazily(old, make_loader=DyingLoader(rows))
        assert Path(f"{old}.teacher").exists() and not old.exists()
        out = old
    else:
        lazily(old)
        out, more = (old, {}) if way == "extended" else (out, {"teacher_from": [old]})
    lazily(out, corrected(), **more)
    fully(tmp_path / "full.jsonl", corrected())
    settings = SelectionConfig(k=6)
    found, summary = select_file(corrected_data, out, settings)
    assert found == select_file(corrected_data, tmp_path / "full.jsonl", settings)[0]
    assert summary.judged_again == 0 or way == "extended"
