"""The before/after table on a terminal."""

from __future__ import annotations

from video_opd.reports.runs import Run
from video_opd.reports.story import interval
from video_opd.terminal import columns


def before_after(run: Run) -> list[str]:
    """Returns mIoU with its interval, a row a test set and a column a model, and the protocol below it."""
    rows = [["mIoU [95%]", *run.models, "best constant"]]
    for testset in run.testsets:
        found = [run.evaluation(model, testset) for model in run.models]
        constants = [e.best_constant for e in found if e is not None and e.best_constant is not None]
        constant = f"{constants[0]:.1f}" if constants else "–"
        rows.append([testset, *("–" if e is None else interval(e) for e in found), constant])
    protocols = dict.fromkeys(e.protocol for e in run.evaluations if e.protocol)
    return [*columns(rows), *(f"protocol {protocol}" for protocol in protocols)]
