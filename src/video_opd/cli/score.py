"""``video-opd score``: TVDF's measurements of the rows of a pool."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from video_opd.cli.arguments import add_shared, check_engine, positive
from video_opd.cli.output import print_json
from video_opd.cli.parser import MODEL_SETTINGS, Parser
from video_opd.errors import UserError
from video_opd.files import need_another_file
from video_opd.progress import is_first_process
from video_opd.terminal import print_line
from video_opd.types import MIN_TEACHER_IOU, ForTopK

if TYPE_CHECKING:
    from video_opd.curriculum.scores import ScoreSettings
    from video_opd.models.inference import InferenceConfig, TeacherInferenceConfig

HELP = "TVDF scores: how well teacher and student answer each row; repeated, it continues"
EXAMPLE = (
    "video-opd score --student models/base --teacher models/teacher --data pool.jsonl --out scores.jsonl"
)
# Settings that only a RECIPE has, and what stands for each where there is no recipe.
_OF_RECIPES = {
    "model.path": "--student",
    "teacher.path": "--teacher",
    "teacher.by_source": None,
    "data.train": "--data",
    "data.video_root": "--video-root",
    "data.limit": None,
    "data.cache_dir": None,
    "tvdf.teacher_k": "--k",
    "tvdf.student_k": "--student-k",
    "tvdf.temperature": "--temperature",
    "tvdf.batch_size": "--batch-size",
    # These three decide what is asked, and whom.
    "tvdf.strategy": None,
    "tvdf.rank_by": "--reverse-kl",
    "tvdf.min_teacher_iou": "--for-topk K with --min-teacher-iou",
    "sampling.max_new_tokens": "--max-new-tokens",
    "run.seed": "--seed",
}
# The flags for what a selection adds to the scores: its k, and its gate.
_FOR_TOPK = {"tvdf.k": "--for-topk K", "tvdf.min_teacher_iou": "--min-teacher-iou X with --for-topk"}
SETTINGS = (
    *MODEL_SETTINGS,
    *("teacher.dtype", "teacher.quantization", "teacher.placement", "teacher.other_template"),
    *("teacher.urls", "teacher.fingerprint", "teacher.send", "teacher.wait_s"),
    "vllm.",
    *_OF_RECIPES,
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "recipe", reads="file", nargs="?", metavar="RECIPE", help="names models, data, and how to answer"
    )
    parser.add_argument("--student", metavar="M", help="the student's model folder")
    parser.add_argument(
        "--teacher",
        metavar="M",
        help="the teacher's (its type: --teacher.dtype), or its servers by --teacher.urls; without either, "
        "only the student is scored, for gaussian",
    )
    parser.add_argument("--data", reads="file", metavar="D.jsonl", help="the pool: rows to choose from later")
    parser.add_argument("--out", writes="file", required=True, metavar="S.jsonl", help="the scores file")
    parser.add_argument("--k", type=positive, metavar="K", help="responses a model; default: the recipe's, 4")
    parser.add_argument("--student-k", type=positive, metavar="K", help="the student's; default: as --k")
    parser.add_argument("--temperature", type=float, metavar="T", help="default: the recipe's, 1")
    parser.add_argument(
        "--reverse-kl", action="store_true", help="also measure it along the student's responses"
    )
    parser.add_argument(
        "--teacher-from",
        reads="file",
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
        help="with --for-topk: the gate of that selection (or a lower one); default: the recipe's, "
        f"{MIN_TEACHER_IOU:g}",
    )
    add_shared(parser, "--device", "--engine", "--overwrite", "--video-root", "--json")
    add_shared(parser, "--max-new-tokens", default=None, help="default: the recipe's, 64")
    add_shared(parser, "--seed", default=None, help="default: the recipe's, 0")
    add_shared(parser, "--batch-size", default=None, help="responses at once; default: the recipe's, 8")


def run(arguments: argparse.Namespace) -> None:
    check_engine(arguments.engine, arguments.overrides)
    work = _from_recipe(arguments) if arguments.recipe else _from_flags(arguments)
    need_another_file("--out", arguments.out, [("data.train", work.data)])
    for_topk = _for_topk(arguments, work)
    from video_opd.curriculum.lazy_scores import TopKScoreResult
    from video_opd.curriculum.pool import score_pool
    from video_opd.data.annotations import read_samples
    from video_opd.processes import Processes

    samples = read_samples(work.data, arguments.video_root or work.video_root)[: work.limit]
    result = score_pool(
        work.student,
        work.teacher,
        samples,
        arguments.out,
        settings=work.settings,
        for_topk=for_topk,
        batch_size=arguments.batch_size or work.batch_size,
        device=arguments.device,
        engine=arguments.engine,
        cache_dir=work.cache_dir,
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


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is scored, and how. The teacher is shown what the student is shown; None: none is named."""

    student: InferenceConfig
    teacher: TeacherInferenceConfig | None
    data: str
    settings: ScoreSettings
    min_teacher_iou: float = MIN_TEACHER_IOU
    video_root: str | None = None
    limit: int | None = None
    cache_dir: str | None = None
    batch_size: int = 8


def _from_recipe(arguments: argparse.Namespace) -> _Work:
    """As ``rounds`` would score the recipe's pool, but for the flags that are given: the teacher is asked if
    the recipe's selection reads its responses, or a flag does."""
    if any((arguments.student, arguments.teacher, arguments.data)):
        raise UserError("a RECIPE names student, teacher and data: leave the options out, or the recipe")
    from video_opd.config import load_recipe
    from video_opd.curriculum.pool import inference_configs
    from video_opd.curriculum.scores import ScoreSettings

    given = [word.removeprefix("--") for word in arguments.overrides[::2]]
    for key in given:
        if not key.startswith(SETTINGS):
            _refuse_setting(key)
    of_vllm, others = _without_vllm(arguments.overrides)
    recipe = load_recipe(arguments.recipe, others)
    if getattr(recipe.teacher, "by_source", None):
        raise UserError(
            "teacher.by_source: one teacher scores a pool; score the rows of each source with its own "
            "teacher.path, and without by_source"
        )
    student, teacher = inference_configs(recipe)
    tvdf, of_topk = recipe.tvdf, arguments.for_topk is not None
    if "tvdf.min_teacher_iou" in given and not of_topk and tvdf.strategy != "gaussian":
        _refuse_setting("tvdf.min_teacher_iou")  # of gaussian, it decides whether the teacher is asked
    if not (of_topk or tvdf.asks_teacher or arguments.reverse_kl or arguments.teacher_from):
        teacher = None
    usual = ScoreSettings.of(recipe)
    if teacher is None or of_topk:
        usual = replace(usual, reverse_kl=False)
    return _Work(
        student=student.changed(**of_vllm),
        teacher=None if teacher is None else teacher.changed(**of_vllm),
        data=recipe.data.train,
        settings=_with_flags(usual, arguments),
        min_teacher_iou=tvdf.min_teacher_iou,
        video_root=recipe.data.video_root,
        limit=recipe.data.limit,
        cache_dir=recipe.data.cache_dir,
        batch_size=tvdf.batch_size,
    )


def _refuse_setting(key: str) -> NoReturn:
    hint = f"; {_FOR_TOPK[key]} is for a selection that is known" if key in _FOR_TOPK else ""
    raise UserError(f"--{key} changes no score: leave it out{hint}")


def _from_flags(arguments: argparse.Namespace) -> _Work:
    if not (arguments.student and arguments.data):
        raise UserError("score needs a RECIPE, or --student and --data (and --teacher, for TVDF)")
    from video_opd.curriculum.scores import ScoreSettings
    from video_opd.models.inference import read_inference_pair

    for word in arguments.overrides[::2]:
        key = word.removeprefix("--")
        if key.startswith("tvdf.") and key not in _OF_RECIPES:
            _refuse_setting(key)
        if key != "teacher.path" and key.startswith(tuple(_OF_RECIPES)):
            flag = _OF_RECIPES.get(key)
            instead = f"without one, give {flag}" if flag else "without one, leave it out"
            raise UserError(f"{word} is a setting of a RECIPE; {instead}")
    of_teacher = [word for word in arguments.overrides[::2] if word.startswith("--teacher.")]
    served = "--teacher.urls" in of_teacher
    if "--teacher.path" in of_teacher or (of_teacher and not (arguments.teacher or served)):
        raise UserError(f"{of_teacher[0]}: without a RECIPE the teacher is named by --teacher M")
    student, teacher = read_inference_pair(
        arguments.student, arguments.teacher, arguments.overrides, arguments.device
    )
    thinking = student.prompt.thinking
    if thinking and arguments.max_new_tokens is None:
        raise UserError(
            "the student thinks before it answers, and reasoning has no natural end: give --max-new-tokens"
        )
    settings = _with_flags(ScoreSettings(thinking=thinking), arguments)
    return _Work(student=student, teacher=teacher, data=arguments.data, settings=settings)


def _with_flags(usual: ScoreSettings, arguments: argparse.Namespace) -> ScoreSettings:
    """The settings with those of the flags that are given. ``--k`` is for both models."""
    names = ("k", "student_k", "temperature", "max_new_tokens", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.k is not None:
        given.setdefault("student_k", None)
    return replace(usual, **given, reverse_kl=arguments.reverse_kl or usual.reverse_kl)


def _for_topk(arguments: argparse.Namespace, work: _Work) -> ForTopK | None:
    gate = arguments.min_teacher_iou
    if arguments.for_topk is None:
        if gate is not None:
            raise UserError("--min-teacher-iou belongs to --for-topk; full scores leave the gate to select")
        return None
    if work.settings.reverse_kl:
        raise UserError(
            "--reverse-kl asks the teacher about every row, --for-topk does not: leave out either"
        )
    gate = work.min_teacher_iou if gate is None else gate
    if not gate <= 1:
        raise UserError(f"--min-teacher-iou is {gate:g}, and a mean IoU is at most 1")
    return ForTopK(k=arguments.for_topk, min_teacher_iou=max(gate, 0.0))


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
