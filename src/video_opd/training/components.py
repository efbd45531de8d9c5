"""From a recipe to the components of a run: student, teacher, optimiser, data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from video_opd.algorithms.method import Method
from video_opd.algorithms.registry import make_method, make_reward
from video_opd.config import DistillationRecipe, GRPORecipe, ModelConfig, OptimConfig, Recipe
from video_opd.data.annotations import read_samples
from video_opd.data.encode import PromptEncoder
from video_opd.data.loader import PromptLoader
from video_opd.errors import UserError
from video_opd.models.inference import log_other_video_form, with_video_form
from video_opd.models.interfaces import Policy, Teacher
from video_opd.models.loading import DTYPES, load_model, no_library_warnings, read_config
from video_opd.models.lora import add_adapters, has_adapters, is_adapter, load_adapter, trained_in_full
from video_opd.models.parts import cast_weights, part_modules
from video_opd.models.policy import HFPolicy
from video_opd.models.same_tokens import check_same_tokens
from video_opd.models.teachers import AdaptersOffReference, LocalTeacher, RoutedTeacher
from video_opd.models.vocabulary import Vocabulary
from video_opd.planning.setup import Place
from video_opd.progress import log
from video_opd.training.masters import Masters
from video_opd.training.memory import plan_of_run
from video_opd.training.placement import loading_device, place, placement_asked
from video_opd.training.run_folder import RunFolder
from video_opd.training.sharding import is_sharded, shard, sharding_asked
from video_opd.types import EncodedPrompt, Sample

if TYPE_CHECKING:
    from accelerate import Accelerator

# A loader turns samples into ``(sample, prompt)``, in order, without those whose video cannot be decoded.
Loader = Callable[[Sequence[Sample]], Iterable[tuple[Sample, EncodedPrompt]]]


@dataclass(frozen=True, kw_only=True)
class Components:
    """The objects that a run is built from. Tests and other engines give their own policy or teacher."""

    model: torch.nn.Module  # the student's bare module; its trained weights are float32
    forward_module: torch.nn.Module  # the wrapper that Accelerate put around ``model``, or ``model`` itself
    policy: Policy  # the student
    plain: Policy  # the student's weights through the plain engine, for checks
    teacher: Teacher | None
    reference: Teacher | None  # the initial student, frozen
    method: Method
    optimizer: torch.optim.Optimizer
    processor: Any
    samples: Sequence[Sample]
    loader: Loader
    evaluation_loader: Loader
    masters: Masters | None = None  # the weights that the optimiser updates, if the model has others

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def build_components(
    recipe: Recipe, accelerator: Accelerator, folder: RunFolder, weights: str | Path
) -> Components:
    """Loads everything that a run needs.

    ``weights`` is the student's folder. On a resume it is a checkpoint's; if only the evaluation is left, it
    is the run's own ``model/``.

    Raises :class:`UserError` for models that cannot be loaded or do not share their tokens, and for data
    files that cannot be read.
    """
    if isinstance(recipe, GRPORecipe):
        make_reward(recipe)  # finds a function that cannot be imported before any model is loaded
    samples = read_samples(recipe.data.train, recipe.data.video_root)
    if recipe.teacher.path:  # finds a missing teacher before minutes are spent on loading the student
        for path in recipe.teacher.paths:
            read_config(path)
    device = accelerator.device
    plan = plan_of_run(recipe, samples, accelerator)
    placement = plan.teacher_placement if plan is not None else placement_asked(recipe)
    model, processor = load_student(recipe, weights, device, merged=Path(weights) == folder.model)
    encoder = PromptEncoder(processor, with_video_form(recipe).prompt)
    method = make_method(recipe, processor.tokenizer, opened=encoder.opens_thinking)
    samples = usable_samples(recipe, method, samples)
    teacher = None
    if method.needs.teacher:
        assert isinstance(recipe, DistillationRecipe), "only these learn from a teacher"
        teacher = load_teachers(recipe, samples, (model, processor), device, placement)
    recompute = bool(recipe.model.gradient_checkpointing) if plan is None else plan.recompute
    if recompute:
        # The prefix engine needs the cache of its decoder layers, and checkpoints them itself.
        checkpointed = model.model.visual if recipe.model.engine == "prefix" else model
        old_name = checkpointed.gradient_checkpointing_enable  # before transformers 5.23
        # It warns of a vision tower without token embeddings. Gradients reach all weights without them,
        # because checkpointing that is not reentrant needs no input that requires gradients.
        with no_library_warnings():
            getattr(checkpointed, "activation_checkpointing_enable", old_name)({"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only
    forward_module, optimizer, masters = prepare(recipe, accelerator, model)
    compute_dtype = None if recipe.model.dtype == "float32" else DTYPES[recipe.model.dtype]
    policy = HFPolicy(
        model,
        processor,
        recipe.model.engine,
        compute_dtype=compute_dtype,
        forward_module=forward_module,
        recompute=recompute and recipe.model.engine == "prefix",
    )
    return Components(
        model=model,
        forward_module=forward_module,
        policy=policy,
        plain=HFPolicy(model, processor, "plain", compute_dtype=compute_dtype),
        teacher=teacher,
        reference=load_reference(recipe, policy, device, placement) if method.needs.reference else None,
        method=method,
        optimizer=optimizer,
        masters=masters,
        processor=processor,
        samples=samples,
        loader=prompt_loader(
            recipe, processor, skipped_path=folder.skipped, max_failed_share=recipe.data.max_failed_share
        ),
        # An evaluation counts rows whose video cannot be decoded; it does not stop for them.
        evaluation_loader=prompt_loader(recipe, processor, skipped_path=None, max_failed_share=1.0),
    )


def prepare(
    recipe: Recipe, accelerator: Accelerator, model: torch.nn.Module
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Masters | None]:
    """(the module that forwards with gradients go through, the optimiser, the weights that it updates if they
    are not the model's own), for one process or several."""
    sharded, dtype, masters = sharding_asked(recipe), DTYPES[recipe.model.dtype], None
    if recipe.optim.offload:
        processes = accelerator.num_processes if sharded else 1
        masters = Masters(model, dtype, rank=accelerator.process_index, processes=processes)
    if sharded:
        shard(model, dtype, accelerator.device)
    elif recipe.model.sharding is not None:
        log(f"model.sharding is {recipe.model.sharding}, but there is one process: nothing is sharded")
    if masters is not None:
        masters.bind(model)
        optimizer = make_optimizer(list(masters.weights.values()), recipe.optim)
    else:
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], recipe.optim)
    if is_sharded(model):
        return model, accelerator.prepare(optimizer), masters
    return *accelerator.prepare(model, optimizer), masters


def load_student(
    recipe: Recipe, weights: str | Path, device: torch.device, *, merged: bool = False
) -> tuple[Any, Any]:
    """(model, processor). Only the weights that are trained require gradients; they are float32.

    With LoRA, ``weights`` is the base or a checkpoint's ``adapter/``. ``merged`` says that it is a finished
    model, which needs no adapters.
    """
    if not recipe.lora.parts or merged:
        model, processor = load_model(
            weights, dtype="float32", device=device, attn=recipe.model.attn, trained=True
        )
        freeze(model, recipe.model)
        return model, processor
    # The base stays on the CPU in float32 until its frozen weights are cast: the device may have no room.
    model, processor = load_model(recipe.model.path, dtype="float32", attn=recipe.model.attn, trained=True)
    adapt(model, recipe, weights)
    return model.to(device), processor


def adapt(model: torch.nn.Module, recipe: Recipe, weights: str | Path) -> None:
    """Puts adapters on the base: a checkpoint's if ``weights`` is its ``adapter/``, otherwise new ones.

    Weights that are not trained are then held in ``model.dtype``: they need not represent small updates.
    """
    if is_adapter(weights):
        load_adapter(model, weights)
    else:
        add_adapters(model, recipe.lora, recipe.run.seed, recipe.model.path)
    freeze(model, recipe.model)
    cast_weights(model, DTYPES[recipe.model.dtype], frozen_only=True)


def usable_samples(recipe: Recipe, method: Method, samples: list[Sample]) -> list[Sample]:
    """The rows that the method can learn from. It logs how many are left out.

    Raises :class:`UserError` if none is left.
    """
    if not method.needs.annotation:
        return samples
    kept = [sample for sample in samples if sample.spans]
    if samples and not kept:
        raise UserError(
            f"{recipe.data.train}: no row has spans, and method {recipe.method} learns from the annotation; "
            "add spans, or use video-opd"
        )
    if len(kept) < len(samples):
        log(f"{recipe.data.train}: {len(samples) - len(kept)} of {len(samples)} rows have no spans, left out")
    return kept


def load_teachers(
    recipe: DistillationRecipe,
    samples: Sequence[Sample],
    student: tuple[Any, Any],
    device: torch.device,
    placement: Place,
) -> Teacher:
    """The teacher, or a teacher for each source that ``teacher.by_source`` names. A folder is loaded once.

    Raises :class:`UserError` for a teacher that does not share the student's tokens, and for a source that no
    row has.
    """
    settings = recipe.teacher
    sources = {sample.id: sample.source for sample in samples}
    for source in settings.by_source:
        if source not in sources.values():
            known = ", ".join(sorted({str(name) for name in sources.values()}))
            raise UserError(
                f"teacher.by_source names {source!r}, which no row of {recipe.data.train} has as its source "
                f"(there: {known})"
            )

    def load(path: str) -> LocalTeacher:
        loaded = load_model(
            path, dtype=settings.dtype, device=loading_device(placement, device), attn=recipe.model.attn
        )
        check_same_tokens(student, loaded, other_template=settings.other_template)
        log_other_video_form(with_video_form(recipe).prompt.video_form, path)
        policy = HFPolicy(*loaded, recipe.model.engine, vocabulary=Vocabulary.of(*student))
        return place(policy, placement, device, recipe.loss.nonfinite)

    teachers = {path: load(path) for path in settings.paths}
    if not settings.by_source:
        return teachers[settings.path]

    def route(prompt: EncodedPrompt) -> str:
        return settings.by_source.get(sources[prompt.sample_id] or "", settings.path)

    return RoutedTeacher(teachers, route)


def load_reference(
    recipe: Recipe, policy: HFPolicy, device: torch.device, placement: Place = "whole"
) -> Teacher:
    """The reference: the student as it was before its first step, also after a resume.

    If only adapters are trained, it is the student itself with its adapters switched off, otherwise a copy in
    the precision that the student is trained in.
    """
    if has_adapters(policy.model) and not trained_in_full(policy.model):
        return AdaptersOffReference(policy, nonfinite=recipe.loss.nonfinite)
    loaded = load_model(
        recipe.model.path,
        dtype=recipe.model.dtype,
        device=loading_device(placement, device),
        attn=recipe.model.attn,
    )
    return place(HFPolicy(*loaded, recipe.model.engine), placement, device, recipe.loss.nonfinite)


def prompt_loader(
    recipe: Recipe, processor: Any, *, skipped_path: Path | None, max_failed_share: float
) -> Loader:
    """A loader that decodes and encodes in the background with the recipe's settings.

    ``skipped_path`` gets the rows whose videos cannot be decoded; more than ``max_failed_share`` of them stop
    the run.
    """
    data, encoder = recipe.data, PromptEncoder(processor, with_video_form(recipe).prompt)
    a_batch = max(recipe.optim.batch_size, recipe.evaluate.batch_size)

    def load(samples: Sequence[Sample]) -> PromptLoader:
        return PromptLoader(
            samples,
            encoder,
            recipe.video,
            workers=data.workers,
            prefetch=data.prefetch or a_batch,
            skipped_path=skipped_path,
            max_failed_share=max_failed_share,
            backend=recipe.video.backend,
            cache_dir=data.cache_dir,
        )

    return load


def make_optimizer(parameters: Sequence[torch.nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW. Weight decay leaves out vectors (biases, norms), as is usual."""
    assert all(p.dtype == torch.float32 for p in parameters), "a bfloat16 weight loses updates of lr 1e-6"
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=optim.offload or None,  # on a CPU the other ways read the memory several times
    )


def freeze(model: torch.nn.Module, settings: ModelConfig) -> None:
    """Freezes the parts of the model that ``model.freeze`` names.

    Raises :class:`UserError` if nothing is left to train.
    """
    parts = part_modules(model)
    for part in settings.freeze:
        for _, module in parts[part]:
            module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"model.freeze {list(settings.freeze)} leaves nothing to train: take one of them out")
