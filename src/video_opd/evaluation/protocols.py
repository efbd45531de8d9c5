"""Evaluation protocols: what a grounding result depends on besides the model. No torch.

A score without its protocol means little: the same checkpoint differs by more between two protocols than
before and after training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from video_opd.config import VideoConfig
from video_opd.errors import UserError
from video_opd.evaluation.timelens import parse_timelens
from video_opd.temporal import Interval, ParsedAnswer, parse_answer

PARSERS: Mapping[str, Callable[..., ParsedAnswer]] = {"paper": parse_answer, "timelens": parse_timelens}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a model is asked and its responses are read: prompt, video budget, length, parser, rounding.

    A model that does not say otherwise itself gets ``video`` and ``max_new_tokens``. If responses were made
    with other settings, these are deviations, which are reported beside the result (:func:`deviations`).
    """

    name: str
    prompt_style: str  # a name in data.prompts
    video: VideoConfig = field(default_factory=VideoConfig)
    max_new_tokens: int
    parser: str  # a key of PARSERS
    whole_seconds: bool = False  # round both ends of a prediction, halves to even, before it is compared

    def parse(self, text: str, *, thinking: bool = False) -> ParsedAnswer:
        """Reads the span in a response."""
        return PARSERS[self.parser](text, thinking=thinking)

    def prepare(self, span: Interval) -> Interval:
        """Returns the span that is compared with the annotation."""
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


_TIMELENS = Protocol(
    # TencentARC/TimeLens since commit d8db290: evaluation/utils.py (prompt), scripts/eval_timelens_bench.sh
    # (2 fps, 64 tokens of 32 × 32 px a frame pair at least, 14,336 in total, resized by qwen-vl-utils) and
    # evaluation/eval_dataloader.py (greedy, 512 new tokens, both ends rounded to whole seconds by round).
    name="timelens-2026-02",
    prompt_style="timelens",
    video=VideoConfig(min_frame_tokens=64, max_video_tokens=14_336, keep="min_frame_tokens"),
    max_new_tokens=512,
    parser="timelens",
    whole_seconds=True,
)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # Sec. 4.1 (budget) and figure 7 (prompt, two decimals). The paper gives no response length; its
        # responses have about a dozen tokens.
        Protocol(name="paper", prompt_style="paper", max_new_tokens=64, parser="paper"),
        _TIMELENS,
        # The script before that commit counted tokens of 28 × 28 px for every model. Qwen3-VL's own are of
        # 32 × 32 px: 64 · 28² / 32² = 49, and 14,336 · 28² / 32² = 10,976.
        replace(
            _TIMELENS,
            name="timelens-2025",
            video=VideoConfig(min_frame_tokens=49, max_video_tokens=10_976, keep="min_frame_tokens"),
        ),
        # lmms-eval 0.7.3: tasks/timelens (prompt, greedy, 50 new tokens, no rounding). The task leaves the
        # frames to the model's arguments. These are the defaults of models/chat/qwen3_vl.py: 32 frames, at
        # least 256 · 28² px = 196 tokens a pair, and qwen-vl-utils' own bounds: 768, and 0.9 · 128,000.
        Protocol(
            name="lmms-eval-timelens",
            prompt_style="lmms-eval-timelens",
            video=VideoConfig(
                min_frames=32,
                max_frames=32,
                min_frame_tokens=196,
                max_video_tokens=115_200,
                keep="min_frame_tokens",
            ),
            max_new_tokens=50,
            parser="timelens",
        ),
    )
}
# A name without a version is the newest version; results record the version.
CURRENT = {"timelens": "timelens-2026-02"}


def get_protocol(protocol: str | Protocol) -> Protocol:
    """Returns a protocol by its name, or by the name that its newest version goes by.

    Raises :class:`UserError` for an unknown name.
    """
    if isinstance(protocol, Protocol):
        return protocol
    name = CURRENT.get(protocol, protocol)
    if name not in PROTOCOLS:
        known = ", ".join((*PROTOCOLS, *CURRENT))
        raise UserError(f"unknown protocol {protocol!r}; choose one of: {known}")
    return PROTOCOLS[name]


def protocol_of(prompt_style: str) -> Protocol | None:
    """Returns the newest protocol that asks in this style, if there is one."""
    return next((p for p in PROTOCOLS.values() if p.prompt_style == prompt_style), None)


# --- how responses were made -------------------------------------------------------------------------


def prompt_style_of(provenance: Mapping[str, Any] | None) -> str | None:
    """Returns the prompt style in the provenance of an output; None if it does not say."""
    return None if provenance is None else _section(_section(provenance, "input"), "prompt").get("style")


def is_thinking(provenance: Mapping[str, Any] | None) -> bool:
    """Returns whether the model thought before it answered, as the provenance of an output says."""
    return (
        provenance is not None and _section(_section(provenance, "input"), "prompt").get("thinking") is True
    )


def deviations(protocol: Protocol, provenance: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns the settings of ``provenance`` that differ from ``protocol``: ``{"video.fps": 1.0, …}``.

    None without provenance: nobody knows then how the responses were made.
    """
    if provenance is None:
        return None
    made_with, answers = _section(provenance, "input"), _section(provenance, "answers")
    prompt = _section(made_with, "prompt")
    used = {
        "prompt.style": prompt.get("style"),
        "prompt.thinking": prompt.get("thinking"),
        **_video_settings(_section(made_with, "video")),
        "max_new_tokens": answers.get("max_new_tokens"),
        "temperature": answers.get("temperature"),
    }
    asked = {
        "prompt.style": protocol.prompt_style,
        "prompt.thinking": False,
        **_video_settings(protocol.video.without_decoder()),
        "max_new_tokens": protocol.max_new_tokens,
        "temperature": 0.0,
    }
    return {key: used[key] for key in asked if used.get(key) is not None and used[key] != asked[key]}


def _video_settings(video: Mapping[str, Any]) -> dict[str, Any]:
    """A section by dotted keys. ``keep`` is written only if it is not the usual one."""
    complete = {"keep": "max_video_tokens", **video} if video else {}
    return {f"video.{key}": value for key, value in complete.items()}


def _section(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = tree.get(key)
    return section if isinstance(section, Mapping) else {}
