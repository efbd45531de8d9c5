"""What a result says of a sentence of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MIOU, ACCURACY = "mean IoU", "accuracy"
OPERATIONS = "operations of GRPO's step, in percent"
NOISE, COVARIANCE_SHARE = "log10 of noise / signal", "share of the variance, in percent"
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told at this size"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper as a difference that should be above 0.

    ``difference`` is a record of :class:`~video_opd.reproduce.measurements.Difference` in a result's file.
    """

    says: str
    source: str  # the table or figure
    where: str  # on the map, e.g. "annotation noise 1"
    difference: Mapping[str, Any]
    score: str = MIOU  # what the difference is of, in points

    @property
    def verdict(self) -> str:
        return verdict(self.difference["low"], self.difference["high"])

    @property
    def figures(self) -> str:
        return interval(self.difference)


def verdict(low: float, high: float) -> str:
    """``holds`` if the 95% interval lies above 0, ``does not hold`` if it lies below, and else neither."""
    if low > 0:
        return HOLDS
    return FAILS if high < 0 else OPEN


def interval(difference: Mapping[str, Any]) -> str:
    """``+4.1 [+2.0, +6.3]``, in points."""
    return f"{difference['rise']:+.1f} [{difference['low']:+.1f}, {difference['high']:+.1f}]"
