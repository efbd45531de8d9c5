"""All experiments: one module each, which holds its runs, its result and what that says of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

from video_opd.errors import UserError
from video_opd.progress import log
from video_opd.reproduce import (
    appendix_a,
    distance,
    estimators,
    figure_4,
    figure_6,
    long_rounds,
    table_1,
    table_2,
    table_3,
    table_8,
)
from video_opd.world.shipped import shipped

_TABLES_AND_FIGURES = (table_1, table_2, table_3, table_8, figure_4, figure_6, appendix_a)
_MODULES = (*_TABLES_AND_FIGURES, distance, estimators, long_rounds)
EXPERIMENTS: Mapping[str, ModuleType] = {module.NAME: module for module in _MODULES}
SUITES = tuple(dict.fromkeys(module.SUITE for module in EXPERIMENTS.values()))


def chosen(suite: str) -> Sequence[ModuleType]:
    """The experiments of a suite, or the one of that name. Raises UserError if there is none."""
    found = [module for name, module in EXPERIMENTS.items() if suite in (name, module.SUITE, "all")]
    if not found:
        raise UserError(
            f"there is no experiment or suite {suite!r}; choose from {', '.join((*SUITES, *EXPERIMENTS))}"
        )
    return found


def with_models(experiments: Sequence[ModuleType]) -> Sequence[ModuleType]:
    """Those whose tiny models are all there. Others are left out, and named.

    Raises UserError for a single experiment whose models are not there.
    """
    ready = []
    for module in experiments:
        missing = [name for name in getattr(module, "MORE_MODELS", ()) if not shipped(name).is_dir()]
        if not missing:
            ready.append(module)
            continue
        reason = f"{module.NAME} needs {' and '.join(missing)}, which tools/tiny_models/further.yaml makes"
        if len(experiments) == 1:
            raise UserError(f"{reason}; put the folder into {shipped(missing[0]).parent}")
        log(f"left out: {reason}")
    return ready
