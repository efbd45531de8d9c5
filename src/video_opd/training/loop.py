"""A training run, from a recipe to a model folder. If it is killed and repeated, it ends the same.

The number of threads must stay the same for that: torch adds in another order with another number.

    plan → (rows → trajectories → scores → signal → (update → metrics)+ → checkpoint)* → model/

Every process has the same plan and weights and makes the same steps. The rows of a batch are split between
them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from video_opd.config import OptimConfig, Recipe
from video_opd.config.tree import flatten
from video_opd.errors import Unavailable, UserError
from video_opd.files import write_text
from video_opd.jsonl import append_jsonl
from video_opd.locks import locked_folder
from video_opd.models.alternatives import text_of_token
from video_opd.models.inference import with_video_form
from video_opd.models.loading import load_model
from video_opd.models.lora import has_adapters, merge_adapters
from video_opd.models.parts import cast_weights
from video_opd.models.policy import HFPolicy
from video_opd.processes import Processes
from video_opd.progress import log, task
from video_opd.seals import NOTHING, Sealer
from video_opd.seeds import derive_seed
from video_opd.training import checkpoint as checkpoints
from video_opd.training.batches import BatchPlan, BatchStream, Row
from video_opd.training.components import Components, build_components, restore_base
from video_opd.training.final_evaluation import check_evaluation_files, evaluate_student, record_failures
from video_opd.training.inputs import check_same_inputs, input_digests
from video_opd.training.launch import make_accelerator, processes_of
from video_opd.training.model_card import model_card
from video_opd.training.rollout_records import RolloutRecord, rollout_row
from video_opd.training.run_folder import RunFolder
from video_opd.training.self_check import check_first_prompts
from video_opd.training.sharding import Shards, is_sharded, load_optimizer_state
from video_opd.training.step import Batch, Stepper, StepResult, StepSettings
from video_opd.training.step_metrics import step_metrics, token_counts
from video_opd.training.stopwatch import Stopwatch
from video_opd.training.weight_probe import WeightProbe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from video_opd.models.interfaces import Policy

STAGES = ("decode_wait", "prefill", "sample", "teacher", "reference", "update", "checkpoint")
PROGRESS = {"reverse_kl/sampled": "reverse KL", "reward/mean": "reward", "response/nll": "nats a token"}
Build = Callable[[Recipe, "Accelerator", RunFolder, "str | Path"], Components]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The places of a finished run's results. ``metrics`` is the last row of ``metrics.jsonl``."""

    path: Path
    model: Path
    steps: int
    metrics: dict[str, Any]


def train(recipe: Recipe, build: Build = build_components) -> RunResult:
    """Trains a model. A run that was killed is continued; one that is finished returns at once.

    ``build`` makes the components; tests and other engines give their own. Raises :class:`UserError` for
    what a user can get wrong, at the earliest moment, and if another command is writing in the folder.
    """
    recipe = with_video_form(recipe)
    accelerator = make_accelerator(recipe)
    processes = processes_of(accelerator)
    with locked_folder(recipe.run.dir, processes):
        return _train(recipe, accelerator, processes, build)


def _train(recipe: Recipe, accelerator: Accelerator, processes: Processes, build: Build) -> RunResult:
    folder = RunFolder(recipe.run.dir)
    processes.on_first(lambda: _open(folder, recipe))
    if folder.finished:
        log(f"{folder.path} is finished: nothing to do")
        return _result(folder)
    processes.on_first(lambda: check_evaluation_files(recipe))
    if folder.model.is_dir():  # trained, but not yet evaluated
        components = build(recipe, accelerator, folder, folder.model)
        return _finish(recipe, processes, folder, components)
    found = processes.on_first(lambda: input_digests(recipe))
    saved = processes.on_first(lambda: _checkpoint_of_same_inputs(folder, found))
    components = build(recipe, accelerator, folder, saved.weights if saved else recipe.model.path)
    start = _resume(saved, components, accelerator)
    processes.on_first(lambda: _rewind(folder, saved, _machine(accelerator, recipe)))
    with _trackers(recipe, accelerator, start), _closing_sampler(components):
        Run(recipe, accelerator, processes, folder, components, found).steps(start)
    return _finish(recipe, processes, folder, components)


def _open(folder: RunFolder, recipe: Recipe) -> None:
    folder.claim(recipe)
    folder.discard_unfinished()
    folder.put_damage_aside()


def _checkpoint_of_same_inputs(folder: RunFolder, found: Mapping[str, str]) -> checkpoints.Checkpoint | None:
    saved = _checkpoint_to_continue(folder)
    if saved is not None:
        check_same_inputs(saved.inputs, found, folder.path)
    return saved


def _rewind(folder: RunFolder, saved: checkpoints.Checkpoint | None, machine: Mapping[str, Any]) -> None:
    nothing = {path.name: NOTHING for path in folder.rows}
    folder.rewind(saved.step if saved else 0, saved.rows if saved else nothing)
    folder.write_environment(machine)


class Run:
    """The steps of a run, and the objects that they share."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        processes: Processes,
        folder: RunFolder,
        components: Components,
        inputs: Mapping[str, str],
    ) -> None:
        self.recipe, self.accelerator, self.processes = recipe, accelerator, processes
        self.folder, self.components, self.inputs = folder, components, inputs
        self.plan = BatchPlan.of(recipe, components.samples)
        self.sealers = [Sealer(path) for path in folder.rows]  # the first process's
        self.watch = Stopwatch(settle=_settle(accelerator.device))
        settings = StepSettings.of(recipe, components.method.needs)
        self.stepper = Stepper(settings, accelerator, components, self.watch)
        self.probe = WeightProbe(self.stepper.shards.parameters, derive_seed(recipe.run.seed, "weights"))

    def steps(self, start: int) -> None:
        """Makes the steps from ``start`` to the last, with their rows of metrics and their checkpoints."""
        accelerator, plan, every = self.accelerator, self.plan, self.recipe.run.save_every
        stream = BatchStream(plan, start, accelerator.process_index, accelerator.num_processes)
        batches = stream.batches(self.components.loader(stream.wanted()))
        with closing(batches), task("training", plan.total_steps) as bar:
            if start:
                bar.advance(start, note="continued")
            for first in range(start, plan.total_steps, plan.updates_per_batch):
                began_s = time.perf_counter()
                with self.watch.stage("decode_wait"):
                    planned, rows = next(batches)
                if first == 0 and self.recipe.run.check:
                    self._check(planned, rows)
                done = first + plan.updates_per_batch
                with self._saving_if_something_is_away(first):
                    batch = self.stepper.prepare(first, planned, rows)
                    for step in range(first, done):
                        row, batch = self._step(step, batch, began_s)
                        began_s = time.perf_counter()
                        bar.advance(note=_progress(row))
                if done // every > first // every:
                    self._save(done)

    @contextmanager
    def _saving_if_something_is_away(self, step: int) -> Iterator[None]:
        """A teacher that stays away ends the run with a checkpoint of what was done before this batch.

        The weights are still those: only the first update on a batch asks a teacher. Of several processes one
        may find the teacher away while others wait for it, so these go back to their last checkpoint.
        """
        try:
            yield
        except Unavailable:
            saved = [checkpoint.step for checkpoint in checkpoints.find_checkpoints(self.folder.checkpoints)]
            if self.processes.count == 1 and step > max(saved, default=0):
                self._save(step)
            raise

    def _check(self, planned: int, rows: Sequence[Row]) -> None:
        self.stepper.together(
            lambda: check_first_prompts(self.recipe, self.components, self.stepper, planned, rows)
        )

    def _step(self, step: int, batch: Batch, began_s: float) -> tuple[dict[str, Any], Batch]:
        """One optimiser step: (its row of metrics, the batch for the next update on it)."""
        lr = learning_rate(step, self.plan.total_steps, self.recipe.optim)
        for group in self.components.optimizer.param_groups:
            group["lr"] = lr
        before = self.probe.read()
        result = self.stepper.update(step, batch)
        return self._report(step, result, before, lr, time.perf_counter() - began_s), result.batch

    def _report(
        self, step: int, result: StepResult, before: torch.Tensor, lr: float, seconds: float
    ) -> dict[str, Any]:
        """Gathers what all processes measured, and writes the step's rows."""
        from accelerate.utils import gather_object

        measured = gather_object(list(result.measured))
        as_held, as_bf16, read = map(sum, zip(*gather_object([self.probe.changed(before)]), strict=True))
        row: dict[str, Any] = {
            "step": step + 1,
            **step_metrics(measured),
            "loss": math.fsum(gather_object([result.loss])),
            "update/grad_norm": result.grad_norm,
            "update/lr": lr,
            "update/done": int(result.updated),
            "weights/changed": as_held / read,
            "weights/changed_bf16": as_bf16 / read,
            **token_counts(
                measured,
                self.components.method.needs,
                prefix_engine=self.recipe.model.engine == "prefix",
                continued_prefill=result.continued_prefill,
            ),
            **self.watch.take(STAGES),
            "time/step_s": seconds,
        }
        records = sorted(gather_object(list(result.records)), key=lambda r: (r.position, r.index))
        shown = records[: self.recipe.run.log_rollouts]
        self.processes.on_first(lambda: self._write_rows(row, shown))
        numbers = {key: value for key, value in row.items() if key != "step" and math.isfinite(value)}
        self.accelerator.log(numbers, step=step + 1)
        return row

    def _write_rows(self, row: Mapping[str, Any], shown: Sequence[RolloutRecord]) -> None:
        decode = text_of_token(self.components.processor)
        append_jsonl(self.folder.rollouts, [rollout_row(row["step"], record, decode) for record in shown])
        append_jsonl(self.folder.metrics, [row])

    def _save(self, step: int) -> None:
        from accelerate.utils import gather_object

        with self.watch.stage("checkpoint"):
            weights, optimizer = self.stepper.shards.states(self.components.optimizer)
            training = {"optimizer": optimizer, "random": gather_object([checkpoints.random_state()])}
            self.processes.on_first(lambda: self._write_checkpoint(step, weights, training))

    def _write_checkpoint(
        self, step: int, weights: dict[str, torch.Tensor] | None, training: Mapping[str, Any]
    ) -> None:
        checkpoints.save_checkpoint(
            self.folder.checkpoints,
            step,
            model=self.components.model,
            processor=self.components.processor,
            training=training,
            recipe=self.recipe,
            weights=weights,
            rows={sealer.path.name: sealer.seal() for sealer in self.sealers},
            inputs=self.inputs,
        )


def _progress(row: Mapping[str, Any]) -> str:
    """The number beside the progress bar: the first of PROGRESS that the method has, or the loss."""
    for key, name in PROGRESS.items():
        if math.isfinite(row[key]):
            return f"{name} {row[key]:.3f}"
    return f"loss {row['loss']:.3f}"


def learning_rate(step: int, total: int, optim: OptimConfig) -> float:
    """The learning rate of step ``step`` (from 0) of ``total``. It needs no scheduler that a resume would
    have to restore.

    The warm-up is linear and reaches ``optim.lr`` at step ``warmup_steps``. ``linear`` and ``cosine`` then
    fall towards 0, which the step after the last would have.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    done = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    if optim.schedule == "linear":
        return optim.lr * (1.0 - done)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1.0 + math.cos(math.pi * done))
    return optim.lr


@contextmanager
def _closing_sampler(components: Components) -> Iterator[None]:
    """Another engine that samples is there for the steps only: evaluation is the student's own."""
    try:
        yield
    finally:
        if components.sampler is not None:
            components.sampler.close()


@contextmanager
def _trackers(recipe: Recipe, accelerator: Accelerator, start: int) -> Iterator[None]:
    if recipe.run.trackers:
        settings = {
            key: value if isinstance(value, int | float | str) else json.dumps(value)
            for key, value in flatten(recipe.to_dict())
        }
        # A resume makes the steps after its checkpoint again; their rows replace the earlier ones.
        kwargs = {"tensorboard": {"purge_step": start + 1}} if "tensorboard" in recipe.run.trackers else {}
        accelerator.init_trackers("video-opd", config=settings, init_kwargs=kwargs)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training would also disconnect the processes
            tracker.finish()


def _checkpoint_to_continue(folder: RunFolder) -> checkpoints.Checkpoint | None:
    """The newest intact checkpoint up to which the rows are as they were written, so that lost and changed
    rows are made again. If there is none of these, the newest intact one. None: the run begins anew."""
    newest = None
    for found in checkpoints.intact_checkpoints(folder.checkpoints):
        changed = folder.changed_rows(found.rows)
        if changed:
            log(f"{changed[0]}: rows up to step {found.step} were changed or lost since they were written")
        # Earlier versions sealed nothing: there, the rows are counted.
        elif folder.metrics.name in found.rows or found.step <= folder.reported_steps():
            if newest is not None:
                log(f"the steps after {found.step} are made again, with their rows")
            return found
        newest = newest or found
    if newest is not None:
        log(
            f"{newest.path} continues after {newest.step}: the rows that are lost stay lost, and those that "
            "were changed stay as they are"
        )
    elif folder.metrics.exists() and folder.metrics.stat().st_size:
        log(f"no intact checkpoint is left in {folder.checkpoints}: the run begins anew")
    return newest


def _resume(saved: checkpoints.Checkpoint | None, components: Components, accelerator: Accelerator) -> int:
    """Restores the optimiser and the random states, and returns the steps done. Weights are loaded before."""
    if saved is None:
        return 0
    state = checkpoints.load_training_state(saved)
    try:
        load_optimizer_state(components.model, components.optimizer, state["optimizer"], components.masters)
        states = state["random"]
        checkpoints.restore_random_state(states[accelerator.process_index % len(states)])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{saved.path}: its training state does not fit the model ({error!r}); if this one alone is "
            "damaged, delete the folder to continue from the checkpoint before it"
        ) from error
    log(f"continuing after step {saved.step} ({saved.path})")
    return saved.step


def _finish(recipe: Recipe, processes: Processes, folder: RunFolder, components: Components) -> RunResult:
    """Writes and evaluates the model; a LoRA run's adapters are merged into it."""
    Shards(components.model, components.masters, by_layer=recipe.model.gather == "layer").dissolve()
    processes.on_first(lambda: _write_adapters(folder, components))
    save_dtype = getattr(torch, recipe.run.save_dtype)
    if processes.first or not _only_first_is_whole(components):
        restore_base(components.model, recipe)
        merge_adapters(components.model, save_dtype)
        cast_weights(components.model, save_dtype)
    processes.on_first(lambda: _write_model(recipe, folder, components))
    policy = _trained_policy(recipe, processes, folder, components)
    evaluate_student(recipe, policy, components.evaluation_loader, folder, processes)
    processes.on_first(lambda: record_failures(recipe, policy, components, folder))
    processes.on_first(lambda: _write_results(recipe, folder, components))
    return _result(folder)


def _only_first_is_whole(components: Components) -> bool:
    """Whether the other processes have no master weights after the last step."""
    return is_sharded(components.model) or components.masters is not None


def _write_adapters(folder: RunFolder, components: Components) -> None:
    if has_adapters(components.model):  # before model/, which says that all is there
        checkpoints.save_adapter_folder(components.model, folder.adapter)


def _write_model(recipe: Recipe, folder: RunFolder, components: Components) -> None:
    if not folder.model.is_dir():
        card = model_card(recipe, folder, components.samples)
        checkpoints.save_model_folder(components.model, components.processor, folder.model, recipe, card)


def _trained_policy(
    recipe: Recipe, processes: Processes, folder: RunFolder, components: Components
) -> Policy:
    """The trained student in this process."""
    policy = components.policy
    on_device = processes.first and recipe.model.gather == "step"
    if on_device or not _only_first_is_whole(components):
        return policy
    assert isinstance(policy, HFPolicy), "nothing else is sharded"
    model, processor = load_model(
        folder.model, dtype=recipe.run.save_dtype, device=policy.device, attn=recipe.model.attn
    )
    return HFPolicy(model, processor, policy.engine, compute_dtype=policy.compute_dtype)


def _write_results(recipe: Recipe, folder: RunFolder, components: Components) -> None:
    card = model_card(recipe, folder, components.samples)  # with its metrics
    write_text(folder.model / checkpoints.CARD, card)
    write_text(folder.done, json.dumps({"steps": folder.last_metrics().get("step", 0)}) + "\n")
    log(f"wrote {folder.model}")


def _result(folder: RunFolder) -> RunResult:
    metrics = folder.last_metrics()
    return RunResult(path=folder.path, model=folder.model, steps=metrics.get("step", 0), metrics=metrics)


def _machine(accelerator: Accelerator, recipe: Recipe) -> dict[str, Any]:
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "processes": accelerator.num_processes, "seed": recipe.run.seed}


def _settle(device: torch.device) -> Callable[[], None]:
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
