"""Writes one self-contained HTML page that plays a video, shows its answers on a timeline and jumps to them.

The page fetches nothing, and a content security policy forbids the browser to. A video that is too large for
the page, or that browsers do not play, is linked by a relative path: the page then needs the file to play it,
and shows some of its frames without it. All text from data is escaped.
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

EMBED_MB = 20.0  # base64 makes it a third larger; browsers take data URIs of 32 MB or more
MIME = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm"}
# PyAV's names of the codecs that current browsers play.
PLAYED = {"h264", "vp8", "vp9", "av1", "libdav1d", "libaom-av1", "libvpx", "libvpx-vp9"}
SHOWN_FRAMES = 12  # on the timeline; the other frames are shown only if the video does not play
COLOURS = "abcdef"


@dataclass(frozen=True, kw_only=True)
class PageVideo:
    """The video that a page is about. ``frames`` are pairs of a time in seconds and a data URI."""

    path: Path
    codec: str
    fps: float
    duration_s: float
    frames: Sequence[tuple[float, str]]

    @property
    def is_played(self) -> bool:
        """Whether current browsers play this kind of file."""
        return self.codec in PLAYED and self.path.suffix.lower() in MIME


def check_page(out: Path) -> None:
    """Raises :class:`UserError` if ``out`` is not a name for an HTML file."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out}: a page is an HTML file; name one that ends in .html")
    if out.is_dir():
        raise UserError(f"{out}: this is a folder; name a file that ends in .html")


def write_page(
    out: str | Path,
    video: PageVideo,
    answers: Sequence[Mapping[str, Any]],
    *,
    model: str = "",
    embed_mb: float = EMBED_MB,
) -> Path:
    """Writes the page, and returns its path.

    ``answers`` are records as in ``video-opd ground --json``, each with a ``"line"`` for people, too. The
    page contains the video if browsers play it and it is not larger than ``embed_mb`` (10⁶ bytes). Raises
    :class:`UserError` if the page cannot be written.
    """
    out = Path(out)
    size_mb = video.path.stat().st_size / 1e6
    embedded = video.is_played and size_mb <= embed_mb
    link = quote(Path(os.path.relpath(video.path.resolve(), out.parent.resolve())).as_posix())
    if embedded:
        data = base64.b64encode(video.path.read_bytes()).decode()
        source = f"data:{MIME[video.path.suffix.lower()]};base64,{data}"
    else:
        source = link if video.is_played else ""
    notice = ""
    if not video.is_played:
        kind = f"{video.codec} in {video.path.suffix or 'a file without a name ending'}"
        notice = f"Browsers do not play this kind of video ({kind}): frames of it are shown instead."
    elif not embedded:
        notice = f"The video ({size_mb:.1f} MB) is not inside this page: keep its file where it is."
    return write_text(out, render(video, answers, model=model, source=source, notice=notice, link=link))


def render(
    video: PageVideo, answers: Sequence[Mapping[str, Any]], *, model: str, source: str, notice: str, link: str
) -> str:
    """The HTML of the page."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        # The style sheet is shared with the reports.
        loader=ChoiceLoader([PackageLoader("video_opd.grounding"), PackageLoader("video_opd.reports")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    rows = [_answer(number, answer, video.duration_s) for number, answer in enumerate(answers, start=1)]
    return environment.get_template("page.html.j2").render(
        # A linked video lies on the same disk or the same server as the page.
        content_security_policy=f"default-src 'none'; img-src data:; media-src data: 'self' file:; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        script=Markup(script),
        name=video.path.name,
        model=model,
        lead=_lead(video, answers),
        source=source,
        notice=notice,
        link=link if notice else "",
        duration={"seconds": f"{video.duration_s:.3f}", "text": clock(video.duration_s)},
        frame_s=f"{1 / video.fps:.5f}",
        frames=_strip(video),
        ticks=_ticks(video.duration_s),
        answers=rows,
        explain=_legend(answers),
        version=video_opd.__version__,
    )


def _lead(video: PageVideo, answers: Sequence[Mapping[str, Any]]) -> str:
    count = len(answers)
    found = sum(answer["span"] is not None for answer in answers)
    queries = "1 query" if count == 1 else f"{count} queries"
    return f"{queries}, {found} with an answer, in a video of {video.duration_s:.1f} s."


def _legend(answers: Sequence[Mapping[str, Any]]) -> str:
    """The legend of what the timeline shows besides the answers; empty if it shows nothing else."""
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
    """The left edge and the width, in percent of the duration."""
    return {"left": _percent(span[0], duration_s), "width": _percent(span[1] - span[0], duration_s)}


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f}"


def _strip(video: PageVideo) -> list[dict[str, Any]]:
    """All frames. Each one on the timeline extends from its own time to that of the next one there."""
    count = len(video.frames)
    shown = sorted({i * count // SHOWN_FRAMES for i in range(min(SHOWN_FRAMES, count))})
    ends_s = dict(zip(shown, [*(video.frames[i][0] for i in shown[1:]), video.duration_s], strict=True))
    return [
        {
            "uri": uri,
            "time": f"{time_s:.3f}",
            "shown": i in ends_s,
            **_place((time_s, ends_s.get(i, time_s)), video.duration_s),
        }
        for i, (time_s, uri) in enumerate(video.frames)
    ]


def _ticks(duration_s: float) -> list[dict[str, str]]:
    """The six times under the timeline, from the beginning to the end of the video."""
    times_s = [duration_s * i / 5 for i in range(6)]
    return [{"left": _percent(t, duration_s), "text": clock(t)} for t in times_s]
