"""The report in Chromium: on a phone, a screen and paper, in both colour schemes, by keyboard, read aloud."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser_cases import CHROMIUM, SHIFT, Page, browser_page
from report_cases import rounds_run, whole_run

from video_opd.reports.html import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

PHONE, SCREEN, PAPER = 390, 1280, 688  # px; A4 less its margins is 688 px wide
FRAME_PX = 96
PAGES = ("run", "rounds", "comparison")

# Text whose contrast with what lies behind it is below 4.5. Backgrounds are laid over each other; opacity of
# text and its ancestors counts. Nothing here has a picture behind its text.
FAINT = """
(() => {
  const parse = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return { r, g, b, a };
  };
  const over = (top, below) => {
    const mix = (k) => top[k] * top.a + below[k] * (1 - top.a);
    return { r: mix("r"), g: mix("g"), b: mix("b"), a: 1 };
  };
  const light = ({ r, g, b }) => {
    const part = (c) => ((c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const behind = (e) => {
    if (e === null) return { r: 255, g: 255, b: 255, a: 1 };
    const own = parse(getComputedStyle(e).backgroundColor);
    return own.a === 1 ? own : over(own, behind(e.parentElement));
  };
  const faint = [], seen = { count: 0 };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || e.closest("script, title") || !e.getClientRects().length) continue;
    const svg = e instanceof SVGElement, style = getComputedStyle(e);
    let alpha = 1;
    for (let up = e; up; up = up.parentElement) alpha *= Number(getComputedStyle(up).opacity);
    const below = behind(svg ? e.ownerSVGElement.parentElement : e);
    const colour = parse(svg ? style.fill : style.color);
    const text = over({ ...colour, a: colour.a * alpha }, below);
    const [a, b] = [light(text), light(below)].sort((x, y) => y - x);
    seen.count += 1;
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < 4.5) faint.push([e.className, e.textContent.slice(0, 40), contrast]);
  }
  return seen.count > 100 ? faint : ["too little text was seen"];
})()
"""
WIDTHS = """
[...document.querySelectorAll(".film figure")].filter((f) => f.getClientRects().length)
  .map((f) => f.querySelector("img").getBoundingClientRect().width)
"""
SCROLLED = """
[...document.querySelectorAll(".scroll")].filter((box) => box.scrollWidth > box.clientWidth)
  .map((box) => [box.getAttribute("aria-label"), box.scrollWidth, box.clientWidth])
"""
CUT = """
[...document.querySelectorAll("th, td, dd, .lane small, .tile .value, h1, .query, .tokens")]
  .filter((e) => e.getClientRects().length && !e.closest("thead"))
  .filter((e) => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth + 0.5
    || e.getBoundingClientRect().left < -0.5)
  .map((e) => e.outerHTML.slice(0, 120))
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    one, two = (
        whole_run(root / "one"),
        whole_run(root / "another-run-with-a-long-name", seed=3, method="grpo"),
    )
    rounds = rounds_run(root / "rounds")
    folders = {"run": [one], "rounds": [rounds], "comparison": [one, two]}
    return {name: write_report(runs, root / f"{name}.html") for name, runs in folders.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


def open_page(browser: Page, path: Path, width: int, *, media: str = "", dark: bool = False) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=width == PHONE,
    )
    browser.requests.clear()
    browser.problems.clear()
    browser.open(path.as_uri())


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_off_and_no_frame_is_a_sliver(
    pages: dict[str, Path], browser: Page, name: str
) -> None:
    assert pages[name].stat().st_size < 10_000_000
    others = [(320, ""), (820, "")] if name == "run" else []
    for width, media in ((PHONE, ""), (SCREEN, ""), (PAPER, "print"), *others):
        open_page(browser, pages[name], width, media=media)
        if media == "":
            browser.ask("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert browser.ask("document.scrollingElement.scrollWidth <= innerWidth"), (width, media)
        frames = browser.ask(WIDTHS)
        assert frames and min(frames) >= FRAME_PX, (width, media, min(frames, default=0))
        if width in (PHONE, SCREEN, PAPER):
            assert browser.ask(CUT) == [], (width, media)
            assert browser.ask(SCROLLED) == [], (width, media)
        assert not browser.problems and all(a.startswith(("file:", "data:")) for a in browser.requests)


@pytest.mark.parametrize(
    ("name", "scheme"), [("run", "light"), ("run", "dark"), ("run", "print"), ("comparison", "dark")]
)
def test_text_can_be_read(pages: dict[str, Path], browser: Page, name: str, scheme: str) -> None:
    media = "print" if scheme == "print" else ""
    open_page(browser, pages[name], SCREEN, media=media, dark=scheme != "light")
    browser.ask("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    browser.ask("document.querySelectorAll('.about-token').forEach((e) => { e.style.display = 'block'; })")
    assert browser.ask(FAINT) == []
    page = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert (
        page
        == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 22, 28)", "print": "rgba(0, 0, 0, 0)"}[scheme]
    )


def test_paper_shows_what_is_closed(pages: dict[str, Path], browser: Page) -> None:
    open_page(browser, pages["run"], PAPER, media="print")
    closed = "[...document.querySelectorAll('details')]"
    heights = f"{closed}.map((d) => d.lastElementChild.getBoundingClientRect().height)"
    assert browser.ask(f"{closed}.length") >= 3 and min(browser.ask(heights)) > 40
    assert browser.ask(f"{closed}.every((d) => d.querySelector('pre, td, .lane').checkVisibility())")
    # How to operate the page is for the screen alone.
    operate = "[...document.querySelectorAll('.operate')].map((e) => [e.textContent, e.checkVisibility()])"
    told = browser.ask(operate)
    assert any("Hover" in text for text, _ in told) and any("Point at a token" in text for text, _ in told)
    assert not any(visible for _, visible in told)
    browser.ask("dispatchEvent(new Event('beforeprint'))")  # browsers that do not know that rule
    assert browser.ask(f"{closed}.every((d) => d.open)")
    browser.ask("dispatchEvent(new Event('afterprint'))")
    assert not browser.ask(f"{closed}.some((d) => d.open)")


# --- by keyboard


def focused(browser: Page) -> str:
    return browser.ask("document.activeElement.id")


def test_tab_goes_through_everything_in_order_and_is_seen(pages: dict[str, Path], browser: Page) -> None:
    open_page(browser, pages["run"], SCREEN)
    wanted = browser.ask(
        "[...document.querySelectorAll('summary, .tokens')].filter((e) => e.checkVisibility())"
        ".map((e) => (e.querySelector('button.token') || e).id)"
    )
    seen = []
    style = "getComputedStyle(document.activeElement)"
    for _ in wanted:
        browser.press("Tab")
        seen.append(focused(browser))
        ring = f"{style}.outlineStyle === 'solid' && parseFloat({style}.outlineWidth) >= 2"
        assert browser.ask(ring), seen[-1]
    assert seen == wanted and len(wanted) > 20 and sum(name.startswith("token-") for name in wanted) > 16
    browser.press("Tab", SHIFT)
    assert focused(browser) == wanted[-2]


def test_a_token_shows_both_models_on_focus_and_under_the_pointer(
    pages: dict[str, Path], browser: Page
) -> None:
    open_page(browser, pages["run"], PHONE)
    shown = "[...document.querySelectorAll('.about-token')].filter((e) => e.checkVisibility())"
    assert browser.ask(f"{shown}.length") == 0
    browser.ask("document.querySelector('button.token').focus()")
    first = focused(browser)
    assert browser.ask(f"{shown}.map((e) => e.id)") == [first.replace("token", "about")]
    text = browser.ask(f"{shown}[0].textContent")
    assert "signal" in text and "student gives it" in text and "teacher gives it" in text
    assert text.count("likeliest:") == 2
    for key, move in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", None), ("Home", 0)):
        browser.press(key)
        there = browser.ask("[...document.activeElement.parentElement.querySelectorAll('button')].indexOf("
                            "document.activeElement)")  # fmt: skip
        count = browser.ask("document.activeElement.parentElement.querySelectorAll('button').length")
        assert there == (count - 1 if move is None else move)
        assert browser.ask(f"{shown}.length") == 1
        # It stands below its token, inside of the page.
        below = (
            f"{shown}[0].getBoundingClientRect().top >= document.activeElement.getBoundingClientRect().bottom"
        )
        assert browser.ask(below)
        assert browser.ask(f"{shown}[0].getBoundingClientRect().right <= innerWidth")
    assert browser.ask("document.scrollingElement.scrollWidth <= innerWidth")
    browser.press("Escape")
    assert browser.ask(f"{shown}.length") == 0 and focused(browser) == first
    browser.press("ArrowRight")
    assert browser.ask(f"{shown}.length") == 1
    browser.ask("document.activeElement.blur()")
    assert browser.ask(f"{shown}.length") == 0
    place = browser.ask(
        "(() => { const r = document.getElementById('token-3').getBoundingClientRect();"
        " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    browser.wait(f"{shown}.length === 1")
    assert browser.ask(f"{shown}[0].id") == "about-3"
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    # Tab leaves the response, and comes back to the token that had the focus.
    browser.ask("document.getElementById('token-3').focus()")
    browser.press("Tab")
    assert not browser.ask(
        "document.getElementById('token-3').parentElement.contains(document.activeElement)"
    )
    browser.press("Tab", SHIFT)
    assert focused(browser) == "token-3"


# --- read aloud


def tree(browser: Page) -> list[dict[str, Any]]:
    """The role, name and level of everything that assistive technology is told, in order."""
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    browser.call("Accessibility.disable")
    by_id = {node["nodeId"]: node for node in nodes}
    found, stack = [], [nodes[0]]
    while stack:
        node = stack.pop()
        stack += [by_id[i] for i in reversed(node.get("childIds", ())) if i in by_id]
        if not node.get("ignored"):
            properties = {p["name"]: p["value"].get("value") for p in node.get("properties", ())}
            name = node.get("name", {}).get("value", "")
            found.append({"role": node["role"]["value"], "name": name, "level": properties.get("level")})
    return found


@pytest.mark.parametrize(
    ("name", "width"), [("run", PHONE), ("run", SCREEN), ("rounds", PHONE), ("comparison", PHONE)]
)
def test_everything_has_a_role_and_a_name(
    pages: dict[str, Path], browser: Page, name: str, width: int
) -> None:
    open_page(browser, pages[name], width)
    browser.ask("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    nodes = tree(browser)

    def named(role: str) -> list[str]:
        return [node["name"] for node in nodes if node["role"] == role]

    assert len(named("main")) == len(named("contentinfo")) == 1
    regions = named("region")
    assert len(regions) > 6 and all(regions)
    levels = [node["level"] for node in nodes if node["role"] == "heading"]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), [
        n for n in nodes if n["role"] == "heading"
    ]
    pictures = [*named("image"), *named("img")]
    assert len(pictures) > 40 and all(pictures)
    charts = [text for text in pictures if ". " in text and not text.startswith("frame")]
    assert len(charts) >= 6 and all(len(text.split(". ", 1)[1]) > 10 for text in charts)
    assert all(named("table")) and all(named("columnheader")) and all(named("rowheader"))
    # On a phone, too, where the display of a table's parts is another.
    for role, selector in (("columnheader", "thead th"), ("rowheader", "tbody th"), ("cell", "td")):
        shown = f"[...document.querySelectorAll('{selector}')].filter((e) => e.getClientRects().length)"
        assert len(named(role)) == browser.ask(f"{shown}.length") > 10, role
    assert all(named("button")) and all(named("DisclosureTriangle") or ["x"])
    if name == "comparison":
        assert "Differences from one" in [n["name"] for n in nodes if n["role"] == "heading"]
