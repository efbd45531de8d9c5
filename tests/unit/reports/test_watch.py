"""A watched report: when it is written, what the page does, and when it ends. No test waits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser_cases import CHROMIUM, Page, browser_page

from video_opd.cli import main
from video_opd.errors import UserError
from video_opd.files import write_text
from video_opd.locks import is_being_written, locked_folder
from video_opd.reports import watch
from video_opd.reports.html import Reload, read_runs, render
from video_opd.reports.watch import has_ended, watch_report


def add_steps(folder: Path, first: int, last: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            file.write(json.dumps({"step": step, "reverse_kl/sampled": 1 / step}) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("method: video-opd\noptim:\n  lr: 0.0001\n")
    add_steps(run, 1, 2)
    return run


class Clock:
    """A sleep that does the next thing instead, and the time that it takes."""

    def __init__(self, out: Path, *actions: Callable[[], object], seconds: float = 5.0) -> None:
        self.out, self.actions, self.seconds = out, list(actions), seconds
        self.now = 1000.0
        self.pages: list[str] = []
        self.inodes: list[int] = []  # a file that is replaced gets another
        self.kept: list[int] = []  # an open file keeps its inode from being given again

    def sleep(self, seconds: float) -> None:
        assert seconds == self.seconds
        self.kept.append(os.open(self.out, os.O_RDONLY))
        self.pages.append(self.out.read_text())
        self.inodes.append(self.out.stat().st_ino)
        self.now += seconds
        self.actions.pop(0)()

    def watch(self, *folders: Path) -> str:
        watch_report(folders, self.out, self.seconds, sleep=self.sleep, now_s=lambda: self.now)
        assert not self.actions
        for file in self.kept:
            os.close(file)
        return self.out.read_text()


def nothing() -> None:
    pass


def finish(folder: Path) -> Callable[[], object]:
    return lambda: (folder / "done.json").write_text('{"steps": 3}')


def test_the_report_is_written_when_the_run_has_changed_and_ends_with_it(
    folder: Path, tmp_path: Path
) -> None:
    clock = Clock(tmp_path / "r.html", nothing, lambda: add_steps(folder, 3, 3), nothing, finish(folder))
    last = clock.watch(folder)
    assert ["2 steps" in page for page in clock.pages] == [True, True, False, False]
    assert all("3 steps" in page for page in clock.pages[2:])
    assert clock.inodes[0] == clock.inodes[1] != clock.inodes[2] == clock.inodes[3]  # not without a reason
    assert all('data-watch="5.0" data-until="1060.0"' in page for page in clock.pages[:2])
    assert "3 steps" in last and "data-watch" not in last and 'id="watched"' not in last
    assert last == render(read_runs([folder]))


def test_a_page_is_written_again_before_it_takes_itself_for_abandoned(folder: Path, tmp_path: Path) -> None:
    clock = Clock(tmp_path / "r.html", *[nothing] * 9, finish(folder))
    clock.watch(folder)
    until = [float(page.split('data-until="')[1].split('"')[0]) for page in clock.pages]
    times = [1000.0 + 5 * i for i in range(10)]
    assert all(end - now >= 30 for end, now in zip(until, times, strict=True))
    assert len(set(until)) == 2  # once in 35 seconds


def test_an_interrupt_is_a_way_to_end(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupt(seconds: float) -> None:
        assert seconds == 2.5
        raise KeyboardInterrupt

    out = tmp_path / "r.html"
    monkeypatch.setattr(watch.watch_report, "__kwdefaults__", {"sleep": interrupt, "now_s": lambda: 0.0})
    assert main(["report", str(folder), "--out", str(out), "--watch", "2.5"]) == 0
    assert "data-watch" not in out.read_text() and capsys.readouterr().out == f"{out}\n"
    assert main(["report", str(folder), "--out", str(out), "--watch", "0"]) == 2


def test_all_runs_have_to_end(folder: Path, tmp_path: Path) -> None:
    rounds = tmp_path / "rounds"
    rounds.mkdir()
    (rounds / "recipe.yaml").write_text("method: video-opd\n")
    ended = rounds / "rounds.json"
    clock = Clock(
        tmp_path / "r.html",
        finish(folder),
        lambda: ended.write_text('{"finished": fal'),
        lambda: ended.write_text('{"finished": false, "rounds": []}'),
        lambda: ended.write_text('{"finished": true, "rounds": []}'),
    )
    clock.watch(folder, rounds)


def test_a_new_round_is_seen(folder: Path, tmp_path: Path) -> None:
    def begin() -> None:
        (folder / "round-1").mkdir()
        (folder / "round-1" / "recipe.yaml").write_text("method: video-opd\n")

    clock = Clock(tmp_path / "r.html", begin, finish(folder))
    clock.watch(folder)
    assert ["Round by round" in page for page in clock.pages] == [False, True]


def test_a_finished_run_whose_folder_is_still_written_has_not_ended(folder: Path, tmp_path: Path) -> None:
    finish(folder)()
    assert has_ended(folder)
    with locked_folder(folder):
        before = (folder / ".lock").read_bytes()
        assert is_being_written(folder) and not has_ended(folder)
        assert (folder / ".lock").read_bytes() == before
    assert has_ended(folder)
    for text in ("", "[]", "{}", '{"host": 1, "pid": "x", "since": 0}'):
        (folder / ".lock").write_text(text)
        assert has_ended(folder)
    (folder / ".lock").unlink()
    os.mkfifo(folder / ".lock")
    assert has_ended(folder)


def test_a_report_that_the_run_itself_wrote_is_replaced(folder: Path) -> None:
    out = folder / "report.html"
    clock = Clock(out, lambda: out.write_text("the run's own"), nothing, finish(folder))
    clock.watch(folder)
    assert all("data-watch" in page for page in clock.pages)


def test_a_folder_that_cannot_be_read_for_a_moment_keeps_its_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = tmp_path / "away"
    clock = Clock(
        tmp_path / "r.html", lambda: folder.rename(away), lambda: away.rename(folder), nothing, finish(folder)
    )
    clock.watch(folder)
    assert all("2 steps" in page for page in clock.pages)
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such folder"):
        watch_report([away], tmp_path / "r.html", 1.0, sleep=lambda seconds: pytest.fail("slept"))


# --- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_watched_page_loads_itself_and_keeps_the_readers_place(
    folder: Path, tmp_path: Path, browser: Page
) -> None:
    out = tmp_path / "r.html"
    (folder / "environment.json").write_text('{"python": "3.11"}')
    write_text(out, render(read_runs([folder]), reload=Reload(every_s=2.5, until_s=4e9)))
    browser.problems.clear()
    # The test is the clock.
    clock = "window.timers = [], window.setTimeout = (work, ms) => timers.push([work, ms])"
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=clock)["identifier"]
    browser.open(out.as_uri())
    assert browser.ask("timers.map((timer) => timer[1])") == [2500]
    browser.ask("document.querySelector('details').open = true, scrollTo(0, 150)")
    browser.ask("document.querySelector('summary').focus({preventScroll: true})")
    # Nothing is taken away from a reader who has marked some text.
    browser.ask("getSelection().selectAllChildren(document.querySelector('h1')), timers.pop()[0]()")
    assert browser.ask("timers.length") == 1 and browser.ask("sessionStorage.length") == 0
    add_steps(folder, 3, 7)
    write_text(out, render(read_runs([folder])))  # the last page
    browser.loaded = False
    browser.ask("getSelection().removeAllRanges(), timers.pop()[0]()")
    browser.wait("document.readyState === 'complete' && document.body.textContent.includes('7 steps')")
    assert browser.ask("[...document.querySelectorAll('details')].map((d) => d.open)") == [True, False]
    assert browser.ask("scrollY") == 150
    assert browser.ask("document.activeElement.tagName") == "SUMMARY"
    assert browser.ask("timers.length") == 0 and browser.ask("sessionStorage.length") == 0
    assert not browser.problems
    browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_an_abandoned_page_stays(folder: Path, tmp_path: Path, browser: Page) -> None:
    out = tmp_path / "r.html"
    out.write_text(render(read_runs([folder]), reload=Reload(every_s=0.0, until_s=1.0)))
    browser.open(out.as_uri())
    assert "no longer" in browser.ask("document.getElementById('watched').textContent")
