"""What a grounding result depends on besides the model. A score without its protocol means little: the same
checkpoint differs by more between two protocols than before and after training.

No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from video_opd.errors import UserError
from video_opd.temporal import Interval


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How answers are asked for and read."""

    name: str
    prompt_style: str  # of data.prompts
    whole_seconds: bool = False  # round both ends of a prediction, halves to even, before it is compared
    thinking: bool = False  # read only what follows </think>

    def prepare(self, span: Interval) -> Interval:
        """The span that is compared with the annotation."""
        return (float(round(span[0])), float(round(span[1]))) if self.whole_seconds else span

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "prompt": self.prompt_style,
            "rounding": "whole seconds" if self.whole_seconds else "none",
            "thinking": self.thinking,
            "iou": "best over the annotated spans",
            "unparsed": "IoU 0",
            "missing": "IoU 0",
        }


PROTOCOLS = {
    "paper": Protocol(name="paper", prompt_style="paper"),  # figure 7, two decimals
    # TimeLens' evaluation script rounds to its data sets' unit of one second.
    "timelens": Protocol(name="timelens", prompt_style="timelens", whole_seconds=True),
}


def get_protocol(protocol: str | Protocol) -> Protocol:
    """A protocol by name. Raises :class:`UserError` for an unknown one."""
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol {protocol!r}; choose one of: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]
