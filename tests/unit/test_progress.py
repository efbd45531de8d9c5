"""Progress: on stderr, from one process only, and never in the way of the work."""

from __future__ import annotations

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from video_opd import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds as ``time.monotonic`` tells them; a test moves them on."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_every_ten_seconds_and_at_the_end(capsys, clock) -> None:
    for _ in progress.track(range(40), "reading"):
        clock[0] += 1.0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "reading: 10/40, 10 s, about 30 s left",
        "reading: 20/40, 20 s, about 20 s left",
        "reading: 30/40, 30 s, about 10 s left",
        "reading: 40/40, 40 s",
    ]


def test_notes_and_unknown_totals(capsys, clock) -> None:
    with progress.task("training") as bar:
        clock[0] += 11
        bar.advance(3, note="loss 0.5")
    assert capsys.readouterr().err.splitlines() == ["training: 3, 11 s, loss 0.5", "training: 3, 11 s"]


def test_other_processes_are_silent(capsys, monkeypatch, clock) -> None:
    monkeypatch.setenv("RANK", "1")
    progress.log("hello")
    assert list(progress.track([1, 2], "x")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_bars_nest_and_leave_room_for_messages(monkeypatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    seen = []
    for i in progress.track([1, 2], "outer"):
        for j in progress.track("ab", "inner"):
            seen.append((i, j))
        progress.log(f"[bold]done {i}[/bold]")
    assert seen == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    text = terminal.getvalue()
    assert "outer" in text and "inner" in text and "[bold]done 2[/bold]" in text
    assert progress._Bars.live is None  # the terminal is given back


def test_a_failure_inside_gives_the_terminal_back(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError), progress.task("x", 3):
        raise ValueError
    assert progress._Bars.live is None


@given(st.floats(0, 1e6))
def test_durations_are_right_to_their_last_unit(seconds: float) -> None:
    text = progress.duration(seconds)
    units = {"s": 1, "min": 60, "h": 3600}
    words = text.split()
    told = sum(int(number) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert abs(told - seconds) <= (0.5 if seconds < 3599 else 60)
