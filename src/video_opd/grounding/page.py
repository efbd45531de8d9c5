"""One self-contained HTML page about the answers for one video: play it, see where they lie, jump to them.

Nothing is fetched from anywhere, and a content security policy says so to the browser. A video that is too
large to lie inside the page, or that browsers do not play, is linked relative to it; the page then needs the
file beside it for playing, and shows frames without it. Text that comes from data is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import video_opd
from video_opd.errors import UserError
from video_opd.files import write_text
from video_opd.temporal import clock

EMBED_MB = 20.0  # as text it is a third larger; browsers take data URIs of 32 MB and more
MIME = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm"}
# Names of PyAV's decoders for what current browsers play.
PLAYED = {"h264", "vp8", "vp9", "av1", "libdav1d", "libaom-av1", "libvpx", "libvpx-vp9"}
SHOWN_FRAMES = 12  # on the timeline; the others stand in for a video that does not play
COLOURS = "abcdef"


@dataclass(frozen=True, kw_only=True)
class Film:
    """The video of a page. ``frames`` are (time in seconds, data URI)."""

    path: Path
    codec: str
    fps: float
    duration_s: float
    frames: Sequence[tuple[float, str]]

    @property
    def is_played(self) -> bool:
        """Whether a browser can be expected to play it."""
        return self.codec in PLAYED and self.path.suffix.lower() in MIME


def check_page(out: Path) -> None:
    """Raises UserError for a name that no page can be written to."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out}: a page is an HTML file; name one that ends in .html")
    if out.is_dir():
        raise UserError(f"{out}: a folder; name a file that ends in .html")


def write_view(
    out: str | Path,
    film: Film,
    answers: Sequence[Mapping[str, Any]],
    *,
    model: str = "",
    embed_mb: float = EMBED_MB,
) -> Path:
    """Writes the page. ``answers`` are the records of ``ground --json``, each with its ``"line"`` for people.

    The video goes into the page if it is not larger than ``embed_mb`` (10⁶ bytes) and browsers play it.
    Raises UserError when the page cannot be written.
    """
    out = Path(out)
    size_mb = film.path.stat().st_size / 1e6
    embedded = film.is_played and size_mb <= embed_mb
    link = quote(Path(os.path.relpath(film.path.resolve(), out.parent.resolve())).as_posix())
    if embedded:
        data = base64.b64encode(film.path.read_bytes()).decode()
        source = f"data:{MIME[film.path.suffix.lower()]};base64,{data}"
    else:
        source = link if film.is_played else ""
    notice = ""
    if not film.is_played:
        kind = f"{film.codec} in {film.path.suffix or 'a file without a name ending'}"
        notice = f"Browsers do not play this kind of video ({kind}): frames of it are shown instead."
    elif not embedded:
        notice = f"The video ({size_mb:.1f} MB) is not inside this page: keep its file where it is."
    return write_text(out, render(film, answers, model=model, source=source, notice=notice, link=link))


def render(
    film: Film, answers: Sequence[Mapping[str, Any]], *, model: str, source: str, notice: str, link: str
) -> str:
    """The page as text."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        # The style sheet is the reports'.
        loader=ChoiceLoader([PackageLoader("video_opd.grounding"), PackageLoader("video_opd.reports")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rows = [_answer(number, answer, film.duration_s) for number, answer in enumerate(answers, start=1)]
    return environment.get_template("page.html.j2").render(
        # A linked video lies beside the page, on a disk or on the page's own server.
        policy=f"default-src 'none'; img-src data:; media-src data: 'self' file:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        script=Markup(script),
        name=film.path.name,
        model=model,
        lead=_lead(film, answers),
        source=source,
        notice=notice,
        link=link if notice else "",
        duration={"seconds": f"{film.duration_s:.3f}", "text": clock(film.duration_s)},
        frame_s=f"{1 / film.fps:.5f}",
        frames=_strip(film),
        ticks=_ticks(film.duration_s),
        answers=rows,
        explain=_explain(answers),
        version=video_opd.__version__,
    )


def _lead(film: Film, answers: Sequence[Mapping[str, Any]]) -> str:
    count = len(answers)
    found = sum(answer["span"] is not None for answer in answers)
    queries = "1 query" if count == 1 else f"{count} queries"
    return f"{queries}, {found} with an answer, in a video of {film.duration_s:.1f} s."


def _explain(answers: Sequence[Mapping[str, Any]]) -> str:
    """What is drawn beside the answers, if anything is."""
    words = []
    if any(answer["samples"] for answer in answers):
        words.append("Coloured: the samples, darker where more of them agree; framed: their consensus.")
    if any(answer["windows"] for answer in answers):
        words.append("Grey: the window of the video that the answer is from.")
    return " ".join(words)


def _answer(number: int, answer: Mapping[str, Any], duration_s: float) -> dict[str, Any]:
    span = answer["span"]
    counts = Counter(tuple(sample["span"]) for sample in answer["samples"] if sample["span"])
    return {
        "number": number,
        "query": answer["query"],
        "line": answer["line"],
        "spoken": "none" if span is None else f"from {clock(span[0])} to {clock(span[1])}",
        "start": None if span is None else f"{span[0]:.3f}",
        "end": None if span is None else f"{span[1]:.3f}",
        "colour": COLOURS[(number - 1) % len(COLOURS)],
        "bar": None if span is None else _place(span, duration_s),
        "window": _place(answer["window"], duration_s) if answer["windows"] else None,
        "samples": [
            {**_place(sample, duration_s), "opacity": f"{0.15 + 0.85 * count / len(answer['samples']):.2f}"}
            for sample, count in counts.items()
        ],
    }


def _place(span: Sequence[float], duration_s: float) -> dict[str, str]:
    """Left and width in percent of the duration."""
    return {"left": _percent(span[0], duration_s), "width": _percent(span[1] - span[0], duration_s)}


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f}"


def _strip(film: Film) -> list[dict[str, Any]]:
    """Every frame; those on the timeline with their place: each stands at its own time, to the next one's."""
    count = len(film.frames)
    shown = sorted({i * count // SHOWN_FRAMES for i in range(min(SHOWN_FRAMES, count))})
    ends_s = dict(zip(shown, [*(film.frames[i][0] for i in shown[1:]), film.duration_s], strict=True))
    return [
        {
            "uri": uri,
            "time": f"{time_s:.3f}",
            "shown": i in ends_s,
            **_place((time_s, ends_s.get(i, time_s)), film.duration_s),
        }
        for i, (time_s, uri) in enumerate(film.frames)
    ]


def _ticks(duration_s: float) -> list[dict[str, str]]:
    """Some six times under the timeline, the beginning and the end among them."""
    times_s = [duration_s * i / 5 for i in range(6)]
    return [{"left": _percent(t, duration_s), "text": clock(t)} for t in times_s]
