"""The page of ``ground --view``: its structure as text; in a browser, by the keyboard, if there is one."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_cases import CHROMIUM, SHIFT, Page, browser_page
from video_cases import write_video

from video_opd.data.stills import stills
from video_opd.data.video import probe
from video_opd.errors import UserError
from video_opd.grounding.page import PageVideo, check_page, write_page

EVIL = "<img src=x onerror=alert(1)> \"quoted\" & 'single' </script><script>alert(2)</script> {{ 7*7 }}"


def record(query: str, span: tuple[float, float] | None, **changes: Any) -> dict[str, Any]:
    base = {
        "query": query,
        "span": span,
        "line": f"line of {query}",
        "samples": [],
        "windows": [],
        "window": [0, 8],
    }
    return {**base, **changes}


ANSWERS = [
    record("the cup falls", (2.0, 3.5)),
    record(EVIL, None, line=f"no answer: the model wrote {EVIL!r}"),
    record(
        "the cat",
        (4.0, 6.0),
        samples=[{"span": [4.0, 6.0]}, {"span": [4.0, 6.0]}, {"span": [5.0, 6.0]}, {"span": None}],
        windows=[{}, {}],
        window=[4.0, 8.0],
    ),
]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> PageVideo:
    path = write_video(tmp_path_factory.mktemp("view") / "a film#1.mp4", 80)  # 8 s; a name that needs quoting
    return video_of(path)


def video_of(path: Path) -> PageVideo:
    info = probe(path)
    frames = stills(path, 24)
    return PageVideo(path=path, codec=info.codec, fps=info.fps, duration_s=info.duration_s, frames=frames)


class Tags(HTMLParser):
    """Every element with its attributes, and the text of some."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "i"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.found if t == tag and attributes.items() <= a.items()]

    def one(self, tag: str, **attributes: str) -> dict[str, str | None]:
        (found,) = self.all(tag, **attributes)
        return found


def test_the_page_is_whole_and_fetches_nothing(video: PageVideo, tmp_path: Path) -> None:
    page = Tags(write_page(tmp_path / "p.html", video, ANSWERS, model="m").read_text())
    source = page.one("video")["src"] or ""
    assert base64.b64decode(source.removeprefix("data:video/mp4;base64,")) == video.path.read_bytes()
    addresses = [
        v for _, a in page.found for k, v in a.items() if k in ("src", "href", "srcset", "poster", "action")
    ]
    assert len(addresses) > 20 and all((v or "").startswith("data:") for v in addresses)
    assert not page.all("link") and not page.all("iframe") and not page.all("object")
    assert not any("url(" in text or "@import" in text for text in page.texts["style"])
    (script,) = page.texts["script"]
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"})["content"] or ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?://", script)


def test_text_is_escaped(video: PageVideo, tmp_path: Path) -> None:
    text = write_page(tmp_path / "p.html", video, ANSWERS, model=EVIL).read_text()
    page = Tags(text)
    assert len(page.all("script")) == 1 and not page.all("img", src="x")
    assert EVIL in page.texts["span"] and not any("onerror" in a for _, a in page.found)
    assert (page.one("button", id="answer-2")["aria-label"] or "").endswith(EVIL)
    assert "{{ 7*7 }}" in text  # not evaluated


def test_every_control_says_what_it_is(video: PageVideo, tmp_path: Path) -> None:
    page = Tags(write_page(tmp_path / "p.html", video, ANSWERS).read_text())
    assert page.one("html")["lang"] == "en"
    slider = page.one("div", role="slider")
    assert (slider["tabindex"], slider["aria-valuemin"], slider["aria-valuemax"]) == ("0", "0", "8.000")
    assert slider["aria-label"] and slider["aria-valuetext"] == "00:00.00 of 00:08.00"
    assert page.one("span", role="status")
    labels = [a["aria-label"] for a in page.all("button", **{"class": "answer"})]
    assert labels[0] == "Answer 1, from 00:02.00 to 00:03.50: the cup falls"
    assert (labels[1] or "").startswith("Answer 2, none: ")
    assert all("alt" in a for a in page.all("img"))
    assert ":focus-visible" in "".join(page.texts["style"])


def test_bars_are_where_the_answers_are(video: PageVideo, tmp_path: Path) -> None:
    page = Tags(write_page(tmp_path / "p.html", video, ANSWERS).read_text())
    bars = {(a["class"] or ""): a["style"] for a in page.all("i")}
    assert bars["bar fill-run-a"] == "left:25.000%;width:18.750%"  # 2 to 3.5 of 8 s
    assert bars["bar fill-run-c outlined"] == "left:50.000%;width:25.000%"
    assert bars["window"] == "left:50.000%;width:50.000%"
    samples = [a["style"] for a in page.all("i", **{"class": "sample fill-run-c"})]
    assert samples == [
        "left:50.000%;width:25.000%;opacity:0.57",  # two of four
        "left:62.500%;width:12.500%;opacity:0.36",
    ]
    assert page.one("button", id="answer-1") | {"data-start": "2.000", "data-end": "3.500"} == page.one(
        "button", id="answer-1"
    )
    assert "data-start" not in page.one("button", id="answer-2")
    strip = [a for a in page.all("img") if "data-time" in a]
    shown = [a for a in strip if "hidden" not in a]
    assert len(strip) == 24 and len(shown) == 12
    widths = [float(re.findall(r"width:([\d.]+)%", a["style"] or "")[0]) for a in shown]
    assert sum(widths) == pytest.approx(100, abs=0.1)


def test_a_large_video_is_linked_from_where_the_page_is(video: PageVideo, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "p.html"
    text = write_page(out, video, ANSWERS, embed_mb=0.001).read_text()
    page = Tags(text)
    link = page.one("video")["src"] or ""
    assert link == page.one("a")["href"] and link.endswith("a%20film%231.mp4") and "://" not in link
    assert "not inside this page" in text and len(text) < 400_000


def test_what_browsers_do_not_play_is_shown_as_frames(tmp_path: Path) -> None:
    other = video_of(write_video(tmp_path / "v.avi", 40, codec="mpeg4"))
    page = Tags(write_page(tmp_path / "p.html", other, ANSWERS).read_text())
    assert not page.all("video") and page.one("a")["href"] == "v.avi"
    assert "hidden" not in page.one("img", id="still") and "hidden" not in page.one("p", id="notice")


def test_pictures_are_frames_of_the_video_at_their_times(video: PageVideo) -> None:
    times_s = [time_s for time_s, _ in video.frames]
    assert len(times_s) == 24 and times_s[0] == 0 and times_s[-1] == pytest.approx(7.9)
    assert np.diff(times_s) == pytest.approx(np.full(23, 7.9 / 23), abs=0.06)
    assert all(base64.b64decode(uri.partition(",")[2])[:2] == b"\xff\xd8" for _, uri in video.frames)


def test_names_of_pages_are_checked(tmp_path: Path) -> None:
    (tmp_path / "d.html").mkdir()
    for name, message in (("p.pdf", r"ends in \.html"), ("d.html", "folder")):
        with pytest.raises(UserError, match=message):
            check_page(tmp_path / name)


# --- in a browser


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


def now(page: Page) -> float:
    return float(page.ask("document.getElementById('seek').getAttribute('aria-valuenow')"))


def pressed(page: Page) -> list[str]:
    return page.ask("[...document.querySelectorAll('[aria-pressed=true]')].map((e) => e.id)")


def operate(page: Page) -> None:
    """The keys work alike with the video and with frames alone."""
    page.ask("window.kept = [], addEventListener('keydown', (e) => kept.push(e.defaultPrevented)), 0")
    for key, modifiers, time_s in (
        ("ArrowRight", 0, 1.0),
        ("ArrowRight", SHIFT, 1.1),
        ("ArrowLeft", SHIFT, 1.0),
        ("ArrowLeft", 0, 0.0),
        ("ArrowLeft", 0, 0.0),
        ("1", 0, 2.0),
        ("3", 0, 4.0),
        ("2", 0, 4.0),  # has no answer
        ("9", 0, 4.0),
        ("ArrowUp", 0, 2.0),  # passes over the one that has none
        ("ArrowUp", 0, 2.0),
        ("ArrowDown", 0, 4.0),
        ("End", 0, 8.0),
        ("Home", 0, 0.0),
        ("PageUp", 0, 8.0),
        ("PageDown", 0, 0.0),
    ):
        page.press(key, modifiers)
        assert now(page) == pytest.approx(time_s, abs=0.02), key
    assert pressed(page) == ["answer-3"]
    # Nothing is left to the browser, which would scroll the page.
    assert page.ask("kept.length") == 16 and page.ask("kept.every(Boolean)")
    page.press("2")
    assert EVIL in page.ask("document.getElementById('status').textContent")
    # Play, pause.
    label = "document.getElementById('play').textContent"
    page.press("1")
    page.press(" ")
    page.wait(f"{label} === 'Pause' && document.getElementById('seek').getAttribute('aria-valuenow') > 2.2")
    page.press(" ")
    page.wait(f"{label} === 'Play'")
    stopped = now(page)
    assert 2.2 < stopped < 8
    # A loop does not leave its answer.
    page.press("3")
    page.press("l")
    assert pressed(page) == ["loop", "answer-3"]
    page.ask(
        "window.seen = [], window.watch = setInterval(() => "
        "seen.push(Number(document.getElementById('seek').getAttribute('aria-valuenow'))), 20), 0"
    )
    page.press(" ")
    page.wait("seen.some((t, i) => i > 0 && t < seen[i - 1] - 1)")
    page.press(" ")
    seen = page.ask("clearInterval(watch), seen")
    assert min(seen) >= 3.9 and max(seen) < 7.5
    page.press("l")


@needs_browser
def test_the_video_is_operated_by_the_keyboard(video: PageVideo, tmp_path: Path, browser: Page) -> None:
    browser.requests.clear()
    browser.open(write_page(tmp_path / "p.html", video, ANSWERS).as_uri())
    browser.wait("document.getElementById('video').readyState >= 2")
    operate(browser)
    assert browser.ask("document.getElementById('video').currentTime") == pytest.approx(now(browser), abs=0.1)
    browser.press("m")
    assert browser.ask("document.getElementById('video').muted") and "mute" in pressed(browser)
    outside = [a for a in browser.requests if not a.startswith(("data:", "file:"))]
    assert not outside and not browser.problems


@needs_browser
def test_focus_goes_through_every_control_and_is_seen(
    video: PageVideo, tmp_path: Path, browser: Page
) -> None:
    browser.open(write_page(tmp_path / "p.html", video, ANSWERS).as_uri())
    focused = []
    for _ in range(7):
        browser.press("Tab")
        style = "getComputedStyle(document.activeElement)"
        focused.append(browser.ask("document.activeElement.id"))
        assert browser.ask(f"{style}.outlineStyle === 'solid' && parseFloat({style}.outlineWidth) >= 2")
    assert focused == ["play", "loop", "mute", "seek", "answer-1", "answer-2", "answer-3"]
    browser.press("Enter")
    assert now(browser) == 4.0 and pressed(browser) == ["answer-3"]
    browser.press("Enter")  # again: play
    browser.wait("!document.getElementById('video').paused")
    browser.press("Enter")
    assert browser.ask("document.getElementById('video').paused")
    browser.press("1")  # the focus goes along
    assert browser.ask("document.activeElement.id") == "answer-1" and now(browser) == 2.0


@needs_browser
@pytest.mark.parametrize("case", ["another codec", "lost file"])
def test_frames_are_operated_alike(video: PageVideo, tmp_path: Path, browser: Page, case: str) -> None:
    if case == "another codec":
        shown = video_of(write_video(tmp_path / "v.avi", 80, codec="mpeg4"))
        page = write_page(tmp_path / "p.html", shown, ANSWERS)
    else:
        path = write_video(tmp_path / "v.mp4", 80)
        page = write_page(tmp_path / "p.html", video_of(path), ANSWERS, embed_mb=0)
        path.unlink()
    browser.open(page.as_uri())
    browser.wait("!document.getElementById('still').hidden")
    operate(browser)
    browser.press("3")
    assert browser.ask("document.getElementById('still').alt").startswith("frame of the video at 00:0")
    assert browser.ask("document.getElementById('still').naturalWidth") > 0
    assert "instead" in browser.ask("document.getElementById('notice').textContent")


@needs_browser
def test_a_linked_video_is_played(video: PageVideo, tmp_path: Path, browser: Page) -> None:
    browser.open(write_page(tmp_path / "p.html", video, ANSWERS, embed_mb=0).as_uri())
    browser.wait("document.getElementById('video').readyState >= 2")
    browser.press("1")
    browser.wait("!document.getElementById('video').seeking")
    assert browser.ask("document.getElementById('video').currentTime") == pytest.approx(2.0)
