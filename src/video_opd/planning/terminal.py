"""A plan as lines for people. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from video_opd.planning.host import HOST_PARTS, HostMemory
from video_opd.planning.memory import GIB
from video_opd.planning.plan import Plan, table_of
from video_opd.planning.suggest import Suggestion
from video_opd.progress import duration
from video_opd.terminal import columns


def plan_lines(plan: Plan) -> Iterator[str]:
    """The record of ``video-opd plan``."""
    setup, work = plan.setup, plan.work
    yield f"student {_model(plan.sizes.student)}" + "".join(
        f", teacher {_model(teacher)}" for teacher in plan.sizes.teachers
    )
    rows = f"{work.rows:,} rows" + (", assumed: the data file is not here" if work.rows_assumed else "")
    yield (
        f"prompts of at most {work.prompt_tokens:,} tokens, {work.video_tokens:,} of them of the video; "
        f"{work.prompts_a_step} in a step of each GPU, {work.micro_batch} at a time; {rows}"
    )
    yield from plan.reasons
    yield ""
    yield f"GiB on the fullest GPU, when it is fullest ({plan.memory.fullest}):"
    table = [(part, f"{size / GIB:.1f}", what) for part, size, what in table_of(plan)]
    numbers = columns([(part, size) for part, size, _ in table] + [("sum", f"{plan.memory.peak / GIB:.1f}")])
    for line, (_, _, what) in zip(numbers, table, strict=False):
        yield f"  {line}  {what}"
    yield f"  {numbers[-1]}  {_verdict(plan)}"
    yield ""
    if plan.host is not None:
        yield from _host_lines(plan.host, setup.processes)
        yield ""
    yield f"time at {plan.rate_tflops:g} TFLOP/s, for the longest prompts and without waiting:"
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in plan.times.stages_s.items() if seconds)
    yield f"  a step {plan.times.step_s:.1f} s ({stages})"
    yield f"  the run, {work.steps:,} steps: {duration(plan.times.run_s)}"
    if plan.times.candidate_s is not None and plan.times.scoring_s is not None:
        yield (
            f"  scoring a candidate {plan.times.candidate_s:.1f} s on one GPU, "
            f"all {work.rows:,} rows on {_gpus(setup.processes)}: {duration(plan.times.scoring_s)}"
        )


def _host_lines(host: HostMemory, processes: int) -> Iterator[str]:
    yield f"GiB of the host's memory, beside Python's own and {host.pages / GIB:.1f} of files' pages:"
    for line, part in zip(
        columns([(part, f"{size / GIB:.1f}") for part, size in host.parts.items()]), host.parts, strict=True
    ):
        yield f"  {line}  {HOST_PARTS[part]}"
    each = f"{host.each / GIB:.1f} in each process, " if processes > 1 else ""
    yield (
        f"  {each}{processes * host.each / GIB:.1f} in all, and {host.saving / GIB:.1f} more in the first "
        "process while it writes a checkpoint"
    )


def suggestion_lines(suggestion: Suggestion, larger: int | None) -> Iterator[str]:
    """The changes, first as a recipe has them and then as a command does. ``larger`` is a number of GPUs with
    which some changes fit, if these do not."""
    plan = suggestion.plan
    if not suggestion.changes and plan.fits:
        yield "# it fits as it is: nothing has to change"
        return
    if plan.fits:
        yield f"# it fits with these lines in the recipe: {_sum(plan)}"
    elif suggestion.changes:
        yield f"# it does not fit, whatever is changed; these lines come nearest: {_sum(plan)}"
    else:
        yield "# it does not fit, and no setting makes it smaller"
    for change in suggestion.changes:
        keys = ", ".join(change.settings)
        yield f"# {keys}: {change.costs}"
    yield from suggestion.lines
    if suggestion.changes:
        yield f"# or: {' '.join(map(_word, suggestion.overrides))}"
    if not plan.fits and larger is not None:
        yield f"# {_gpus(larger)} of this size would do"


def _model(sizes: object) -> str:
    return f"{sizes.name} ({sizes.weights / 1e9:.2f} billion weights)"  # type: ignore[attr-defined]


def _gpus(count: int) -> str:
    return "one GPU" if count == 1 else f"{count} GPUs"


def _verdict(plan: Plan) -> str:
    if plan.limit is None:
        return ""
    spare = (plan.limit - plan.memory.peak) / GIB
    limit = f"of {plan.limit / GIB:.1f} on each of {_gpus(plan.setup.processes)}"
    if plan.fits:
        return f"{limit}: fits, {spare:.1f} to spare"
    return f"{limit}: does not fit, {-spare:.1f} too many" if spare < 0 else f"{limit}: too tight"


def _sum(plan: Plan) -> str:
    assert plan.limit is not None
    return f"{plan.memory.peak / GIB:.1f} GiB of {plan.limit / GIB:.1f}"


def _word(word: str) -> str:
    return f"'{word}'" if set(word) & set("[] ") else word
