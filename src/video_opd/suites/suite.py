"""The general suite, from a model folder to a record of accuracies.

The requirements are checked, then lmms-eval asks and scores, then we sum up. lmms-eval runs inside this
process, so an error there is an error here (its own command exits with 0 even then). Responses are on disk as
soon as they are made: a run that was killed continues with the same command.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import video_opd
from video_opd.errors import UserError
from video_opd.files import write_text
from video_opd.locks import locked_folder
from video_opd.processes import launched_count
from video_opd.progress import log
from video_opd.suites import requirements
from video_opd.suites.accuracy import (
    MISSING,
    PERCENT,
    BenchmarkScore,
    ScoredRow,
    benchmark_scores,
)
from video_opd.suites.benchmarks import BENCHMARKS, Task, choose_tasks
from video_opd.suites.rows import Row, hub_home, stock_file
from video_opd.terminal import Escaping

if TYPE_CHECKING:
    from video_opd.suites.responder import Responder

TASK_FILES = "lmms-eval"  # the folder of the task files, in ``out``
TOLERANCE = 1e-6  # percent, between our accuracy and lmms-eval's
PACKAGES = ("lmms-eval", "torch", "torchvision", "transformers", "av")


@dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """The tasks and their rows. ``out`` is the folder of responses, task files and ``results.json``."""

    out: Path
    data_root: Path | None = None
    only: Sequence[str] | None = None
    skip: Sequence[str] = ()
    limit: int | None = None  # run only the first rows of each task
    judge: bool = False
    allow_missing: bool = False

    @property
    def tasks(self) -> list[Task]:
        return choose_tasks(self.only, self.skip, judge=self.judge)


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    model: str
    scores: Sequence[BenchmarkScore]
    protocol: Mapping[str, Any]
    versions: Mapping[str, str | None]

    @property
    def mean(self) -> float:
        """The mean accuracy of the benchmarks that were run, each counting the same."""
        return sum(score.overall.accuracy for score in self.scores) / len(self.scores)

    def to_json(self) -> dict[str, Any]:
        return {
            "suite": "general",
            "model": self.model,
            "benchmarks": {score.benchmark.name: score.to_json() for score in self.scores},
            "mean": self.mean,
            "protocol": dict(self.protocol),
            "versions": dict(self.versions),
        }


def default_out(model: str) -> Path:
    """``runs/a/model`` → ``runs/general/a-model``."""
    return Path("runs/general") / "-".join(Path(model).absolute().parts[-2:])


def run(
    model: str,
    settings: SuiteSettings,
    *,
    overrides: Sequence[str] = (),
    batch_size: int = 8,
    workers: int = 2,
    device: str | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> SuiteResult:
    """Runs the suite and writes ``results.json``.

    Raises :class:`UserError` before a model is loaded if something is missing, and if another command is
    writing in the folder. Raises RuntimeError if lmms-eval fails, if no video of a task can be read, or if
    lmms-eval's accuracy is not ours.
    """
    if launched_count() > 1:
        raise UserError(
            "the general suite runs in one process: give each process its own --tasks and its own --out"
        )
    found = survey(settings)
    requirements.require(found, allow_missing=settings.allow_missing)

    from video_opd.models.fingerprint import model_fingerprint
    from video_opd.suites.responder import Responder
    from video_opd.suites.task_files import write_task_files

    responder = Responder(
        model=model,
        out=settings.out / "answers.jsonl",
        overrides=overrides,
        batch_size=batch_size,
        workers=workers,
        device=device,
        max_new_tokens=max_new_tokens,
        seed=seed,
        overwrite=overwrite,
    )
    config, answers = responder.config, responder.settings  # raises now for a wrong setting
    with locked_folder(settings.out):
        digests = write_task_files(
            settings.out / TASK_FILES,
            found.rows,
            max_new_tokens=answers.max_new_tokens,
            judge=settings.judge,
        )
        with _prints_on_stderr():
            rehearse(found.rows)
        scored = _run_lmms_eval(responder, settings.out / TASK_FILES, found.rows)
        result = SuiteResult(
            model=model,
            scores=benchmark_scores(scored),
            protocol={
                "questions": "lmms-eval's, those for Qwen3-VL where a task has its own",
                "system": None,
                "letters": "read by video-opd, then scored by lmms-eval; "
                "unread and missing answers are wrong",
                "judge": "lmms-eval's" if settings.judge else None,
                "answers": asdict(answers),
                "video": config.video.model_dump(),
                "model": config.model.as_run(),
                "fingerprint": model_fingerprint(model),
                "limit": settings.limit,
                "rows": {task.name: digest for task, digest in digests.items()},
                "ci95": "bootstrap over videos, 2000 draws, seed 0",
            },
            versions=versions(),
        )
        write_text(settings.out / "results.json", json.dumps(result.to_json(), indent=2) + "\n")
        log(f"wrote {settings.out / 'results.json'}")
    return result


def survey(settings: SuiteSettings) -> requirements.Survey:
    """Returns the requirements of the suite on this machine, and which of them are missing."""
    _quiet_libraries()
    return requirements.survey(settings.tasks, settings.data_root, judge=settings.judge, limit=settings.limit)


def rehearse(rows: Mapping[Task, Sequence[Row]]) -> None:
    """Scores every row once with a made-up response: a row that lmms-eval cannot score is found early.

    No judge is asked. Raises :class:`UserError` that names the row.
    """
    from video_opd.suites import hooks

    for task, found in rows.items():
        for number, row in enumerate(found):
            try:
                if not task.judged:
                    getattr(hooks, task.hook)(row.doc, ["A"])
                if task.benchmark == "videomme":
                    _check_categories(row.doc)
            except Exception as error:  # the stock code raises many kinds
                raise UserError(
                    f"{task.name}, row {number}: lmms-eval cannot score it ({_reason(error)}); mend the row"
                ) from error


def _check_categories(doc: Mapping[str, Any]) -> None:
    """lmms-eval knows a fixed list of Video-MME's categories; another one would fail after all responses."""
    from lmms_eval.tasks.videomme import utils

    known = {
        "duration": utils.VIDEO_TYPE,
        "domain": utils.CATEGORIES,
        "sub_category": utils.SUB_CATEGORIES,
        "task_type": utils.TASK_CATEGORIES,
    }
    for key, values in known.items():
        if doc[key] not in values:
            raise ValueError(f'"{key}" is {doc[key]!r}, none of {", ".join(values)}')


def _run_lmms_eval(
    responder: Responder, folder: Path, rows: Mapping[Task, Sequence[Row]]
) -> dict[Task, list[ScoredRow]]:
    """Lets lmms-eval ask every question and score every response."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from tenacity import RetryError

    from video_opd.suites.lmms_model import VideoOPD
    from video_opd.suites.task_files import QWEN

    _quiet_logs()
    manager = TaskManager(include_path=str(folder), include_defaults=False, model_name=QWEN)
    try:
        with _prints_on_stderr():
            results = simple_evaluate(
                model=VideoOPD(responder=responder),
                tasks=[task.prefixed for task in rows],
                task_manager=manager,
                bootstrap_iters=0,  # our own intervals draw videos
            )
    except RetryError as error:  # lmms-eval's retries hide the error itself
        cause = error.last_attempt.exception()
        raise (cause if cause is not None else error) from error
    if results is None:
        raise RuntimeError("lmms-eval gave no results")
    return {task: _scored(task, rows[task], results) for task in rows}


def _scored(task: Task, rows: Sequence[Row], results: Mapping[str, Any]) -> list[ScoredRow]:
    """The scored rows of a task, in order. Raises RuntimeError if lmms-eval's own accuracy differs."""
    from video_opd.suites.hooks import ROW_KEY

    benchmark = BENCHMARKS[task.benchmark]
    logged = sorted(results["samples"].get(task.prefixed, ()), key=lambda sample: sample["doc_id"])
    if [sample["doc_id"] for sample in logged] != list(range(len(rows))):
        raise RuntimeError(f"{task.name}: lmms-eval scored {len(logged)} of {len(rows)} rows")
    scored = [
        ScoredRow(
            task=task.name,
            video=str(row.video),
            score=sample[ROW_KEY]["score"],
            rule=sample[ROW_KEY]["rule"],
            group=row.doc[benchmark.group_by] if benchmark.group_by else None,
        )
        for row, sample in zip(rows, logged, strict=True)
    ]
    ours = PERCENT * sum(row.score for row in scored) / len(scored)
    theirs = results["results"][task.prefixed][f"{benchmark.metric},none"]
    if abs(ours - theirs) > TOLERANCE:
        raise RuntimeError(f"{task.name}: its rows make {ours:.4f}%, lmms-eval says {theirs:.4f}%")
    if all(row.rule == MISSING for row in scored):
        raise RuntimeError(
            f"{task.name}: not one of its {len(scored)} rows was answered; see the lines above"
        )
    return scored


def download(settings: SuiteSettings) -> None:
    """Lets lmms-eval download rows and videos, as its stock tasks do: hundreds of gigabytes for all of them.

    lmms-eval skips a folder of videos that is there. Raises :class:`UserError` if lmms-eval is not installed,
    and RuntimeError if the download fails.
    """
    if settings.data_root is not None:
        raise UserError("--download gets what lmms-eval takes from the hub: leave out --data-root")
    requirements.require_package()
    os.environ.setdefault("HF_HOME", str(hub_home()))
    from lmms_eval.tasks import TaskManager
    from tenacity import RetryError

    for task in settings.tasks:
        log(f"{task.name}: getting rows and videos, into {os.environ['HF_HOME']}")
        folder = stock_file(task).parent
        manager = TaskManager(include_path=str(folder), include_defaults=False, model_name="qwen3_vl")
        try:
            with _prints_on_stderr():
                manager.load_task_or_group([task.name], task_type="chat")
        except RetryError as error:
            raise RuntimeError(f"{task.name}: {_reason(error.last_attempt.exception() or error)}") from error


def versions() -> dict[str, str | None]:
    """The versions of everything that a score depends on besides the model."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "video-opd": video_opd.__version__,
        "python": platform.python_version(),
        **{package: of(package) for package in PACKAGES},
    }


def _quiet_libraries() -> None:
    """Turns off the libraries' progress bars, which would mix with ours. Called before they are imported.

    lmms-eval shows one short bar a task all the same, when the responses are there and it scores them.
    """
    os.environ.setdefault("HF_HOME", str(hub_home()))  # lmms-eval's tasks need it to be set
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _prints_on_stderr() -> contextlib.redirect_stdout[Escaping]:
    """For a block in which lmms-eval prints: its lines quote rows and files, and stdout is for results."""
    return contextlib.redirect_stdout(Escaping(sys.stderr))


def _quiet_logs() -> None:
    """Prints lmms-eval's warnings and errors as our own lines, and leaves the rest of its log out."""
    from loguru import logger

    logger.remove()
    logger.add(lambda message: log(str(message).rstrip()), level="WARNING", format="lmms-eval: {message}")


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
