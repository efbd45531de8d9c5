"""``video-opd score``: TVDF's measurements of the rows of a pool."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from video_opd.cli.arguments import add_shared, check_engine, positive
from video_opd.cli.output import print_json
from video_opd.cli.parser import MODEL_SETTINGS, Parser
from video_opd.errors import UserError
from video_opd.progress import is_first_process
from video_opd.terminal import print_line
from video_opd.types import MIN_TEACHER_IOU, ForTopK

if TYPE_CHECKING:
    from video_opd.models.inference import InferenceConfig, TeacherInferenceConfig

HELP = "TVDF scores: how well teacher and student answer each row; repeated, it continues"
EXAMPLE = (
    "video-opd score --student models/base --teacher models/teacher --data pool.jsonl --out scores.jsonl"
)
SETTINGS = (
    *MODEL_SETTINGS,
    *("teacher.dtype", "teacher.quantization", "teacher.placement", "teacher.other_template"),
    "vllm.",
    *("teacher.urls", "teacher.fingerprint", "teacher.send", "teacher.wait_s"),
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="names student, teacher and data")
    parser.add_argument("--student", metavar="M", help="the student's model folder")
    parser.add_argument(
        "--teacher",
        metavar="M",
        help="the teacher's (its type: --teacher.dtype), or its servers by --teacher.urls; without either, "
        "only the student is scored, for gaussian",
    )
    parser.add_argument("--data", metavar="D.jsonl", help="the pool: rows to choose from later")
    parser.add_argument("--out", writes="file", required=True, metavar="S.jsonl", help="the scores file")
    parser.add_argument("--k", type=positive, default=4, metavar="K", help="responses a model; default: 4")
    parser.add_argument("--student-k", type=positive, metavar="K", help="the student's; default: as --k")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    parser.add_argument(
        "--reverse-kl", action="store_true", help="also measure it along the student's responses"
    )
    parser.add_argument(
        "--teacher-from",
        action="append",
        default=[],
        metavar="S.jsonl",
        help="take the teacher's scores from this file; may be given several times",
    )
    parser.add_argument(
        "--for-topk",
        type=positive,
        metavar="K",
        help="let the teacher answer only rows that select --strategy topk --k K (or fewer) can choose",
    )
    parser.add_argument(
        "--min-teacher-iou",
        type=float,
        metavar="X",
        help=f"with --for-topk: the gate of that selection (or a lower one); default: {MIN_TEACHER_IOU:g}",
    )
    add_shared(
        parser,
        "--device",
        "--engine",
        "--max-new-tokens",
        "--seed",
        "--overwrite",
        "--batch-size",
        "--video-root",
        "--json",
    )


def run(arguments: argparse.Namespace) -> None:
    check_engine(arguments.engine, arguments.overrides)
    for_topk = _for_topk(arguments)
    student, teacher, data, video_root = _inputs(arguments)
    from video_opd.curriculum.lazy_scores import TopKScoreResult
    from video_opd.curriculum.pool import score_pool
    from video_opd.curriculum.scores import ScoreSettings
    from video_opd.data.annotations import read_samples
    from video_opd.processes import Processes

    samples = read_samples(data, arguments.video_root or video_root)
    settings = ScoreSettings(
        k=arguments.k,
        student_k=arguments.student_k,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        thinking=student.prompt.thinking,
        reverse_kl=arguments.reverse_kl,
    )
    result = score_pool(
        student,
        teacher,
        samples,
        arguments.out,
        settings=settings,
        for_topk=for_topk,
        batch_size=arguments.batch_size,
        device=arguments.device,
        engine=arguments.engine,
        teacher_from=arguments.teacher_from,
        overwrite=arguments.overwrite,
        processes=Processes.of_environment(),
    )
    if not is_first_process():
        return
    if arguments.json:
        print_json({**asdict(result), "out": arguments.out})
        return
    scored = f"{arguments.out}: {result.kept + result.scored} of {len(samples)} rows scored"
    print_line(
        scored + (f", {result.answered} by the teacher" if isinstance(result, TopKScoreResult) else "")
    )


def _for_topk(arguments: argparse.Namespace) -> ForTopK | None:
    gate = arguments.min_teacher_iou
    if arguments.for_topk is None:
        if gate is not None:
            raise UserError("--min-teacher-iou belongs to --for-topk; full scores leave the gate to select")
        return None
    if arguments.reverse_kl:
        raise UserError(
            "--reverse-kl asks the teacher about every row, --for-topk does not: leave out either"
        )
    if gate is not None and not gate <= 1:
        raise UserError(f"--min-teacher-iou is {gate:g}, and a mean IoU is at most 1")
    return ForTopK(k=arguments.for_topk, min_teacher_iou=MIN_TEACHER_IOU if gate is None else max(gate, 0.0))


def _inputs(
    arguments: argparse.Namespace,
) -> tuple[InferenceConfig, TeacherInferenceConfig | None, str, str | None]:
    """``(student, teacher, data file, video root)``, from the recipe or from the options.

    The teacher is shown what the student is shown. It is None where no teacher is named.
    """
    if arguments.recipe and any((arguments.student, arguments.teacher, arguments.data)):
        raise UserError("a RECIPE names student, teacher and data: leave the options out, or the recipe")
    if not arguments.recipe and not (arguments.student and arguments.data):
        raise UserError("score needs a RECIPE, or --student and --data (and --teacher, for TVDF)")
    from video_opd.config import load_recipe

    if arguments.recipe:
        from video_opd.curriculum.pool import inference_configs

        of_vllm, others = _without_vllm(arguments.overrides)
        recipe = load_recipe(arguments.recipe, others)
        student, teacher = inference_configs(recipe)
        student = student.changed(**of_vllm)
        teacher = None if teacher is None else teacher.changed(**of_vllm)
        return student, teacher, recipe.data.train, recipe.data.video_root
    from video_opd.models.inference import read_inference_pair

    of_teacher = [word for word in arguments.overrides[::2] if word.startswith("--teacher.")]
    served = "--teacher.urls" in of_teacher
    if "--teacher.path" in of_teacher or (of_teacher and not (arguments.teacher or served)):
        raise UserError(f"{of_teacher[0]}: without a RECIPE the teacher is named by --teacher M")
    pair = read_inference_pair(arguments.student, arguments.teacher, arguments.overrides, arguments.device)
    return *pair, arguments.data, None


def _without_vllm(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(vLLM's settings, which no recipe has; the others, as they are)."""
    from video_opd.config.tree import apply_overrides

    of_vllm: list[str] = []
    others: list[str] = []
    words = iter(overrides)
    for word in words:
        own = of_vllm if word.startswith("--vllm.") else others
        own += [word] if "=" in word else [word, *itertools.islice(words, 1)]
    found = apply_overrides({}, of_vllm).get("vllm", {})
    return {f"vllm.{name}": value for name, value in found.items()}, others
