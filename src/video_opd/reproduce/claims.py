"""What a result says of a sentence of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

SEEDS = 3  # of an experiment, if nobody asks for others
MIOU, ACCURACY = "mean IoU", "accuracy"
OPERATIONS = "operations of GRPO's step, in percent"
NOISE, COVARIANCE_SHARE = "log10 of noise / signal", "share of the variance, in percent"
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told at this size"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A mean difference over seeds or prompts, and its 95% interval.

    Example: ``Difference(rise=4.1, low=2.0, high=6.3, above=3, among=3, unit="seeds")``.
    """

    rise: float
    low: float
    high: float
    above: int = 0  # seeds or prompts whose own difference is above 0
    among: int = 0  # all of them
    unit: Literal["seeds", "prompts"] | None = None  # None: nothing was drawn, so the difference is exact

    @classmethod
    def exact(cls, rise: float) -> Difference:
        return cls(rise=rise, low=rise, high=rise)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Difference:
        """The difference in a record of a result's file, which may say more, such as the arms."""
        return cls(**{spec.name: record[spec.name] for spec in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def count_above(self) -> str:
        """``16 of 24 prompts``, or ``exact``."""
        return "exact" if self.unit is None else f"{self.above} of {self.among} {self.unit}"

    def __str__(self) -> str:
        """``+4.1 [+2.0, +6.3]``."""
        return f"{self.rise:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence of the paper as a difference that should be above 0."""

    says: str
    source: str  # the table or figure
    where: str  # on the map, e.g. "annotation noise 1"
    difference: Difference
    score: str = MIOU  # what the difference is of, with its unit if that is not points

    @property
    def verdict(self) -> str:
        return verdict(self.difference.low, self.difference.high)


def verdict(low: float, high: float) -> str:
    """``holds`` if the 95% interval lies above 0, ``does not hold`` if it lies below, and else neither."""
    if low > 0:
        return HOLDS
    return FAILS if high < 0 else OPEN
