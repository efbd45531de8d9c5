"""The prompt is figure 7's, word for word."""

import pytest

from video_opd.data import prompts
from video_opd.data.prompts import PromptStyle, build_messages, register_style
from video_opd.errors import UserError

# Typed from figure 7 (sec. D.7), with the quotation marks as code points.
FIGURE_7 = (
    "To accurately pinpoint the event \u201ca {cat} jumps\u201d in the video, determine the precise time "
    "period of the event. Provide the start and end times (in seconds, precise to two decimal places) in the "
    "format \u201cstart time to end time\u201d. For example: \u201c12.54 to 17.83\u201d."
)


def test_figure_7_word_for_word_and_the_video_before_the_text():
    system, user = build_messages("a {cat} jumps")
    assert system == {
        "role": "system",
        "content": [{"type": "text", "text": "You are a video analysis expert."}],
    }
    assert user["role"] == "user"
    assert user["content"] == [{"type": "video"}, {"type": "text", "text": FIGURE_7}]


def test_thinking_only_adds_to_the_text():
    text = build_messages("a {cat} jumps", thinking=True)[1]["content"][1]["text"]
    assert text.startswith(FIGURE_7) and "<think>" in text[len(FIGURE_7) :]


def test_an_unknown_style_names_the_known_ones():
    with pytest.raises(UserError, match=r"'papre'.*paper"):
        build_messages("q", style="papre")


def test_a_style_can_be_added_but_not_changed(monkeypatch):
    monkeypatch.setattr(prompts, "STYLES", dict(prompts.STYLES))
    register_style("short", PromptStyle(system="", user="When: {query}?"))
    assert build_messages("now", style="short") == [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "When: now?"}]}
    ]
    with pytest.raises(AssertionError):
        register_style("paper", PromptStyle(system="", user="When: {query}?"))
