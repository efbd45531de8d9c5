"""The prompts are figure 7's and TimeLens', word for word."""

import pytest

from video_opd.data import prompts
from video_opd.data.prompts import build_messages
from video_opd.errors import UserError
from video_opd.evaluation.protocols import PROTOCOLS
from video_opd.temporal import parse_answer

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


# As in TimeLens' evaluation script (evaluation/utils.py).
TIMELENS = (
    "Please find the visual event described by the sentence 'a {cat} jumps', determining its starting and "
    "ending times. The format should be: 'The event happens in <start time> - <end time> seconds'."
)


@pytest.mark.parametrize("query", ["a {cat} jumps", "  a {cat}\n jumps.", "a {cat}\tjumps . "])
def test_timelens_asks_in_one_message_for_a_query_without_its_full_stop(query):
    (user,) = build_messages(query, style="timelens")
    assert user == {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": TIMELENS}]}


def test_timelens_keeps_the_marks_inside_a_query_and_the_paper_keeps_them_all():
    assert "'Mr. T? yes'" in build_messages("Mr. T? yes..", style="timelens")[0]["content"][1]["text"]
    assert "“Mr. T.  yes..”" in build_messages("Mr. T.  yes..")[1]["content"][1]["text"]


def test_an_answer_in_the_format_that_timelens_asks_for_is_read():
    answer = parse_answer("The event happens in 5.2 - 19.8 seconds.")
    assert (answer.span, answer.rule) == ((5.2, 19.8), "dash")


def test_every_protocol_asks_in_a_style_that_exists():
    for protocol in PROTOCOLS.values():
        assert build_messages("q", style=protocol.prompt_style)


def test_thinking_only_adds_to_the_text():
    text = build_messages("a {cat} jumps", thinking=True)[1]["content"][1]["text"]
    assert text.startswith(FIGURE_7) and "<think>" in text[len(FIGURE_7) :]


@pytest.mark.parametrize("style", prompts.STYLES.values(), ids=prompts.STYLES)
def test_the_query_is_found_in_what_was_asked(style):
    for query in ("a {cat} jumps", "a “quoted”\nline", "it's (a) [b] \\d+ $1", style.user):
        assert style.ask(style.query_of(style.ask(query))) == style.ask(query)
    if not style.bare_query:
        assert style.query_of(style.ask("Mr. T.")) == "Mr. T."


def test_no_query_is_found_in_another_text():
    paper = prompts.STYLES["paper"]
    text = paper.ask("a cat")
    assert paper.query_of(text.replace("“", '"').replace("”", '"').replace(" ", "\n ")) == "a\n cat"
    for other in (text[1:], text[:-1], text + "x", text.replace("seconds", "minutes"), "a cat", ""):
        assert paper.query_of(other) is None
    assert prompts.STYLES["timelens"].query_of(text) is None


def test_an_unknown_style_names_the_known_ones():
    with pytest.raises(UserError, match=r"'papre'.*paper"):
        build_messages("q", style="papre")
