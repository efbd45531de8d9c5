"""What a grounding result depends on besides the model. A score without its protocol means little: the same
checkpoint differs by more between two protocols than before and after training.

No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from video_opd.config import VideoConfig
from video_opd.errors import UserError
from video_opd.evaluation.timelens import parse_timelens
from video_opd.temporal import Interval, ParsedAnswer, parse_answer

PARSERS: Mapping[str, Callable[..., ParsedAnswer]] = {"paper": parse_answer, "timelens": parse_timelens}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How answers are asked for and read: prompt, video budget, answer length, parser, rounding.

    ``video`` and ``max_new_tokens`` are what a model gets that does not say otherwise itself; where answers
    were made with something else, that is a deviation, and stands beside the result (:func:`deviations`).
    """

    name: str
    prompt_style: str  # of data.prompts
    video: VideoConfig = field(default_factory=VideoConfig)
    max_new_tokens: int
    parser: str  # of PARSERS
    whole_seconds: bool = False  # round both ends of a prediction, halves to even, before it is compared

    def parse(self, text: str, *, thinking: bool = False) -> ParsedAnswer:
        """What the text of an answer says."""
        return PARSERS[self.parser](text, thinking=thinking)

    def prepare(self, span: Interval) -> Interval:
        """The span that is compared with the annotation."""
        return (float(round(span[0])), float(round(span[1]))) if self.whole_seconds else span

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "prompt": self.prompt_style,
            "thinking": False,
            "video": self.video.without_decoder(),
            "max_new_tokens": self.max_new_tokens,
            "decoding": "greedy, one answer",
            "parser": self.parser,
            "rounding": "whole seconds" if self.whole_seconds else "none",
            "iou": "best over the annotated spans",
            "unparsed": "IoU 0",
            "missing": "IoU 0",
        }


PROTOCOLS = {
    # Sec. 4.1 (budget) and figure 7 (prompt, two decimals). The paper gives no answer length; its answers are
    # about a dozen tokens.
    "paper": Protocol(name="paper", prompt_style="paper", max_new_tokens=64, parser="paper"),
    # TencentARC/TimeLens: evaluation/utils.py (prompt), scripts/eval_timelens_bench.sh (2 fps, 64 tokens a
    # frame at least, 14,336 in total), evaluation/eval_dataloader.py (greedy, 512 new tokens, both ends
    # rounded to whole seconds by Python's round). Its tokens are of 28 × 28 px, also for Qwen3-VL, whose own
    # are of 32 × 32: 64 · 28²/32² = 49, and 14,336 · 28²/32² = 10,976.
    "timelens": Protocol(
        name="timelens",
        prompt_style="timelens",
        video=VideoConfig(min_frame_tokens=49, max_video_tokens=10_976),
        max_new_tokens=512,
        parser="timelens",
        whole_seconds=True,
    ),
}


def get_protocol(protocol: str | Protocol) -> Protocol:
    """A protocol by name. Raises :class:`UserError` for an unknown one."""
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol {protocol!r}; choose one of: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def protocol_of(prompt_style: str) -> Protocol | None:
    """The protocol that asks in this style, if there is one."""
    return next((p for p in PROTOCOLS.values() if p.prompt_style == prompt_style), None)


def video_budget(video: Mapping[str, Any]) -> dict[str, Any]:
    """A ``video`` section without the decoder, which changes no frame."""
    return {key: value for key, value in video.items() if key != "backend"}


# --- how answers were made ---------------------------------------------------------------------------


def prompt_style_of(provenance: Mapping[str, Any] | None) -> str | None:
    """The prompt style in the note of an output (``P.jsonl.meta.json``); None where it does not say."""
    return None if provenance is None else _section(_section(provenance, "input"), "prompt").get("style")


def is_thinking(provenance: Mapping[str, Any] | None) -> bool:
    """Whether the note says that the model thought before it answered."""
    return (
        provenance is not None and _section(_section(provenance, "input"), "prompt").get("thinking") is True
    )


def deviations(protocol: Protocol, provenance: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the note of an output says otherwise than ``protocol``: ``{"video.fps": 1.0, …}``.

    None where there is no note: nobody knows then how the answers were made.
    """
    if provenance is None:
        return None
    made_with, answers = _section(provenance, "input"), _section(provenance, "answers")
    prompt = _section(made_with, "prompt")
    used = {
        "prompt.style": prompt.get("style"),
        "prompt.thinking": prompt.get("thinking"),
        **{f"video.{key}": value for key, value in video_budget(_section(made_with, "video")).items()},
        "max_new_tokens": answers.get("max_new_tokens"),
        "temperature": answers.get("temperature"),
    }
    asked = {
        "prompt.style": protocol.prompt_style,
        "prompt.thinking": False,
        **{f"video.{key}": value for key, value in protocol.video.without_decoder().items()},
        "max_new_tokens": protocol.max_new_tokens,
        "temperature": 0.0,
    }
    return {key: used[key] for key in asked if used.get(key) is not None and used[key] != asked[key]}


def _section(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = tree.get(key)
    return section if isinstance(section, Mapping) else {}
