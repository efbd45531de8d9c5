"""``video-opd ground``: the answers about one video.

Everything that can be wrong is checked before the model is loaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from video_opd.cli.arguments import add_shared, positive
from video_opd.cli.output import locked_outputs, print_json_text
from video_opd.cli.parser import MODEL_SETTINGS, Output, Parser
from video_opd.errors import UserError
from video_opd.progress import log

if TYPE_CHECKING:
    from video_opd.grounding.ground import GroundedAnswer

HELP = "find when something happens in one video"
EXAMPLE = 'video-opd ground runs/a/model video.mp4 "the cup falls" --view answers.html'
SETTINGS = MODEL_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model folder")
    parser.add_argument("video", reads="file", metavar="VIDEO", help="a video file")
    parser.add_argument("query", metavar="QUERY", nargs="*", help="what to look for")
    parser.scattered = "query"
    parser.add_argument(
        "--queries", reads="file", metavar="FILE", help="more queries: one a line, or JSON Lines"
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=1,
        metavar="K",
        help="answer by the consensus of K samples; default: 1",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="default: 0 (greedy), or 1 with several samples"
    )
    parser.add_argument(
        "--window", type=float, metavar="SECONDS", help="search a long video in windows; default: whole"
    )
    parser.add_argument(
        "--overlap", type=float, metavar="S", help="seconds that windows share; default: half a window"
    )
    add_shared(parser, "--device", "--max-new-tokens", "--seed")
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="responses at a time; default: 8"
    )
    form = parser.exclusive()
    form.add_argument(
        "--format",
        choices=("text", "json", "srt", "csv"),
        help="default: text on a terminal, else json",
    )
    form.add_argument("--json", action="store_const", const="json", dest="format", help="--format json")
    parser.add_argument(
        "--view", writes="file", metavar="OUT.html", help="also write a page to look at the answers"
    )
    parser.add_argument(
        "--embed-mb",
        type=float,
        default=20.0,
        metavar="MB",
        help="the page links to larger videos instead of holding them; default: 20",
    )
    parser.add_argument("--cut", writes="file", metavar="OUT.mp4", help="also write the answer as a clip")


def run(arguments: argparse.Namespace) -> None:
    from video_opd.data.video import probe

    video = Path(arguments.video)
    duration_s = probe(video).duration_s
    queries = _queries(arguments, video)
    _windows(arguments, duration_s)
    clips = _clips(Path(arguments.cut), len(queries)) if arguments.cut else []
    _check_targets(arguments, video, clips)
    with locked_outputs([Output(str(clip), "file") for clip in clips]):
        _answer(arguments, video, duration_s, queries, clips)


def _answer(
    arguments: argparse.Namespace, video: Path, duration_s: float, queries: list[str], clips: list[Path]
) -> None:
    from video_opd.evaluation.predict import GenerationSettings
    from video_opd.grounding.ground import ground
    from video_opd.grounding.output_formats import FORMATS
    from video_opd.models.inference import load_inference_model, read_inference_config

    window_s, overlap_s = _windows(arguments, duration_s)
    config = read_inference_config(arguments.model, arguments.overrides)
    settings = GenerationSettings.choose(
        arguments.samples,
        arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        thinking=config.prompt.thinking,
    )
    model = load_inference_model(config, arguments.device)
    answers = ground(
        model.policy,
        model.encoder,
        model.budget,
        video,
        queries,
        settings=settings,
        window_s=window_s,
        overlap_s=overlap_s,
        batch_size=arguments.batch_size,
        backend=config.video.backend,
    )
    chosen = arguments.format or ("text" if sys.stdout.isatty() else "json")
    if text := FORMATS[chosen](video, answers):
        if chosen == "json":
            print_json_text(text)
        else:
            print(text, flush=True)
    if chosen == "srt":
        for answer in answers:
            if answer.span is None:
                log(f"no cue for {answer.query!r}: {answer.line()}")
    if answers[0].thinned and window_s is None:
        log(
            f"{video}: {duration_s:.1f} s are more than the video budget holds, so the model was shown "
            f"{answers[0].frames} frames; --window SECONDS searches the video in windows"
        )
    if arguments.view:
        from video_opd.api import write_page

        name = Path(arguments.model).name
        log(f"wrote {write_page(arguments.view, video, answers, model=name, embed_mb=arguments.embed_mb)}")
    _write_clips(clips, video, answers)


def _queries(arguments: argparse.Namespace, video: Path) -> list[str]:
    from video_opd.grounding.ground import check_queries
    from video_opd.grounding.query_files import read_queries

    queries = list(arguments.query)
    if arguments.queries:
        queries += read_queries(arguments.queries, video)
    elif not queries:
        raise UserError("nothing to look for: give a QUERY or --queries FILE; see video-opd ground --help")
    check_queries(queries)
    return queries


def _windows(arguments: argparse.Namespace, duration_s: float) -> tuple[float | None, float | None]:
    from video_opd.data.video import check_windows

    window_s, overlap_s = arguments.window, arguments.overlap
    if overlap_s is not None and window_s is None:
        raise UserError("--overlap is the overlap of windows: give --window SECONDS as well")
    check_windows(window_s, (window_s or 0.0) / 2 if overlap_s is None else overlap_s, duration_s)
    return window_s, overlap_s


def _check_targets(arguments: argparse.Namespace, video: Path, clips: Sequence[Path]) -> None:
    if arguments.view:
        from video_opd.grounding.page import check_page

        check_page(Path(arguments.view))
    if clips:
        from video_opd.grounding.cut import check_target

        for clip in clips:
            check_target(video, clip)


def _clips(out: Path, count: int) -> list[Path]:
    """``OUT.mp4`` for one query, ``OUT-1.mp4`` and so on for several, numbered as the queries are."""
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{number}") for number in range(1, count + 1)]


def _write_clips(clips: Sequence[Path], video: Path, answers: Sequence[GroundedAnswer]) -> None:
    """Writes a clip for each answer; ``clips`` is empty if none are wanted."""
    from video_opd.grounding.cut import cut_clip

    for target, answer in zip(clips, answers, strict=bool(clips)):
        if answer.span is None:
            log(f"{target} is not written: {answer.line()}")
            continue
        start_s, end_s = cut_clip(video, answer.span, target)
        log(f"wrote {target}: {start_s:.2f} to {end_s:.2f} s of {video.name}")
