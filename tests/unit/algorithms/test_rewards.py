"""The built-in reward against values computed by hand; user functions are found, called and checked."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from places import ROOT

from video_opd.algorithms.rewards import IoUReward, checked_reward, load_reward
from video_opd.errors import UserError
from video_opd.types import Sample

SAMPLE = Sample(id="s1", video=Path("v.mp4"), query="the cup falls", duration_s=20.0, spans=((4.0, 8.0),))
THOUGHT = "<think>It falls near 5 to 9.</think>\n"


# --- IoU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain", "aware"),
    [
        ("4.00 to 8.00", 1.0, 1.0),
        ("6 to 10", 2 / 6, 2 / 6 * 0.9 * 0.9),  # both ends 2 s off, of 20 s
        ("4 to 12", 4 / 8, 4 / 8 * 0.8),
        ("from 6 s to 10 s, I think", 2 / 6, 2 / 6 * 0.81),
        ("8 to 10", 0.0, 0.0),
        ("8 to 4", 0.0, 0.0),
        ("the cup falls", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_overlap_by_hand(text: str, plain: float, aware: float):
    assert math.isclose(IoUReward(kind="plain")(SAMPLE, text), plain, rel_tol=1e-12)
    assert math.isclose(IoUReward()(SAMPLE, text), aware, rel_tol=1e-12)  # timestamp-aware by default


def test_of_several_spans_the_best_counts():
    sample = replace(SAMPLE, spans=((0.0, 2.0), (4.0, 8.0), (15.0, 20.0)))
    assert IoUReward(kind="plain")(sample, "4 to 8") == 1.0
    assert IoUReward()(sample, "15 to 20") == 1.0
    assert math.isclose(IoUReward()(sample, "15 to 19"), 0.8 * 0.95, rel_tol=1e-12)


def test_the_best_span_is_that_of_the_reward_and_not_of_the_bare_iou():
    """[0, 10] against [0, 19.5] has the larger IoU, against [0, 5.1] the larger reward."""
    sample = replace(SAMPLE, spans=((0.0, 19.5), (0.0, 5.1)))
    first, second = 10 / 19.5 * (1 - 9.5 / 20), 0.51 * (1 - 4.9 / 20)
    assert 10 / 19.5 > 0.51 and second > first
    assert math.isclose(IoUReward()(sample, "0 to 10"), second, rel_tol=1e-12)


def test_a_weighted_sum():
    reward = IoUReward(kind="plain", iou_weight=2.0, format_weight=0.5)
    assert math.isclose(reward(SAMPLE, "6 to 10"), 2 * 2 / 6 + 0.5, rel_tol=1e-12)
    assert math.isclose(reward(SAMPLE, "6 s to 10 s"), 2 * 2 / 6, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("text", "formatted"),
    [
        ("12.54 to 17.83", 1.0),
        ("  12 to 17\n", 1.0),
        ("17 to 12", 1.0),  # the shape is right; the IoU part says that the span is not
        ("12.54 - 17.83", 0.0),
        ("12.54 to 17.83.", 0.0),
        ("The event is 12.54 to 17.83", 0.0),
        (THOUGHT + "12.54 to 17.83", 0.0),
        ("", 0.0),
    ],
)
def test_the_format_is_the_whole_response(text: str, formatted: float):
    assert IoUReward(iou_weight=0.0, format_weight=1.0)(SAMPLE, text) == formatted


@pytest.mark.parametrize(
    ("text", "formatted", "overlap"),
    [
        (THOUGHT + "4 to 8", 1.0, 1.0),
        ("\n" + THOUGHT + "4 to 8\n", 1.0, 1.0),
        ("<think></think>4 to 8", 1.0, 1.0),
        ("<think>a\nb</think>4 to 8", 1.0, 1.0),
        (THOUGHT + "from 4 to 8", 0.0, 1.0),
        ("4 to 8", 0.0, 0.0),  # no thought, no answer
        ("It falls.</think>4 to 8", 0.0, 1.0),  # never opened
        ("<think>It falls. 4 to 8", 0.0, 0.0),  # never closed
        ("Well. <think>It falls.</think>4 to 8", 0.0, 1.0),
        ("<think>a</think><think>b</think>4 to 8", 0.0, 1.0),
        ("<think>a<think>b</think>4 to 8", 0.0, 1.0),
        ("<think>a</think>b</think>4 to 8", 0.0, 1.0),
        ("<think>4 to 8</think>", 0.0, 0.0),
    ],
)
def test_the_format_of_a_thinking_response(text: str, formatted: float, overlap: float):
    assert IoUReward(iou_weight=0.0, format_weight=1.0, thinking=True)(SAMPLE, text) == formatted
    assert IoUReward(kind="plain", thinking=True)(SAMPLE, text) == overlap


@pytest.mark.parametrize(
    ("text", "formatted"),
    [
        ("It falls.</think>\n\n4 to 8", 1.0),
        ("<think>It falls.</think>4 to 8", 0.0),  # opened twice
        ("It falls.</think>b</think>4 to 8", 0.0),
        ("It falls. 4 to 8", 0.0),  # never closed
    ],
)
def test_a_thinking_checkpoint_begins_inside_its_thought(text: str, formatted: float):
    """Its prompt ends with <think>."""
    reward = IoUReward(iou_weight=0, format_weight=1, thinking=True, opened=True)
    assert reward(SAMPLE, text) == formatted


def test_a_long_thought_is_read_in_linear_time():
    reward = IoUReward(iou_weight=0.0, format_weight=1.0, thinking=True)
    assert reward(SAMPLE, "<think>" + "<" * 200_000 + "</think>4 to 8") == 1.0
    assert reward(SAMPLE, "<think>" * 20_000 + "</think>4 to 8") == 0.0


@pytest.mark.parametrize("duration_s", [None, 0.0, math.nan])
@pytest.mark.parametrize("text", ["4 to 8", "no idea"])
def test_without_a_duration_the_sample_is_named(duration_s: float | None, text: str):
    sample = replace(SAMPLE, duration_s=duration_s)
    with pytest.raises(UserError, match=r"'s1'.*duration.*plain"):
        IoUReward()(sample, text)
    assert IoUReward(kind="plain")(sample, "4 to 8") == 1.0


def test_without_an_annotation_the_sample_is_named():
    for reward in (IoUReward(), IoUReward(kind="plain")):
        with pytest.raises(UserError, match="'s1' has no spans"):
            reward(replace(SAMPLE, spans=()), "4 to 8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "iuo"}, "'iuo'; choose one of timestamp_aware, plain"),
        ({"iou_weight": -1.0}, "iou_weight is -1.0"),
        ({"format_weight": math.nan}, "format_weight is nan"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        IoUReward(**settings)


# --- the user's own function -------------------------------------------------------------------------


def test_a_function_of_a_file_relative_to_the_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Short:\n"
        "    limit: int = 10\n"
        "    def __call__(self, sample, text):\n"
        "        return 1.0 if len(text) < self.limit else 0.0\n"
        "short = Short()\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = load_reward("rewards/mine.py:short")
    assert checked_reward(reward, SAMPLE, "4 to 8") == 1.0
    assert checked_reward(reward, SAMPLE, "4 to 8, or so it seems") == 0.0
    assert load_reward(f"{tmp_path}/rewards/mine.py:short")(SAMPLE, "4 to 8") == 1.0


def test_a_function_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a_reward_package").mkdir()
    (tmp_path / "a_reward_package" / "__init__.py").touch()
    (tmp_path / "a_reward_package" / "inner.py").write_text(
        "def f(sample, text):\n    return sample.duration_s\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_reward("a_reward_package.inner:f")(SAMPLE, "") == 20.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mine.py", "write package.module:function or file.py:function"),
        ("mine.py:", "write package.module:function or file.py:function"),
        (":f", "write package.module:function or file.py:function"),
        ("absent.py:f", "absent.py cannot be imported .FileNotFoundError"),
        ("no_such_package.rewards:f", "cannot be imported .ModuleNotFoundError.*of an installed package"),
        (".relative:f", "cannot be imported"),
        ("broken.py:f", "broken.py cannot be imported .ZeroDivisionError"),
        ("unreadable.py:f", "unreadable.py cannot be imported .SyntaxError"),
        ("mine.py:g", r"it has no g; name a function \(sample, text\)"),
        ("mine.py:LIMIT", "LIMIT in it is a int; name a function"),
        ("math:pi", "pi in it is a float; name a function"),
    ],
)
def test_what_cannot_be_loaded(path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text("LIMIT = 3\ndef f(sample, text):\n    return 1.0\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "unreadable.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_reward(path)
    assert repr(path) in str(caught.value)
    assert "video_opd_reward_broken" not in sys.modules


@pytest.mark.parametrize("value", [0.5, 1, 0, -2.5, True, np.float32(0.5)])
def test_a_number_is_a_float(value: Any):
    measured = checked_reward(lambda sample, text: value, SAMPLE, "4 to 8")
    assert type(measured) is float and measured == value


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, "0.5", (0.5,), 1j])
def test_anything_else_is_an_error_that_names_the_sample(value: Any):
    def mine(sample: Sample, text: str) -> Any:
        return value

    with pytest.raises(UserError, match=r"'s1'.*mine returned .*'4 to 8'; it must return a finite number"):
        checked_reward(mine, SAMPLE, "4 to 8")


def test_what_the_function_itself_raises_is_not_hidden():
    def mine(sample: Sample, text: str) -> float:
        raise KeyError("speed")

    with pytest.raises(KeyError, match="speed"):
        checked_reward(mine, SAMPLE, "4 to 8")


def test_rewards_import_no_torch():
    code = "import sys, video_opd.algorithms.rewards; assert 'torch' not in sys.modules"
    source = str(ROOT / "src")
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": source})
