"""The cleaning of a query before it is asked, as in the evaluations of the public sets."""

from __future__ import annotations

import re


def timelens_query(query: str) -> str:
    """Collapse white space, take full stops off both ends: TimeLens' and VideoMind's ``parse_query``."""
    return re.sub(r"\s+", " ", query).strip().strip(".").strip()


def lower_query(query: str) -> str:
    """Lower the case and take one full stop off the end: Time-R1's training, VTimeLLM's evaluation."""
    return query.strip().lower().removesuffix(".")


def plain_query(query: str) -> str:
    """Take white space off both ends: QVHighlights, and Time-R1's evaluation of TVGBench."""
    return query.strip()
