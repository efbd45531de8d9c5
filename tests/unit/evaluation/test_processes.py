"""Several processes write one output: whole videos each, nothing lost by a kill, any number the next time."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from answer_cases import FakeLoader, FakePolicy
from prediction_cases import COUNTS, PROVENANCE, SAMPLED, queries_of, rows_of, seeded
from training_cases import in_processes

from video_opd.curriculum.scores import ScoreSettings, score
from video_opd.errors import UserError
from video_opd.evaluation.output import Output
from video_opd.evaluation.predict import PredictResult, predict
from video_opd.evaluation.resume import (
    process_file_path,
    process_file_paths,
    read_provenance,
    write_provenance,
)
from video_opd.locks import locked_file
from video_opd.processes import Processes
from video_opd.types import Sample

SAMPLES = queries_of(COUNTS)
BATCH = 5


class DyingLoader(FakeLoader):
    """The process is killed, not asked to stop, when it comes to this row."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def __call__(self, samples: Sequence[Sample]) -> Iterable[Any]:
        for sample, prompt in super().__call__(samples):
            if sample.id == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield sample, prompt


def answer_all(
    out: Path, processes: Processes | None, loader: FakeLoader | None = None, **more: Any
) -> tuple[PredictResult, FakePolicy]:
    policy = FakePolicy(seeded)
    result = predict(
        policy,
        SAMPLES,
        loader or FakeLoader(),
        out,
        provenance=PROVENANCE,
        settings=SAMPLED,
        batch_size=BATCH,
        processes=processes,
        **more,
    )
    return result, policy


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("one") / "p.jsonl"
    answer_all(out, None)
    return {row["id"]: row for row in rows_of(out)}


def in_order(undisturbed: dict[str, Any]) -> list[Any]:
    return [undisturbed[sample.id] for sample in SAMPLES]


def test_shares_are_whole_videos_and_every_row_once() -> None:
    for count in (1, 2, 4, 20):
        shares = [Processes(rank=rank, count=count).share(SAMPLES) for rank in range(count)]
        assert sorted(s.id for share in shares for s in share) == sorted(s.id for s in SAMPLES)
        assert sum(len({s.video for s in share}) for share in shares) == len(COUNTS)
        assert max(len({s.video for s in share}) for share in shares) == -(-len(COUNTS) // count)


def test_two_processes_write_one_file_in_data_order(tmp_path: Path, undisturbed: dict[str, Any]) -> None:
    out = tmp_path / "p.jsonl"

    def work(processes: Processes) -> Any:
        result, policy = answer_all(out, processes, FakeLoader(failing=["s31"]))
        return [result.answered, result.failed, result.kept, [i for ids in policy.read for i in ids]]

    (*counts, first), (*others, second) = in_processes(2, work, tmp_path)
    assert counts == others == [len(SAMPLES) - 1, 1, 0]  # of both together
    assert sorted([*first, *second, "s31"]) == sorted(undisturbed)
    assert min(len(first), len(second)) > len(SAMPLES) / 4
    assert rows_of(out) == [row for row in in_order(undisturbed) if row["id"] != "s31"]
    assert process_file_paths(out) == []
    assert {path.name for path in tmp_path.iterdir()} == {"p.jsonl", "p.jsonl.meta.json"}


@pytest.mark.parametrize("again", [1, 2, 3])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_loses_nothing_and_the_number_may_change(
    tmp_path: Path, undisturbed: dict[str, Any], victim: int, again: int
) -> None:
    out = tmp_path / "p.jsonl"

    def dying(processes: Processes) -> Any:
        mine = processes.share(SAMPLES)
        loader = DyingLoader(mine[-1].id) if processes.rank == victim else FakeLoader()
        return answer_all(out, processes, loader)[0].answered

    values = in_processes(2, dying, tmp_path)
    assert values[victim] == "killed" and "another process stopped" in values[1 - victim]
    kept = {row["id"] for path in process_file_paths(out) for row in rows_of(path)}
    share = {s.id for s in Processes(rank=1 - victim, count=2).share(SAMPLES)}
    assert share < kept < set(undisturbed)  # all of the other's, some of the victim's
    with process_file_path(out, victim).open("a") as file:
        file.write('{"id": "s11", "resp')  # the kill came in the middle of a line

    def repeat(processes: Processes) -> Any:
        result, policy = answer_all(out, processes)
        return [result.kept, result.answered, [i for ids in policy.read for i in ids]]

    results = in_processes(again, repeat, tmp_path)
    assert {tuple(counts) for *counts, _ in results} == {(len(kept), len(undisturbed) - len(kept))}
    read = [i for *_, ids in results for i in ids]
    assert sorted(read) == sorted(set(undisturbed) - kept)
    assert {row["id"]: row for row in rows_of(out)} == undisturbed
    assert len(rows_of(out)) == len(undisturbed) and process_file_paths(out) == []
    if again > 1:
        assert rows_of(out) == in_order(undisturbed)


def test_a_kill_between_merge_and_removal_costs_nothing(
    tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rows = tmp_path / "p.jsonl", in_order(undisturbed)
    answer_all(out, None)
    process_file_path(out, 0).write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    result, _ = answer_all(out, None)
    assert (result.kept, result.answered) == (len(rows), 0)
    assert len(rows_of(out)) == len(rows) and process_file_paths(out) == []


def test_a_kill_during_the_merge_leaves_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "p.jsonl"
    answer_all(out, None)
    rows = out.read_text().splitlines(keepends=True)
    out.write_text("".join(rows[:3]))
    process_file_path(out, 1).write_text("".join(rows[3:8]))
    write_provenance(out, read_provenance(out), None)  # no seal holds while files are merged

    def full(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(KeyboardInterrupt):
            answer_all(out, None)
    assert len(rows_of(out)) == 3 and len(rows_of(process_file_path(out, 1))) == 5
    assert answer_all(out, None)[0].kept == 8


def test_parts_of_another_model_are_refused_or_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    answer_all(out, None)
    out.rename(process_file_path(out, 3))  # a run of several that was killed, and another file beside it
    other = tmp_path / "p.jsonl.gz"
    other.write_text("not ours")
    with pytest.raises(UserError, match=r"answers\.n.*--overwrite"):
        Output(out, {**PROVENANCE, "answers": {"n": 1}})
    assert not out.exists() and process_file_paths(out) == [process_file_path(out, 3)]
    output = Output(out, {**PROVENANCE, "answers": {"n": 1}}, overwrite=True)
    assert output.rows == {} and process_file_paths(out) == [] and other.exists()


def test_scores_are_divided_too(tmp_path: Path) -> None:
    def scored(out: Path, processes: Processes | None) -> Any:
        student, teacher = FakePolicy(seeded), FakePolicy(seeded, logprob=-2.0)
        result = score(
            student,
            teacher,
            SAMPLES,
            FakeLoader(),
            out,
            provenance={"student": "s", "teacher": "t", "input": {}},
            settings=ScoreSettings(k=2, reverse_kl=True),
            batch_size=BATCH,
            processes=processes,
        )
        return [result.scored, result.reused, result.failed, len(teacher.read)]

    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    *alone, batches = scored(one, None)
    results = in_processes(2, lambda processes: scored(two, processes), tmp_path)
    assert [counts for *counts, _ in results] == [alone, alone]
    assert all(count < batches for *_, count in results)
    expected = {row["id"]: row for row in rows_of(one)}
    assert rows_of(two) == [expected[sample.id] for sample in SAMPLES]


def test_what_the_first_process_refuses_ends_all(tmp_path: Path) -> None:
    out, busy = tmp_path / "p.jsonl", tmp_path / "busy.jsonl"
    answer_all(out, None)
    other = {**PROVENANCE, "model": "another"}

    def refused(processes: Processes) -> Any:
        Output(out, other, processes=processes)

    first, second = in_processes(2, refused, tmp_path)
    assert first == second and "choose another --out" in first
    with locked_file(busy):
        first, second = in_processes(2, lambda processes: answer_all(busy, processes)[0].kept, tmp_path)
    assert first == second and f"process {os.getpid()} on host" in first


def test_the_first_process_works_for_all_and_its_error_is_raised_in_all(tmp_path: Path) -> None:
    def work(processes: Processes) -> Any:
        def on_first() -> int:
            assert processes.first
            return os.getpid()

        def bug() -> None:
            raise KeyError("a bug")

        def wrong() -> None:
            raise UserError("wrong")

        caught = []
        for broken in (bug, wrong):
            try:
                processes.on_first(broken)
            except (KeyError, UserError) as error:
                caught.append([type(error).__name__, str(error), getattr(error, "wrong_input", None)])
        return [processes.on_first(on_first), os.getpid(), caught]

    first, second = in_processes(2, work, tmp_path)
    assert first[0] == first[1] == second[0] != second[1]
    assert first[2] == [["KeyError", "'a bug'", None], ["UserError", "wrong", None]]
    assert second[2] == [["ErrorOfFirst", "'a bug'", False], ["ErrorOfFirst", "wrong", True]]


def test_one_process_needs_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = Processes.of_environment()
    processes.wait()
    assert processes == Processes(rank=0, count=1) and processes.first
    assert processes.gather("mine") == ["mine"] and processes.on_first(lambda: 3) == 3


def test_they_wait_for_each_other(tmp_path: Path) -> None:
    def work(processes: Processes) -> Any:
        if not processes.first:
            time.sleep(0.5)
            (tmp_path / "there").touch()
        processes.wait()
        return (tmp_path / "there").exists()

    assert in_processes(2, work, tmp_path) == [True, True]


def test_several_are_connected_once_and_wait_for_as_long_as_a_stage_takes(tmp_path: Path) -> None:
    def work(processes: Processes) -> Any:
        from torch import device, distributed

        assert Processes.of_environment() == processes  # a second command of this process
        group = distributed.distributed_c10d._get_default_group()
        return [group._get_backend(device("cpu")).options._timeout.days, processes.gather(processes.rank)]

    assert in_processes(2, work, tmp_path) == [[30, [0, 1]]] * 2
