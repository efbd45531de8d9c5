"""What has to change in a recipe that does not fit: the smallest changes that make it, as recipe lines."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from video_opd.config import Recipe
from video_opd.config.tree import flatten
from video_opd.errors import UserError
from video_opd.planning.plan import Plan, RecipeSizes, make_plan
from video_opd.types import Sample


@dataclass(frozen=True, kw_only=True)
class Change:
    """Settings that save memory. ``price`` says how much they change a run, ``costs`` in what way: first what
    leaves the result alone, then what rounds, then what trains less. They cannot be combined with
    changes of the keys in ``excludes``, and some need several processes, or exactly one."""

    settings: Mapping[str, Any]
    price: int
    costs: str
    needs_processes: bool = False
    needs_one_process: bool = False
    excludes: Sequence[str] = ()


#: Settings of an optimiser that is neither in shards nor on the CPU.
IN_ONE_PLACE = {
    "model.sharding": None,
    "model.reduce": "step",
    "model.gather": "step",
    "optim.offload": False,
}


#: In the order of their price, but for the last one, which rests on the adapters before it. Every recipe has
#: all of these keys.
CHANGES: Sequence[Change] = (
    Change(settings={"teacher.micro_batch_size": 1}, price=2, costs="the teacher reads one prompt at a time"),
    Change(settings={"optim.micro_batch_size": 1}, price=3, costs="one prompt at a time"),
    Change(
        settings={"model.gradient_checkpointing": True},
        price=4,
        costs="each layer's forward is run once more",
    ),
    Change(
        settings={"model.sharding": "fsdp2"},
        price=4,
        costs="weights are exchanged once a step",
        needs_processes=True,
    ),
    Change(
        settings={"model.reduce": "micro_batch"},
        price=5,
        costs="gradients are exchanged after each micro-batch",
        needs_processes=True,
    ),
    Change(
        settings={"teacher.placement": "sharded"},
        price=6,
        costs="the teacher's layers are exchanged in each of its forwards",
        needs_processes=True,
    ),
    Change(settings={"teacher.dtype": "bfloat16"}, price=7, costs="the teacher computes in bfloat16"),
    Change(settings={"model.dtype": "bfloat16"}, price=8, costs="the student computes in bfloat16"),
    Change(settings={"optim.offload": True}, price=12, costs="the optimiser works on the CPU"),
    Change(
        settings={"teacher.placement": "cpu"},
        price=14,
        costs="the teacher is copied to the GPU for each turn",
    ),
    Change(
        settings={"teacher.quantization": "int8"},
        price=16,
        costs="the teacher's weights are rounded to 8 bits",
        excludes=["teacher.placement"],
    ),
    Change(
        settings={"model.sharding": "fsdp2", "model.gather": "layer"},
        price=18,
        costs="the student's layers are exchanged in each of its passes",
        needs_processes=True,
        excludes=["model.sharding", "model.gradient_checkpointing"],
    ),
    Change(
        settings={"optim.moments": "int8", **IN_ONE_PLACE},
        price=20,
        costs="the optimiser's moments are rounded to 8 bits",
        needs_one_process=True,
        excludes=[*IN_ONE_PLACE],
    ),
    Change(
        settings={"model.weights": "bfloat16", **IN_ONE_PLACE},
        price=24,
        costs="weights are rounded stochastically, to bfloat16",
        needs_one_process=True,
        excludes=[*IN_ONE_PLACE, "lora.parts"],
    ),
    Change(
        settings={"lora.parts": ["vision", "merger", "language"], "model.freeze": ["lm_head"]},
        price=60,
        costs="adapters are trained in place of the weights",
    ),
    Change(
        settings={
            "lora.base_quantization": "int8",
            "model.sharding": None,
            "model.reduce": "step",
            "model.gather": "step",
        },
        price=20,
        costs="the frozen base is rounded to 8 bits",
        needs_one_process=True,
        excludes=["model.sharding", "model.reduce", "model.gather"],
    ),
)
MOST_TRIED = 3000  # sets of changes


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Changes that make a recipe fit, and the plan with them. If ``plan.fits`` is False, no set of changes
    suffices, and this one comes nearest."""

    changes: Sequence[Change]
    plan: Plan

    @property
    def settings(self) -> dict[str, Any]:
        return {key: value for change in self.changes for key, value in change.settings.items()}

    @property
    def overrides(self) -> list[str]:
        """The settings as a command takes them: ``["--model.reduce", "micro_batch", …]``."""
        words = []
        for key, value in self.settings.items():
            words += [f"--{key}", _plain(value)]
        return words

    @property
    def tree(self) -> dict[str, dict[str, Any]]:
        """The settings as sections of a recipe."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in self.settings.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        return sections

    @property
    def lines(self) -> list[str]:
        """The same as YAML, a line a section."""
        return [
            f"{section}: {{{', '.join(f'{key}: {_plain(value)}' for key, value in keys.items())}}}"
            for section, keys in self.tree.items()
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "fits": self.plan.fits,
            "peak_bytes": self.plan.memory.peak,
            "recipe": self.tree,
            "overrides": self.overrides,
            "changes": [{"settings": dict(c.settings), "costs": c.costs} for c in self.changes],
        }


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def suggest(
    recipe: Recipe,
    processes: int,
    memory_bytes: int,
    *,
    samples: Sequence[Sample] | None = None,
    sizes: RecipeSizes | None = None,
    cuda: bool = True,
) -> Suggestion:
    """The cheapest set of changes with which ``recipe`` fits; none where it fits as it is.

    Sets are tried in the order of their price. If no set fits, the one that needs least memory is returned.
    Raises :class:`UserError` for settings that no set makes possible with so many processes.
    """
    sizes = sizes or RecipeSizes.of(recipe)

    def planned(changes: Sequence[Change]) -> Plan | None:
        settings = {key: value for change in changes for key, value in change.settings.items()}
        try:
            changed = recipe.changed(**settings)
            return make_plan(changed, processes, memory_bytes, samples=samples, sizes=sizes, cuda=cuda)
        except UserError:  # settings that exclude each other
            return None

    useful = [change for change in _changes(recipe) if _applies(change, recipe, processes)]
    whole = [Suggestion(changes=tried, plan=plan) for tried in _largest(useful) if (plan := planned(tried))]
    if not whole:
        recipe.check_processes(processes)
    least = min(whole, key=lambda each: each.plan.memory.peak)
    if not least.plan.fits:
        return _without_useless(least, planned)
    for changes in itertools.islice(_cheapest_first(useful), MOST_TRIED):
        plan = planned(changes)
        if plan is not None and plan.fits:
            return Suggestion(changes=changes, plan=plan)
    return least


def gpus_needed(
    recipe: Recipe,
    processes: int,
    memory_bytes: int,
    *,
    samples: Sequence[Sample] | None = None,
    sizes: RecipeSizes | None = None,
) -> int | None:
    """The smallest power of two times ``processes`` with which some settings fit, or None if 64 times do
    not."""
    for count in (processes * 2**i for i in range(1, 7)):
        try:
            found = suggest(recipe, count, memory_bytes, samples=samples, sizes=sizes)
        except UserError:  # so many processes cannot run it
            continue
        if found.plan.fits:
            return count
    return None


def _without_useless(
    suggestion: Suggestion, planned: Callable[[Sequence[Change]], Plan | None]
) -> Suggestion:
    """The same without changes that save nothing beside the others."""
    for change in reversed(suggestion.changes):
        fewer = [other for other in suggestion.changes if other is not change]
        plan = planned(fewer)
        if plan is not None and plan.memory.peak <= suggestion.plan.memory.peak:
            suggestion = Suggestion(changes=fewer, plan=plan)
    return suggestion


def _changes(recipe: Recipe) -> Iterator[Change]:
    """``CHANGES`` without what the recipe has already, and with adapters on all parts that it does not
    freeze."""
    present = dict(flatten(recipe.to_dict()))
    for change in CHANGES:
        if "lora.parts" not in change.settings:
            new = {key: value for key, value in change.settings.items() if present[key] != value}
            if new:
                yield replace(change, settings=new)
            continue
        frozen = {*recipe.model.freeze, "lm_head"}
        parts = [part for part in change.settings["lora.parts"] if part not in frozen]
        if parts:
            yield replace(change, settings={"lora.parts": parts, "model.freeze": sorted(frozen)})


def _applies(change: Change, recipe: Recipe, processes: int) -> bool:
    """Whether the change is one for so many processes, and the recipe has other values."""
    if (change.needs_processes and processes == 1) or (change.needs_one_process and processes > 1):
        return False
    present = dict(flatten(recipe.to_dict()))
    return any(present[key] != value for key, value in change.settings.items())


def _exclude(one: Change, other: Change) -> bool:
    """Whether they set a key to two values, or a recipe refuses the one beside the other."""
    differ = any(one.settings[key] != other.settings[key] for key in {*one.settings} & {*other.settings})
    return differ or any(
        key in theirs.settings and theirs.settings[key] != ours.settings.get(key, theirs)
        for ours, theirs in ((one, other), (other, one))
        for key in ours.excludes
    )


def _largest(useful: Sequence[Change]) -> Iterator[Sequence[Change]]:
    """The empty set, and every set that leaves out nothing but choices.

    A choice is a change that excludes another, or one of where the teacher is: the recipe's own place may
    need less.
    """
    yield ()
    choices = [
        change
        for change in useful
        if "teacher.placement" in {*change.settings, *change.excludes}
        or any(_exclude(change, other) for other in useful if other is not change)
    ]
    for size in range(len(choices) + 1):
        for left_out in itertools.combinations(choices, size):
            kept = [change for change in useful if change not in left_out]
            if not any(_exclude(*pair) for pair in itertools.combinations(kept, 2)):
                yield kept


def _cheapest_first(useful: Sequence[Change]) -> Iterator[Sequence[Change]]:
    """All sets of changes that do not exclude each other, in the order of their price."""
    tie = itertools.count()
    queue: list[tuple[int, int, tuple[int, ...]]] = [(0, next(tie), ())]
    while queue:
        price, _, chosen = heapq.heappop(queue)
        changes = [useful[i] for i in chosen]
        yield changes
        for i in range(chosen[-1] + 1 if chosen else 0, len(useful)):
            if not any(_exclude(useful[i], change) for change in changes):
                heapq.heappush(queue, (price + useful[i].price, next(tie), (*chosen, i)))
