"""Runs on random tiny Qwen3-VL models and noise videos: everything real but the data's origin."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from model_cases import encode, model, processor
from process_cases import wait_until

from video_opd.algorithms.registry import make_method
from video_opd.cli import main
from video_opd.config import Recipe, recipe_from_dict
from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl
from video_opd.models.checkpoint_files import is_adapter_folder
from video_opd.models.grouped_attention import use_grouped_heads
from video_opd.models.interfaces import Teacher
from video_opd.models.loading import DTYPES, load_model
from video_opd.models.lora import has_adapters, trained_in_full
from video_opd.models.patch_embedding import use_linear_patches
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import AdaptersOffReference
from video_opd.processes import Processes
from video_opd.training.components import Components, adapt, freeze, usable_samples, wrap_for_training
from video_opd.training.loop import train
from video_opd.training.placement import place
from video_opd.training.run_folder import RunFolder
from video_opd.training.sharding import gathers_by_layer
from video_opd.types import EncodedPrompt, Sample

# Modules that are imported late, by functions that only several processes call.
ONLY_IN_SEVERAL = (
    "accelerate",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
)
# These keys differ between two runs that are otherwise the same.
UNREPEATABLE = ("time/",)


def make_recipe(run_dir: Path, method: str = "video-opd", **sections: Any) -> Recipe:
    tree: dict[str, Any] = {
        "method": method,
        "model": {"path": "base"},
        "teacher": {"path": "teacher"},
        "data": {"train": "train.jsonl", "workers": 0},
        "sampling": {"max_new_tokens": 4},
        "optim": {"lr": 1e-3, "batch_size": 4, "micro_batch_size": 2},
        "run": {"dir": str(run_dir), "trackers": [], "save_every": 2, "check": False},
    }
    for name, keys in sections.items():
        tree[name] = {**tree.get(name, {}), **keys}
    return recipe_from_dict(tree)


@lru_cache(maxsize=32)
def sample(i: int) -> Sample:
    return Sample(
        id=f"s{i}",
        video=Path(f"v{i // 2}.mp4"),
        query=f"query {i}",
        duration_s=2.0 + i % 3,
        spans=((0.25, 1.5),) if i % 4 else (),
    )


@lru_cache(maxsize=32)
def prompt(i: int) -> EncodedPrompt:
    return encode(f"when does the red circle appear {i}?", frames=4 + 2 * (i % 2), video_seed=i)


@lru_cache(maxsize=4)
def frozen_teacher(seed: int) -> Any:
    """A model that runs share: none of them changes it."""
    return model(seed, sharpness=8.0).requires_grad_(False)


class Build:
    """Stands in for ``build_components``: the same models, without folders and files to load them from."""

    shares_teacher = True  # with the other runs of this process

    def __init__(
        self,
        rows: int = 8,
        *,
        broken: Sequence[str] = (),
        teacher_seed: int = 1,
        engine: Any = "prefix",
        student: Callable[..., Any] = model,
    ) -> None:
        self.rows, self.broken, self.teacher_seed, self.engine = rows, broken, teacher_seed, engine
        self.student = student

    def __call__(
        self, recipe: Recipe, accelerator: Any, folder: RunFolder, weights: str | Path
    ) -> Components:
        if Path(weights).is_dir() and not is_adapter_folder(weights):
            finished = Path(weights) == folder.model
            student, _ = load_model(
                weights, dtype=recipe.run.save_dtype if finished else recipe.model.weights
            )
        else:
            student = self.base()
        method = make_method(recipe, processor().tokenizer)
        if recipe.lora.parts and Path(weights) != folder.model:
            adapt(student, recipe, weights)
        else:
            freeze(student, recipe.model)
        forward_module, optimizer, masters = wrap_for_training(recipe, accelerator, student)
        by_layer = gathers_by_layer(recipe)
        recompute = by_layer or bool(recipe.model.gradient_checkpointing)
        policy = HFPolicy(
            student,
            processor(),
            self.engine,
            compute_dtype=None if recipe.model.dtype == "float32" else DTYPES[recipe.model.dtype],
            forward_module=forward_module,
            recompute=recompute and not by_layer,
        )
        return Components(
            model=student,
            forward_module=forward_module,
            policy=policy,
            plain=HFPolicy(student, processor(), "plain"),
            teacher=self.teacher(recipe, accelerator, policy) if method.needs.teacher else None,
            reference=self.reference(recipe, accelerator, policy) if method.needs.reference else None,
            method=method,
            optimizer=optimizer,
            masters=masters,
            recompute=recompute,
            processor=processor(),
            samples=usable_samples(recipe, method, [sample(i) for i in range(self.rows)]),
            loader=self.load,
            evaluation_loader=self.load,
        )

    def base(self) -> Any:
        made = self.student(0, sharpness=8.0)
        use_linear_patches(made)  # as models that are loaded
        use_grouped_heads(made)
        return made

    def teacher(self, recipe: Recipe, accelerator: Any, policy: HFPolicy) -> Teacher:
        shared = self.shares_teacher and recipe.teacher.placement in ("auto", "whole")
        made = frozen_teacher(self.teacher_seed) if shared else model(self.teacher_seed, sharpness=8.0)
        return self.placed(recipe, accelerator, HFPolicy(made, processor(), self.engine))

    def reference(self, recipe: Recipe, accelerator: Any, policy: HFPolicy) -> Teacher:
        if has_adapters(policy.model) and not trained_in_full(policy.model):
            return AdaptersOffReference(policy)
        return self.placed(recipe, accelerator, HFPolicy(self.base(), processor(), self.engine))

    def placed(self, recipe: Recipe, accelerator: Any, policy: HFPolicy) -> Teacher:
        asked = recipe.teacher.placement
        return place(policy, "whole" if asked == "auto" else asked, accelerator.device, "raise")

    def load(self, samples: Sequence[Sample]) -> Iterator[tuple[Sample, EncodedPrompt]]:
        return ((s, prompt(int(s.id[1:]))) for s in samples if s.id not in self.broken)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def repeatable(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(UNREPEATABLE)} for row in rows]


def a_reward(sample: Sample, text: str) -> float:
    """A reward without meaning that differs between responses: random models write no time spans."""
    return sum(map(ord, text)) % 11 / 11


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(path)]


def assert_same_run(a: Path, b: Path) -> None:
    """The runs are equal bit for bit, but for the seconds."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert repeatable(rows_of(a / name)) == repeatable(rows_of(b / name))
    mine, theirs = weights_of(a), weights_of(b)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def assert_equal_to_rounding(a: Path, b: Path) -> None:
    keys = ["loss", "reverse_kl/sampled", "reverse_kl/analytic", "update/grad_norm", "reward/std"]
    keys += ["response/nll"]
    for x, y in zip(rows_of(a / "metrics.jsonl"), rows_of(b / "metrics.jsonl"), strict=True):
        for key in keys:
            measured = x[key], y[key]  # null where the method has no such thing
            assert measured == (None, None) or math.isclose(*measured, rel_tol=2e-3, abs_tol=1e-6), key
        for key in ("rollouts", "tokens/response", "tokens/video", "response/length_max"):
            assert x[key] == y[key]
    for x, y in zip(rows_of(a / "rollouts.jsonl"), rows_of(b / "rollouts.jsonl"), strict=True):
        assert (x["id"], x["token_ids"]) == (y["id"], y["token_ids"])
    mine, theirs = weights_of(a), weights_of(b)
    # Adam divides by |g|: a gradient that is all rounding may turn round. So compare what all weights did.
    off = torch.cat([(mine[key] - theirs[key]).flatten() for key in mine])
    assert off.abs().mean() < 1e-6  # lr is 1e-3, and there were four steps


def worker(rank: int, world: int, port: int, recipe: Recipe, build: Build) -> None:
    _train_each(rank, world, port, [recipe], build)


def _train_each(rank: int, world: int, port: int, recipes: Sequence[Recipe], build: Build) -> None:
    for recipe in recipes:
        _be_one_of(rank, world, port)
        train(recipe, build)


def train_on_two(build: Build, *recipes: Recipe) -> None:
    """Trains by one recipe after the other in two connected forks, which end without an error."""
    forks = TwoForks()
    forks.train(build, *recipes)
    forks.end()


class TwoForks:
    """Two connected forks that train for one test after another. What torch prepares for the operations on
    shards, in each process anew, is prepared once."""

    def __init__(self) -> None:
        import_once()
        port, context = free_port(), multiprocessing.get_context("fork")
        pipes = [context.Pipe() for _ in range(2)]
        self._ends = [end for end, _ in pipes]
        self._forks = [
            context.Process(target=self._work, args=(rank, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._forks:
            process.start()

    def train(self, build: Build, *recipes: Recipe) -> None:
        """Trains by one recipe after the other; a fork that fails, or hangs, fails the test."""
        for end in self._ends:
            end.send((recipes, build))
        for end, process in zip(self._ends, self._forks, strict=True):
            ready = multiprocessing.connection.wait([end, process.sentinel], timeout=900)
            assert ready == [end], f"one of two processes ended with {process.exitcode}, or hangs"
            end.recv()

    def end(self) -> None:
        for process in self._forks:
            process.kill()
            process.join()

    def _work(self, rank: int, port: int, pipe: Any) -> None:
        for end in self._ends:
            end.close()
        while True:
            recipes, build = pipe.recv()
            _train_each(rank, 2, port, recipes, build)
            pipe.send("done")


@lru_cache(maxsize=1)
def import_once() -> None:
    """Imports what each of several forks would import otherwise."""
    for name in ONLY_IN_SEVERAL:
        importlib.import_module(name)


def _be_one_of(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # the parent's single process is inherited by the fork


def said_by_two(words: Sequence[str], folder: Path) -> tuple[list[int | None], list[str]]:
    """The exit codes of a command in two processes, and the lines that both wrote to stderr."""

    def run(rank: int, port: int) -> None:
        _be_one_of(rank, 2, port)
        sys.stderr = open(folder / f"stderr-{rank}", "w", encoding="utf-8")  # noqa: SIM115
        os._exit(main(words))

    port, context = free_port(), multiprocessing.get_context("fork")
    forks = [context.Process(target=run, args=(rank, port)) for rank in range(2)]
    for process in forks:
        process.start()
    codes = finish(forks)
    said = [(folder / f"stderr-{rank}").read_text(encoding="utf-8").splitlines() for rank in range(2)]
    return codes, [line for lines in said for line in lines]


def launched(count: int, work: Callable[[], object]) -> None:
    """``work`` in ``count`` workers of torchrun's own agent, in the environment that it gives them.

    The agent and its workers are forks of this process: none of them imports torch again. An error of one of
    them fails the test. ``work`` must not decode: that hangs in a fork of a process that has decoded.
    """
    import_once()
    process = multiprocessing.get_context("fork").Process(target=_launch, args=(count, work))
    process.start()
    assert finish([process]) == [0]


def _launch(count: int, work: Callable[[], object]) -> None:
    from accelerate.state import AcceleratorState
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    for name in [name for name in os.environ if name.startswith("ACCELERATE")]:
        del os.environ[name]
    # As ``torchrun --standalone`` has it, but for the way in which the workers are started.
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )

    def worker() -> None:
        # The end of the agent's store waits for its thread, which a fork does not have: no collection may
        # find it there.
        gc.freeze()
        gc.enable()
        work()

    gc.disable()
    elastic_launch(config, worker)()


def start(*arguments: Any) -> Any:
    """A fork of this process: torch and transformers are imported once."""
    process = multiprocessing.get_context("fork").Process(target=worker, args=arguments)
    process.start()
    return process


def alone(work: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    work(*arguments)


def fork(work: Callable[..., Any], *arguments: Any) -> Any:
    """``work`` in a fork of this process, to be killed."""
    process = multiprocessing.get_context("fork").Process(target=alone, args=(work, *arguments))
    process.start()
    return process


_ports = itertools.count()


def free_port() -> int:
    """A port that nobody takes before it is used: the kernel gives out higher ones, other tests others."""
    for number in _ports:
        port = 10_000 + (os.getpid() % 1000) * 20 + number % 20
        with contextlib.closing(socket.socket()) as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port
    raise AssertionError("the numbers never end")


def finish(processes: Sequence[Any]) -> list[int | None]:
    """The exit codes of processes; None for one that hangs, which is killed."""
    for process in processes:
        process.join(timeout=900)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def kill_later(process: Any, folder: RunFolder, after_s: float) -> None:
    """Kills a start ``after_s`` seconds after everything is loaded, whatever it is doing then."""
    before = started_ns(folder)
    wait_until(lambda: process.exitcode is not None or started_ns(folder) != before)
    time.sleep(after_s)
    process.kill()
    process.join()


def started_ns(folder: RunFolder) -> int:
    """Every start writes the environment just before its first step."""
    return folder.environment.stat().st_mtime_ns if folder.environment.exists() else 0


class Watched(Build):
    """Keeps the components, and a copy of every response that was sampled."""

    def __call__(self, *arguments: Any) -> Any:
        self.components = super().__call__(*arguments)
        sample = self.components.policy.sample
        self.sampled: list[Any] = []

        def watched(prefix: Any, **kwargs: Any) -> Any:
            groups = sample(prefix, **kwargs)
            self.sampled.append((prefix.prompts, [[r.token_ids for r in group] for group in groups]))
            return groups

        self.components.policy.sample = watched  # type: ignore[method-assign,assignment]
        return self.components


def in_processes(count: int, work: Callable[[Processes], Any], folder: Path) -> list[Any]:
    """Returns the outcome of ``work`` in each of ``count`` forks: its value, error text, or "killed"."""

    def run(rank: int, port: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            value = work(Processes.of_environment())
        except UserError as error:
            value = str(error)
        (folder / f"result-{rank}.json").write_text(json.dumps(value))

    port, context = free_port(), multiprocessing.get_context("fork")
    forks = [context.Process(target=run, args=(rank, port)) for rank in range(count)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(60)
        assert fork.exitcode in (0, -signal.SIGKILL)
    values = []
    for rank, fork in enumerate(forks):
        file = folder / f"result-{rank}.json"
        values.append(json.loads(file.read_text()) if fork.exitcode == 0 else "killed")
        file.unlink(missing_ok=True)
    return values
