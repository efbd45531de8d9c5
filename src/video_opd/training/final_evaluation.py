"""The evaluation of a run: greedy predictions of its final model on the files of ``evaluate.data``.

Several processes divide the videos among themselves, and the first one writes the figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from video_opd.config import Quantization, Recipe
from video_opd.data.annotations import read_samples
from video_opd.errors import UserError
from video_opd.evaluation.comparison import evaluate_file
from video_opd.evaluation.failure_records import explainer, write_annotations, write_failures
from video_opd.evaluation.predict import GenerationSettings, predict
from video_opd.evaluation.predictions import read_predictions
from video_opd.files import write_text
from video_opd.models.alternatives import text_of_token
from video_opd.models.checkpoint_files import base_of
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.inference import chosen_device, with_video_form
from video_opd.models.interfaces import CollectiveTeacher, Policy
from video_opd.models.loading import DTYPES, load_processor, load_teacher, read_model_configs
from video_opd.models.placed_teachers import ShardedPolicy
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import AdaptersOffReference
from video_opd.processes import Processes
from video_opd.progress import log
from video_opd.serving.connect import connect_teacher
from video_opd.training.components import Components, Loader, prompt_loader
from video_opd.training.digests import file_digest
from video_opd.training.run_folder import RunFolder, read_record
from video_opd.types import Sample


def check_evaluation_files(recipe: Recipe) -> None:
    """Reads every data file, so that a wrong path is found before the first step.

    Raises :class:`UserError` for a file that cannot be read or has no annotated row, and for two of one name.
    """
    names = [Path(path).stem for path in recipe.evaluate.data]
    if len(set(names)) < len(names):
        raise UserError(f"evaluate.data names two files of one name ({sorted(names)}): rename one")
    for path in recipe.evaluate.data:
        if not any(sample.spans for sample in read_samples(path, recipe.evaluate.video_root)):
            raise UserError(f"{path}: no row has spans to measure against; take it out of evaluate.data")


def is_evaluated(name: str, recipe: Recipe, out: Path) -> bool:
    """Whether all evaluations of ``name`` (``base``, ``teacher``) are written, of the files as they are."""
    for path in recipe.evaluate.data:
        record = read_record(out / f"{name}-{Path(path).stem}.json")
        # Earlier versions noted no digest.
        if record is None or record.get("data_sha256", digest := file_digest(path)) != digest:
            return False
    return True


def evaluate_student(
    recipe: Recipe, policy: Policy, loader: Loader, folder: RunFolder, processes: Processes
) -> None:
    """Writes ``eval/student-<data>.json`` and the predictions beside it; goes on where a kill left off.

    ``policy`` is the trained student in this process.
    """
    fingerprint = model_fingerprint(folder.model)
    _evaluate("student", recipe, policy, loader, fingerprint, folder.evaluations, processes)


def record_failures(recipe: Recipe, policy: Policy, components: Components, folder: RunFolder) -> None:
    """Writes some of the rows that the trained student failed on, for reports: ``eval/failures-DATA.jsonl``.

    ``policy`` is the trained student. A teacher that processes hold together is not asked here, because this
    process works alone, nor one that is an adapter on the student's base, because the student's adapters are
    merged into that.
    """
    teacher = components.teacher
    if isinstance(teacher, CollectiveTeacher | AdaptersOffReference):
        teacher = None
    explain = explainer(
        policy,
        teacher,
        text_of_token(components.processor),
        _generation(recipe),
        distributions=recipe.measures_analytic_kl,
    )
    for path in recipe.evaluate.data:
        predictions = folder.predictions(path)
        write_failures(
            read_samples(path, recipe.evaluate.video_root)[: recipe.evaluate.limit],
            read_predictions(predictions, thinking=recipe.prompt.thinking, protocol=recipe.prompt.style),
            folder.evaluations / f"failures-{Path(path).stem}.jsonl",
            components.evaluation_loader,
            explain,
            recipe.prompt.style,
            batch_size=recipe.evaluate.batch_size,
        )


def _generation(recipe: Recipe) -> GenerationSettings:
    return GenerationSettings(
        max_new_tokens=recipe.evaluate.max_new_tokens, thinking=recipe.prompt.thinking, seed=recipe.run.seed
    )


def evaluate_base(recipe: Recipe, out: Path, processes: Processes) -> None:
    """The same for the initial student, ``base-<data>.json``, in the trained student's precision."""
    computed = None if recipe.model.dtype == "float32" else DTYPES[recipe.model.dtype]
    _evaluate_frozen("base", recipe, "float32", computed, out, processes)


def evaluate_teacher(recipe: Recipe, out: Path, processes: Processes) -> None:
    """The same for the teacher, ``teacher-<data>.json``.

    A teacher of another chat template (``teacher.other_template``), and one that servers hold, answers the
    student's prompts: these are what it is asked wherever a run uses it. Where ``teacher.placement`` is
    sharded, the processes hold it together here, too.
    """
    student, teacher = recipe.model.path, recipe.teacher
    if teacher.urls:
        _evaluate_served(with_video_form(recipe), out, processes)
        return
    if teacher.other_template:
        recipe = with_video_form(recipe)
    as_student = recipe.changed(**{"model.path": teacher.path, "model.dtype": teacher.dtype})
    prompts_of = student if teacher.other_template else None
    sharded = teacher.placement == "sharded" and processes.count > 1
    _evaluate_frozen(
        "teacher", as_student, teacher.dtype, None, out, processes, prompts_of, teacher.quantization, sharded
    )


def _evaluate_frozen(
    name: str,
    recipe: Recipe,
    weights_dtype: str,
    compute_dtype: torch.dtype | None,
    out: Path,
    processes: Processes,
    prompts_of: str | None = None,
    quantization: Quantization | None = None,
    sharded: bool = False,
) -> None:
    """``prompts_of`` is the model whose prompts are answered; None: the evaluated model's own."""
    model = recipe.model
    device = chosen_device(None)
    first = "cpu" if sharded else device
    loaded, processor = load_teacher(model.path, weights_dtype, first, model.attn, quantization)
    if sharded:
        policy: HFPolicy = ShardedPolicy(loaded, processor, model.engine, device=torch.device(device))
    else:
        policy = HFPolicy(loaded, processor, model.engine, compute_dtype=compute_dtype)
    asking = processor if prompts_of is None else load_processor(prompts_of)
    loader = prompt_loader(recipe, asking, skipped_path=None, max_failed_share=1.0)
    made_by = {"prompts_of": model_fingerprint(prompts_of)} if prompts_of else {}
    if quantization is not None:
        made_by["quantization"] = quantization
    _evaluate(name, recipe, policy, loader, model_fingerprint(model.path), out, processes, made_by)


def _evaluate_served(recipe: Recipe, out: Path, processes: Processes) -> None:
    """The teacher of ``teacher.urls``."""
    path, settings = recipe.model.path, recipe.teacher
    student = read_model_configs(base_of(path)), load_processor(path)
    teacher = connect_teacher(settings, recipe.video, student)
    loader = prompt_loader(recipe, student[1], skipped_path=None, max_failed_share=1.0, keep_clips=True)
    as_teacher = recipe.changed(**{"model.dtype": settings.dtype})
    # Unless the recipe says otherwise, servers hold a model of the same template: its own prompts are these.
    made_by = {"prompts_of": model_fingerprint(path)} if settings.other_template else {}
    if settings.quantization is not None:
        made_by["quantization"] = settings.quantization
    if (engine := teacher.served.computation.engine) != "hf":
        made_by["engine"] = engine
    _evaluate("teacher", as_teacher, teacher, loader, teacher.served.model, out, processes, made_by)


def _evaluate(
    name: str,
    recipe: Recipe,
    policy: Policy,
    loader: Loader,
    fingerprint: str,
    out: Path,
    processes: Processes,
    made_by: Mapping[str, str] = MappingProxyType({}),
) -> None:
    settings = recipe.evaluate
    for path in settings.data:
        samples = read_samples(path, settings.video_root)[: settings.limit]
        predictions = out / f"{name}-{Path(path).stem}.jsonl"
        predict(
            policy,
            samples,
            loader,
            predictions,
            provenance={
                "model": fingerprint,
                "dtype": recipe.model.dtype,
                **made_by,
                "input": {
                    "video": recipe.video.model_dump(),
                    "prompt": with_video_form(recipe).prompt.model_dump(),
                },
            },
            settings=_generation(recipe),
            batch_size=settings.batch_size,
            repeatable=True,
            processes=processes,
        )
        processes.on_first(partial(_write_figures, samples, predictions, recipe.prompt.style, path))


def _write_figures(samples: Sequence[Sample], predictions: Path, protocol: str, data: str) -> None:
    write_annotations(samples, predictions.with_name(f"annotations-{Path(data).stem}.jsonl"))
    record = evaluate_file(samples, predictions, protocol)
    written = predictions.with_suffix(".json")
    facts = {"data": data, "data_sha256": file_digest(data)}
    write_text(written, json.dumps({**record, **facts}, indent=2) + "\n")
    log(f"{data}: mIoU {record['mIoU']:.1f} (wrote {written})")
