"""The page of results: it is made from the files, and no sentence says more than its interval."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest
from places import ROOT

from video_opd.errors import UserError
from video_opd.reproduce import experiments
from video_opd.reproduce.claims import Claim, Difference, verdict
from video_opd.reproduce.document import REPEATED, agree, document, read_results
from video_opd.reproduce.experiments import EXPERIMENTS, SUITES, chosen, with_models

PAGE = ROOT / "docs" / "reproduction.md"
RESULTS = ROOT / "benchmarks" / "results" / "reproduction"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 3, "holds"),
        (-0.1, 3, "cannot be told at this size"),
        (0, 3, "cannot be told at this size"),
        (-3, 0, "cannot be told at this size"),
        (-3, -0.1, "does not hold"),
    ],
)
def test_a_verdict_is_what_the_interval_allows(low: float, high: float, expected: str) -> None:
    assert verdict(low, high) == expected


def check_page(text: str) -> int:
    """Checks every row of claims against the interval that it shows, by another rule; returns how many."""
    rows = re.findall(
        r"^\|.*\| ([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\] \|.*\| ([a-z ]+) \| `", text, re.M
    )
    for rise, low, high, said in rows:
        assert float(low) <= float(rise) <= float(high)
        if said == "holds":
            assert float(low) >= 0
        elif said == "does not hold":
            assert float(high) <= 0
        else:
            assert said == "cannot be told at this size" and float(low) <= 0 <= float(high)
    return len(rows)


def test_the_page_is_what_the_results_give() -> None:
    results = read_results(RESULTS, EXPERIMENTS)
    text = document(results, EXPERIMENTS, read_results(RESULTS / REPEATED, EXPERIMENTS))
    assert PAGE.read_text(encoding="utf-8") == text, "video-opd reproduce --no-runs --results … --page …"
    claims = sum(len(EXPERIMENTS[name].claims(record["result"])) for name, record in results.items())
    assert check_page(text) == claims
    for name, record in results.items():
        assert record["experiment"] == name
        assert {"commit", "machine", "seeds"} <= set(record)


def test_a_page_of_made_up_results(tmp_path: Path) -> None:
    found = [
        Claim(says="a beats b", source="table 9", where="here", difference=difference(2, 1, 3)),
        Claim(says="b beats c", source="table 9", where="there", difference=difference(-2, -3, -1)),
        Claim(says="c beats d", source="table 9", where="there", difference=difference(0.5, -1, 2)),
        Claim(says="d < e", source="table 9", where="now", difference=Difference.exact(3), score="grams"),
    ]
    experiment = cast(
        ModuleType,
        SimpleNamespace(
            NAME="t", TITLE="Table 9", SUITE="tables",
            claims=lambda record: found[: record["count"]], tables=lambda record: iter(["a table"]),
        ),
    )  # fmt: skip
    experiments = {"t": experiment, "u": cast(ModuleType, SimpleNamespace(TITLE="Table 10"))}
    record = {"machine": {"cpus": 2, "torch": "2"}, "seeds": [0, 1], "commit": None, "result": {"count": 4}}
    (tmp_path / "t.json").write_text(json.dumps(record))
    text = document(read_results(tmp_path, experiments), experiments)
    assert check_page(text) == 4
    assert "2 claims: holds, 1 claim: does not hold, 1 claim: cannot be told at this size." in text
    assert (
        "| a beats b | table 9 | here | mean IoU | +2.0 [+1.0, +3.0] | 1 of 2 seeds | holds | `video-opd"
        in text
    )
    assert "| d < e | table 9 | now | grams | +3.0 [+3.0, +3.0] | exact | holds | `video-opd" in text
    assert "## Table 9\n\nSeeds 0, 1; commit unknown; 2 CPU cores, torch 2.\n\na table" in text
    assert "## Not run\n\n* Table 10" in text
    (tmp_path / "t.json").write_text(json.dumps(record | {"commits_of_runs": ["a1b2"]}))
    text = document(read_results(tmp_path, experiments), experiments)
    assert "## Table 9\n\nSeeds 0, 1; commit unknown, runs of a1b2; 2 CPU cores" in text


def test_two_results_agree_if_each_lies_in_the_others_interval() -> None:
    one = difference(2, 1, 3)
    assert agree(one, difference(2.9, 1.9, 3.9)) and agree(one, one)
    assert not agree(one, difference(3.1, 1.9, 4.3)) and not agree(difference(3.1, 1.9, 4.3), one)
    assert not agree(one, difference(2.9, 2.5, 3.3))  # its interval is too narrow to hold 2


def test_a_repeated_result_stands_beside_the_first(tmp_path: Path) -> None:
    experiment = SimpleNamespace(
        TITLE="T", tables=lambda record: iter([]),
        leaders=lambda record: iter([("45.6", "1", "SFT", "60.0", "none")]),
        claims=lambda record: [
            Claim(says="a beats b", source="s", where="here", difference=difference(*record["values"]))
        ],
    )  # fmt: skip
    known = {"t": cast(ModuleType, experiment)}
    for folder, values in ((tmp_path, (2, 1, 3)), (tmp_path / REPEATED, (3.5, 1, 6))):
        folder.mkdir(exist_ok=True)
        record = {"machine": {"cpus": 2, "torch": "2"}, "seeds": [0], "commit": None}
        (folder / "t.json").write_text(json.dumps(record | {"result": {"values": values}}))
    first, again = read_results(tmp_path, known), read_results(tmp_path / REPEATED, known)
    text = document(first, known, again)
    assert "| a beats b | here | +2.0 [+1.0, +3.0] | +3.5 [+1.0, +6.0] | no |" in text
    assert "| a beats b | here | +2.0 [+1.0, +3.0] | +2.0 [+1.0, +3.0] | yes |" in document(
        first, known, first
    )
    assert "Repeated" not in document(first, known)
    assert "| 45.6 | 1 | SFT | 60.0 | none |" in text and check_page(text) == 1


def difference(rise: float, low: float, high: float) -> Difference:
    return Difference(rise=rise, low=low, high=high, above=1, among=2, unit="seeds")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"result": {}}', '{"result": {"levels": [1]}}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "table-1.json").write_text(text)
    with pytest.raises(UserError, match=r"table-1\.json is no result of table-1"):
        read_results(tmp_path, EXPERIMENTS)


def test_experiments_without_their_models_are_left_out_of_suites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments, "shipped", lambda name: tmp_path / name)
    needing = {module for module in EXPERIMENTS.values() if hasattr(module, "MORE_MODELS")}
    assert {module.NAME for module in needing} == {"table-3", "table-8", "figure-4"}
    assert set(with_models(chosen("all"))) == set(EXPERIMENTS.values()) - needing
    assert "left out: table-3 needs tiny-teacher-mini, which" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"table-8 needs tiny-general-base and tiny-g.*further"):
        with_models(chosen("table-8"))
    for module in needing:
        for name in module.MORE_MODELS:
            (tmp_path / name).mkdir(exist_ok=True)
    assert list(with_models(chosen("all"))) == list(EXPERIMENTS.values())


def test_suites_and_names() -> None:
    assert list(chosen("all")) == list(EXPERIMENTS.values())
    for suite in SUITES:
        assert chosen(suite)
    assert list(chosen("table-1")) == [EXPERIMENTS["table-1"]]
    with pytest.raises(UserError, match=r"no experiment or suite 'table'; choose from .*table-1"):
        chosen("table")
