"""``video-opd select``: the curriculum's choice of training rows. It needs no torch."""

from __future__ import annotations

import argparse
from typing import get_args

from video_opd.cli.arguments import add_shared, positive
from video_opd.cli.output import print_json
from video_opd.cli.parser import NO_SETTINGS, Parser
from video_opd.errors import UserError
from video_opd.progress import log
from video_opd.types import MIN_TEACHER_IOU, UNGATED, RankBy, Strategy

HELP = "choose training rows by their scores"
EXAMPLE = (
    "video-opd select --data pool.jsonl --scores scores.jsonl --strategy topk --k 2500 --out train.jsonl"
)
SETTINGS = NO_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--data", reads="file", required=True, metavar="D.jsonl", help="the pool: rows to choose from"
    )
    parser.add_argument(
        "--scores", reads="file", required=True, metavar="S.jsonl", help="made by video-opd score"
    )
    parser.add_argument("--strategy", choices=get_args(Strategy), help="needed with --out")
    parser.add_argument("--k", required=True, type=positive, metavar="N", help="rows to choose")
    target = parser.exclusive(required=True)
    target.add_argument("--out", writes="file", metavar="OUT.jsonl", help="the chosen data rows")
    target.add_argument(
        "--explain", action="store_true", help="choose nothing: show what each gate would leave"
    )
    parser.add_argument("--rank-by", choices=get_args(RankBy), default="iou_gap", help="default: %(default)s")
    parser.add_argument(
        "--min-teacher-iou",
        type=float,
        metavar="X",
        help=f"the gate: rows below it are no candidates; default: {MIN_TEACHER_IOU:g}, or none for "
        f"{' and '.join(UNGATED)}",
    )
    parser.add_argument("--buckets", type=positive, default=5, metavar="N", help="bbds: how many; default: 5")
    parser.add_argument("--no-fill", action="store_true", help="bbds: leave short buckets short (eq 20)")
    parser.add_argument(
        "--center", type=float, metavar="c", help="gwds, gaussian: the centre; default: 0.9, 0.3"
    )
    parser.add_argument("--sigma", type=float, metavar="s", help="gwds, gaussian: the width; default: 0.2")
    add_shared(parser, "--seed", "--video-root", "--json")


def run(arguments: argparse.Namespace) -> None:
    if arguments.explain:
        _explain(arguments)
        return
    if arguments.strategy is None:
        raise UserError("select --out needs a --strategy; see video-opd select --help")
    from video_opd.config import SelectionConfig, read_settings
    from video_opd.curriculum.terminal import print_summary, warning_lines
    from video_opd.curriculum.tvdf import select_file

    names = ("k", "strategy", "rank_by", "min_teacher_iou", "buckets", "center", "sigma")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    settings = read_settings(SelectionConfig, given)
    rows, summary = select_file(
        arguments.data,
        arguments.scores,
        settings,
        seed=arguments.seed,
        fill=not arguments.no_fill,
        video_root=arguments.video_root,
        out=arguments.out,
    )
    if arguments.json:
        print_json(summary.to_json())
    else:
        print_summary(summary)
    log(f"wrote {arguments.out}")
    for line in warning_lines(summary, rows):
        log(line)


def _explain(arguments: argparse.Namespace) -> None:
    from video_opd.curriculum.terminal import print_explanation
    from video_opd.curriculum.tvdf import explain_file

    table = explain_file(arguments.data, arguments.scores, arguments.k)
    if arguments.json:
        print_json([row.to_json() for row in table])
    else:
        print_explanation(table, arguments.k)
