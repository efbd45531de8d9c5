"""The notes that stand beside figures, in every format: protocol, deviations and counts. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from video_opd.evaluation.bootstrap import Interval95
from video_opd.evaluation.metrics import Metrics
from video_opd.evaluation.query_swap import QuerySwap


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """Returns the settings of a result's ``protocol``."""
    video = protocol["video"]
    least = (
        f" (or {video['min_frame_tokens']} a frame pair)" if video.get("keep") == "min_frame_tokens" else ""
    )
    return (
        f"protocol {protocol['name']}: prompt {protocol['prompt']}; {video['fps']:g} fps, at most "
        f"{video['max_frames']} frames and {video['max_video_tokens']} video tokens{least}; at most "
        f"{protocol['max_new_tokens']} new tokens, {protocol['decoding']}; parser {protocol['parser']}, "
        f"rounding {protocol['rounding']}; 95% by {protocol['ci95']}"
    )


def deviation_lines(protocol: Mapping[str, Any]) -> list[str]:
    """Returns a line on how the responses deviate from a result's ``protocol``; none if they do not."""
    deviations = protocol.get("deviations")
    if deviations is None:
        return ["how its responses were made is not known: no .meta.json stands beside the file"]
    if not deviations:
        return []
    said = (f"{key} {value} (protocol: {_asked(protocol, key)})" for key, value in deviations.items())
    return [f"made with other settings: {', '.join(said)}"]


def _asked(protocol: Mapping[str, Any], key: str) -> Any:
    """Returns the protocol's own value for a key of its deviations."""
    section, _, name = key.rpartition(".")
    if section == "video":
        return {"keep": "max_video_tokens", **protocol["video"]}[name]
    return {"prompt.style": protocol["prompt"], "prompt.thinking": False, "temperature": 0}.get(
        key, protocol.get(key)
    )


def interval_text(interval: Interval95, sign: str = "") -> str:
    """Returns ``[12.5, 14.0]``, with both signs if ``sign`` is "+"; nothing for an unknown interval."""
    return "" if interval is None else f"[{interval[0]:{sign}.1f}, {interval[1]:{sign}.1f}]"


def count_notes(metrics: Metrics) -> list[str]:
    """Returns the counts of rows without a figure of their own; those that are 0 are left out."""
    counts = {
        "unparsed": metrics.unparsed,
        "missing": metrics.missing,
        "unannotated": metrics.unannotated,
    }
    notes = [f"{count} {what}" for what, count in counts.items() if count]
    return notes if any(metrics.ci95.values()) else [*notes, "one video: no intervals"]


def rule_notes(metrics: Metrics) -> list[str]:
    """Returns how many of the responses each rule of the parser read, in one note; none without responses."""
    rules = ", ".join(f"{rule} {count}" for rule, count in metrics.rules.items())
    return [f"parse rules {rules}"] if rules else []


def swap_note(swap: QuerySwap) -> str:
    """Returns the share of the query swap with its interval."""
    return " ".join(filter(None, (f"query swap {swap.share:.1f}%", interval_text(swap.ci95), "(chance 50%)")))
