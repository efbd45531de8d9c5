"""Prompt styles: the text around a query.

A style is a system instruction and a user text that contains ``{query}``. ``paper`` is figure 7 (sec. D.7),
word for word, with the quotation marks as printed. ``timelens`` is the prompt of TimeLens' evaluation for
models that see the times of their frames, as Qwen3-VL does. ``lmms-eval-timelens`` is what lmms-eval's
``timelens`` tasks ask through its Qwen3-VL: the same sentence, with the query as it is in the data and after
the system message that lmms-eval puts before every prompt. ``question`` adds nothing, because the benchmarks
of general video understanding bring the whole text of their questions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from video_opd.errors import UserError
from video_opd.temporal import Interval


@dataclass(frozen=True, kw_only=True)
class PromptStyle:
    """``user`` contains ``{query}`` once. An empty ``system`` means that there is no system message.

    ``bare_query`` says that the query stands inside a sentence: white space is collapsed and full stops at
    its ends are removed, as TimeLens does. ``answer_format`` is the format that the instruction asks for.
    """

    system: str
    user: str
    bare_query: bool = False
    answer_format: str = "{start:.2f} to {end:.2f}"

    def __post_init__(self) -> None:
        assert self.user.count("{query}") == 1, "a style asks one question"

    def ask(self, query: str) -> str:
        """The user text for ``query``."""
        if self.bare_query:
            query = re.sub(r"\s+", " ", query).strip().strip(".").strip()
        return self.user.replace("{query}", query)

    def query_of(self, text: str) -> str | None:
        """The query in a user text of this style: what :meth:`ask` put there. None for any other text.

        Another typography is the same text: a quotation mark may be curly or straight, and white space may
        be any other white space.
        """
        match = _asked(self.user).fullmatch(text.strip())
        return match["query"].strip() if match else None

    def write_answer(self, span: Interval) -> str:
        """Writes ``span`` in the answer format: the text that SFT trains on for an annotation."""
        return self.answer_format.format(start=span[0], end=span[1])


_QUOTATION_MARKS = ('"“”„‟', "'‘’‚‛")


@cache
def _asked(user: str) -> re.Pattern[str]:
    """The user texts that a style's ``user`` becomes; the group ``query`` is the query."""
    before, after = (_in_any_typography(part) for part in user.split("{query}"))
    return re.compile(f"{before}(?P<query>.*){after}", re.DOTALL)


def _in_any_typography(text: str) -> str:
    pattern = re.sub(r"(?:\\\s)+", r"\\s+", re.escape(text))
    for marks in _QUOTATION_MARKS:
        pattern = re.sub(f"[{marks}]", f"[{marks}]", pattern)
    return pattern


# A token that a model does not take as text: <|im_end|>, <|video_pad|>. In a query it would end the turn or
# stand for a frame.
CONTROL_TOKEN = re.compile(r"<\|[^|\s]+\|>")

# Table 8's thinking variant. The paper does not print its instruction, so this is a short one of our own.
THINKING_INSTRUCTION = " Think first between <think> and </think>, then give the answer."

_TIMELENS_USER = (
    "Please find the visual event described by the sentence '{query}', determining its starting and "
    "ending times. The format should be: 'The event happens in <start time> - <end time> seconds'."
)
_TIMELENS_ANSWER = "The event happens in {start:.2f} - {end:.2f} seconds"

STYLES: dict[str, PromptStyle] = {
    "paper": PromptStyle(
        system="You are a video analysis expert.",
        user=(
            "To accurately pinpoint the event “{query}” in the video, determine the precise time period of "
            "the event. Provide the start and end times (in seconds, precise to two decimal places) in the "
            "format “start time to end time”. For example: “12.54 to 17.83”."
        ),
    ),
    "timelens": PromptStyle(system="", user=_TIMELENS_USER, bare_query=True, answer_format=_TIMELENS_ANSWER),
    "lmms-eval-timelens": PromptStyle(
        system="You are a helpful assistant.", user=_TIMELENS_USER, answer_format=_TIMELENS_ANSWER
    ),
    "question": PromptStyle(system="", user="{query}"),
}


def build_messages(query: str, style: str = "paper", thinking: bool = False) -> list[dict[str, Any]]:
    """Returns the chat messages for one query: the system instruction, then the video, then the text.

    Raises UserError for an unknown style.
    """
    if style not in STYLES:
        raise UserError(f"unknown prompt style {style!r}; choose one of: {', '.join(sorted(STYLES))}")
    chosen = STYLES[style]
    text = chosen.ask(query) + (THINKING_INSTRUCTION if thinking else "")
    user = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}
    if not chosen.system:
        return [user]
    return [{"role": "system", "content": [{"type": "text", "text": chosen.system}]}, user]


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside ``<think>``, as those of thinking checkpoints do."""
    turn = prompt.rpartition("<|im_start|>")[2]
    return "</think>" not in turn.rpartition("<think>")[2] and "<think>" in turn
