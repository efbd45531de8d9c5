"""From a recipe to the components of a run: student, teacher, optimiser, data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from video_opd.algorithms.method import Method
from video_opd.algorithms.registry import make_method, make_reward
from video_opd.config import (
    DistillationRecipe,
    GRPORecipe,
    ModelConfig,
    Recipe,
)
from video_opd.data.annotations import read_samples
from video_opd.data.encode import PromptEncoder
from video_opd.data.loader import PromptLoader
from video_opd.errors import UserError, need
from video_opd.models.checkpoint_files import is_adapter_folder
from video_opd.models.inference import log_other_video_form, with_video_form
from video_opd.models.interfaces import Policy, Teacher
from video_opd.models.loading import (
    DTYPES,
    check_teacher,
    load_model,
    load_teacher,
    read_config,
)
from video_opd.models.lora import (
    add_adapters,
    add_frozen_adapter,
    has_adapters,
    load_adapter,
    trained_in_full,
)
from video_opd.models.parts import cast_weights, part_modules
from video_opd.models.policy import HFPolicy
from video_opd.models.quantisation import check_quantisation, quantise_frozen_layers, restore_layers
from video_opd.models.recompute import let_library_recompute
from video_opd.models.same_tokens import check_same_tokens
from video_opd.models.teachers import AdaptersOffReference, AdapterTeacher, RoutedTeacher
from video_opd.models.torchao import check_torchao
from video_opd.models.vllm_policy import MISSING
from video_opd.models.vocabulary import Vocabulary
from video_opd.planning.setup import ResolvedPlacement, why_not_shared
from video_opd.processes import launched_count
from video_opd.progress import log
from video_opd.serving.connect import check_served_teacher, connect_teacher
from video_opd.training.masters import Masters
from video_opd.training.optimizers import make_optimizer
from video_opd.training.placement import loading_device, place, placement_asked
from video_opd.training.run_folder import RunFolder
from video_opd.training.run_plan import plan_of_run
from video_opd.training.sharding import gathers_by_layer, hold, is_sharded, shard, sharding_asked
from video_opd.training.vllm_sampler import VLLMSampler, make_sampler
from video_opd.types import EncodedPrompt, Sample

if TYPE_CHECKING:
    from accelerate import Accelerator

CPU = torch.device("cpu")
# A loader turns samples into ``(sample, prompt)``, in order, without those whose video cannot be decoded.
Loader = Callable[[Sequence[Sample]], Iterable[tuple[Sample, EncodedPrompt]]]


@dataclass(frozen=True, kw_only=True)
class Components:
    """The objects that a run is built from. Tests and other engines give their own policy or teacher."""

    model: torch.nn.Module  # the student's bare module; its trained weights are of type model.weights
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
    sampler: VLLMSampler | None = None  # samples in the student's place, with its weights
    masters: Masters | None = None  # the weights that the optimiser updates, if the model has others
    recompute: bool = False  # whether the backward computes activations again

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
    check_libraries(recipe)
    samples = read_samples(recipe.data.train, recipe.data.video_root)
    device = accelerator.device
    for path in recipe.teacher.local_paths:  # finds a missing one before minutes are spent on the student
        check_teacher(path, recipe.teacher.quantization, device)
    if recipe.asks_servers:
        check_served_teacher(recipe, weights)
    plan = plan_of_run(recipe, samples, device, accelerator.num_processes)
    placement = plan.teacher_placement if plan is not None else placement_asked(recipe)
    finished = Path(weights) == folder.model
    model, processor = load_student(recipe, weights, device, merged=finished)
    encoder = PromptEncoder(processor, with_video_form(recipe).prompt)
    method = make_method(recipe, processor.tokenizer, opened=encoder.opens_thinking)
    samples = usable_samples(recipe, method, samples)
    teacher = None
    if method.needs.teacher:
        assert isinstance(recipe, DistillationRecipe), "only these learn from a teacher"
        teacher = load_teachers(recipe, samples, (model, processor), device, placement)
    recompute = bool(recipe.model.gradient_checkpointing) if plan is None else plan.recompute
    by_layer = gathers_by_layer(recipe)
    if recompute and not by_layer:
        let_library_recompute(model, recipe.model.engine)
    if finished:  # nothing is trained, so nothing is wrapped or divided, and the optimiser is never asked
        forward_module, masters = model, None
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters())
    else:
        forward_module, optimizer, masters = wrap_for_training(recipe, accelerator, model)
    compute_dtype = None if recipe.model.dtype == "float32" else DTYPES[recipe.model.dtype]
    policy = HFPolicy(
        model,
        processor,
        recipe.model.engine,
        compute_dtype=compute_dtype,
        forward_module=forward_module,
        recompute=recompute and recipe.model.engine == "prefix" and not by_layer,
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
        sampler=make_sampler(recipe, policy) if recipe.samples_with_vllm and not finished else None,
        masters=masters,
        recompute=recompute or by_layer,
        processor=processor,
        samples=samples,
        loader=prompt_loader(
            recipe, processor, skipped_path=folder.skipped, max_failed_share=recipe.data.max_failed_share
        ),
        # An evaluation counts rows whose video cannot be decoded; it does not stop for them.
        evaluation_loader=prompt_loader(recipe, processor, skipped_path=None, max_failed_share=1.0),
    )


def check_libraries(recipe: Recipe) -> None:
    """Raises :class:`UserError`, before anything is loaded, for a library that the recipe needs and that is
    missing."""
    need(not recipe.samples_with_vllm or find_spec("vllm") is not None, MISSING)
    if recipe.model.weights == "bfloat16":
        check_torchao("model.weights bfloat16")
    if recipe.optim.moments == "int8":
        check_torchao("optim.moments int8")
    if recipe.lora.base_quantization is not None:
        check_torchao(f"lora.base_quantization {recipe.lora.base_quantization}")


def wrap_for_training(
    recipe: Recipe, accelerator: Accelerator, model: torch.nn.Module
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Masters | None]:
    """(the module that forwards with gradients go through, the optimiser, the weights that it updates if they
    are not the model's own), for one process or several."""
    sharded, dtype, masters = sharding_asked(recipe), DTYPES[recipe.model.dtype], None
    if recipe.optim.offload:
        processes = accelerator.num_processes if sharded else 1
        masters = Masters(model, dtype, rank=accelerator.process_index, processes=processes)

    def held(weight: torch.nn.Parameter) -> torch.dtype:
        given = recipe.lora.parts or (masters is not None and weight.requires_grad)
        return weight.dtype if given else DTYPES[recipe.model.weights]

    if sharded:
        shard(model, dtype, accelerator.device, held)
    else:
        hold(model.parameters(), held)
        if recipe.model.sharding is not None:
            log(f"model.sharding is {recipe.model.sharding}, but there is one process: nothing is sharded")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if masters is not None:
        masters.bind(model)
        trained = list(masters.weights.values())
    optimizer = make_optimizer(trained, recipe.optim, recipe.model.weights, recipe.run.seed)
    if is_sharded(model) or accelerator.num_processes == 1:
        # torchrun may start a single process, which DDP would only take memory from.
        return model, accelerator.prepare(optimizer), masters
    return *accelerator.prepare(model, optimizer), masters


def load_student(
    recipe: Recipe, weights: str | Path, device: torch.device, *, merged: bool = False
) -> tuple[Any, Any]:
    """(model, processor). Only the weights that are trained require gradients; their type is model.weights.

    With LoRA, ``weights`` is the base or a checkpoint's ``adapter/``. ``merged`` says that it is a finished
    model, which needs no adapters.
    """
    by_layer = gathers_by_layer(recipe) and not merged
    if by_layer:
        device = CPU  # whole, it may have no room on the device; its shards are moved there
    if not recipe.lora.parts or merged:
        dtype = recipe.run.save_dtype if merged else recipe.model.weights  # what the run would hold
        model, processor = load_model(
            weights,
            dtype=dtype,
            device=device,
            attn=recipe.model.attn,
            trained=True,
            # What is stored in 16 bits is widened by wrap_for_training.
            as_stored=by_layer or (recipe.optim.offload and not merged),
        )
        freeze(model, recipe.model)
        return model, processor
    if recipe.lora.base_quantization is not None:
        model_type = read_config(recipe.model.path).model_type
        check_quantisation(recipe.lora.base_quantization, "lora.base_quantization", device, model_type)
    # The base stays on the CPU until its frozen weights are cast: the device may have no room for float32.
    model, processor = load_model(
        recipe.model.path, dtype="float32", attn=recipe.model.attn, trained=True, as_stored=True
    )
    adapt(model, recipe, weights, device)
    return model.to(device), processor


def adapt(model: torch.nn.Module, recipe: Recipe, weights: str | Path, device: torch.device = CPU) -> None:
    """Puts adapters on the base: a checkpoint's if ``weights`` is its ``adapter/``, otherwise new ones.

    Weights that are not trained are then held in ``model.dtype``: they need not represent small updates. With
    ``lora.base_quantization``, their linear layers are quantised, one at a time on ``device``. Weights that
    are trained are float32, in whichever type the base was read.
    """
    for part, modules in part_modules(model).items():
        if part not in recipe.lora.parts and part not in recipe.model.freeze:
            for _, module in modules:
                cast_weights(module, torch.float32)
    if is_adapter_folder(weights):
        load_adapter(model, weights)
    else:
        add_adapters(model, recipe.lora, recipe.run.seed, recipe.model.path)
    freeze(model, recipe.model)
    cast_weights(model, DTYPES[recipe.model.dtype], frozen_only=True)
    if recipe.lora.base_quantization is not None:
        count = quantise_frozen_layers(model, recipe.lora.base_quantization, device)
        log(f"{recipe.model.path}: {count:,} frozen weights are held in {recipe.lora.base_quantization}")


def restore_base(model: torch.nn.Module, recipe: Recipe) -> None:
    """Gives a student with a quantised base the whole weights of it, for adapters to be merged into."""
    if recipe.lora.base_quantization is not None and has_adapters(model):
        base, _ = load_model(recipe.model.path, dtype=recipe.model.dtype, attn=recipe.model.attn)
        restore_layers(model, base)


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
    placement: ResolvedPlacement,
) -> Teacher:
    """The teacher, or a teacher for each source that ``teacher.by_source`` names. A folder is loaded once.

    Raises :class:`UserError` for a teacher that does not share the student's tokens, and for a source that no
    row has.
    """
    settings = recipe.teacher
    if settings.urls:
        return connect_teacher(
            settings,
            recipe.video,
            student,
            nonfinite=recipe.loss.nonfinite,
            device=device,
            distributions=recipe.computes_distributions,
        )
    sources = {sample.id: sample.source for sample in samples}
    for source in settings.by_source:
        if source not in sources.values():
            known = ", ".join(sorted({str(name) for name in sources.values()}))
            raise UserError(
                f"teacher.by_source names {source!r}, which no row of {recipe.data.train} has as its source "
                f"(there: {known})"
            )

    def load(number: int, path: str) -> Teacher:
        log_other_video_form(with_video_form(recipe).prompt.video_form, path)
        if is_adapter_folder(path):
            merged = None if has_adapters(student[0]) else "the student's adapters are merged"
            reason = why_not_shared(recipe, path) or merged
            if reason is None:
                return adapter_teacher(recipe, path, f"teacher{number}", student)
            log(f"teacher {path}: an adapter, merged into a base of its own, because {reason}")
        first = loading_device(placement, device)
        loaded = load_teacher(path, settings.dtype, first, recipe.model.attn, settings.quantization)
        check_same_tokens(student, loaded, other_template=settings.other_template)
        policy = HFPolicy(*loaded, recipe.model.engine, vocabulary=Vocabulary.of(*student))
        return place(policy, placement, device, recipe.loss.nonfinite)

    teachers = {path: load(number, path) for number, path in enumerate(settings.paths)}
    if not settings.by_source:
        return teachers[settings.path]

    def route(prompt: EncodedPrompt) -> str:
        return settings.by_source.get(sources[prompt.sample_id] or "", settings.path)

    return RoutedTeacher(teachers, route)


def adapter_teacher(
    recipe: DistillationRecipe, path: str, name: str, student: tuple[Any, Any]
) -> AdapterTeacher:
    """The adapter ``path`` on the student's base, which computes as it does for the student."""
    model, processor = student
    assert not trained_in_full(model), "the teacher would change with the student"
    add_frozen_adapter(model, path, name)
    log(f"teacher {path}: an adapter on the student's base, whose weights serve both")
    compute_dtype = None if recipe.model.dtype == "float32" else DTYPES[recipe.model.dtype]
    policy = HFPolicy(model, processor, recipe.model.engine, compute_dtype=compute_dtype)
    return AdapterTeacher(policy, name, nonfinite=recipe.loss.nonfinite)


def load_reference(
    recipe: Recipe, policy: HFPolicy, device: torch.device, placement: ResolvedPlacement = "whole"
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
    recipe: Recipe,
    processor: Any,
    *,
    skipped_path: Path | None,
    max_failed_share: float,
    keep_clips: bool | None = None,
) -> Loader:
    """A loader that decodes and encodes in the background with the recipe's settings.

    ``skipped_path`` gets the rows whose videos cannot be decoded; more than ``max_failed_share`` of them stop
    the run. Prompts keep their clips, for servers, as ``keep_clips`` or else the recipe says.
    """
    data, prompt = recipe.data, with_video_form(recipe).prompt
    keep_clips = recipe.keeps_clips if keep_clips is None else keep_clips
    encoder = PromptEncoder(processor, prompt, keep_clips=keep_clips)
    ahead = recipe.videos_ahead(launched_count())

    def load(samples: Sequence[Sample]) -> PromptLoader:
        return PromptLoader(
            samples,
            encoder,
            recipe.video,
            workers=data.workers,
            prefetch=ahead,
            skipped_path=skipped_path,
            max_failed_share=max_failed_share,
            backend=recipe.video.backend,
            cache_dir=data.cache_dir,
            memory_bytes=data.memory_gib * 2**30,
        )

    return load


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
