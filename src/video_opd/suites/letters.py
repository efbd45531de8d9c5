"""Which option an answer means, before lmms-eval compares it. Standard library only.

lmms-eval's own readers differ from one benchmark to the next: TempCompass does not know ``(B) left``, MVBench
takes the article in "it is a man" for the letter A, Video-MME the capital of a word. Here one set of rules
reads all of them, and hands on the bare letter (or label, or "yes") that every stock scorer knows. The first
rule that matches counts; its name is kept. A text that none of them reads is wrong, never guessed.

============ =====================================================  ===============================
rule         matches                                                examples
============ =====================================================  ===============================
``alone``    the whole text is an option's letter                   ``B``, ``(b).``, ``**B**``
``leading``  the text begins with a letter that is set off          ``B. left``, ``(B) left``, ``Option B``
``wording``  the whole text is the wording of one option            ``left``
``stated``   the last "answer is", "option" or "choice" and letter  ``The best option is (B).``
``single``   one option's letter stands alone in the text           ``I think it is B because …``
============ =====================================================  ===============================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

UNREAD = "none"  # the rule's name where nothing matched

_BEFORE = r"[\s\"'“”‘’*_`$#>\[({<]*(?:\\boxed\{|\\text\{)*"
_AFTER = r"[\s\"'“”‘’*_`$.,:;!)\]}>]*"
_LABEL = r"(?:(?:the|my|best|correct|right|final)\s+)*(?:answer|option|choice|sentence|caption)"
# What sets a letter off from a word or an article that follows it.
_SET_OFF = r"(?:[\"'“”‘’*_`]*[.):\]}](?!\w\.)|\s*[-–—]\s|\s*\n|[\"'“”‘’*_`$]*\s*$)"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """``choice`` is a key of the options, "yes" or "no", or None where nothing was read."""

    choice: str | None
    rule: str


_NOTHING = Reading(choice=None, rule=UNREAD)


def after_thinking(text: str) -> str:
    """The answer of a text in thinking mode: what follows ``</think>``; nothing if that never came."""
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if text.lstrip().startswith("<think>") else text.strip()


def read_choice(text: str, options: Mapping[str, str]) -> Reading:
    """Which of ``options`` (letter or digit → wording) the text means."""
    text = after_thinking(text)
    if not options:
        return _NOTHING
    keys = {key.casefold(): key for key in options}
    any_case = "|".join(map(re.escape, keys))
    as_printed = "|".join(map(re.escape, options))

    if found := re.fullmatch(rf"{_BEFORE}({any_case}){_AFTER}", text, re.IGNORECASE):
        return Reading(choice=keys[found[1].casefold()], rule="alone")
    leading = rf"{_BEFORE}(?:(?i:{_LABEL}(?:\s+is)?)[\s:*_]*{_BEFORE})?({as_printed}){_SET_OFF}"
    if found := re.match(leading, text):
        return Reading(choice=found[1], rule="leading")
    same = [key for key, wording in options.items() if _plain(wording) == _plain(text) != ""]
    if len(same) == 1:
        return Reading(choice=same[0], rule="wording")
    stated = rf"\b(?i:{_LABEL})(?:\s+(?i:is|would be|should be))?\s*[:=]?\s*{_BEFORE}({as_printed})(?!\w)"
    if letter := _last(stated, text):
        return Reading(choice=letter, rule="stated")
    standing = {key: places for key in options if (places := _standing(key, text))}
    if len(standing) == 1:
        [(key, ends)] = standing.items()
        if any(not _is_article(key, text, end) for end in ends):
            return Reading(choice=key, rule="single")
    return _NOTHING


def read_yes_no(text: str) -> Reading:
    """ "yes" or "no": the text's first word, or what it says the answer is."""
    text = after_thinking(text)
    stated = rf"{_BEFORE}(?:{_LABEL}(?:\s+is)?[\s:*_]*)?{_BEFORE}(yes|no)\b"
    if found := re.match(stated, text, re.IGNORECASE):
        return Reading(choice=found[1].lower(), rule="leading")
    return _NOTHING


def _last(pattern: str, text: str) -> str | None:
    found = [match for match in re.finditer(pattern, text) if not _is_article(match[1], text, match.end(1))]
    return found[-1][1] if found else None


def _standing(key: str, text: str) -> list[int]:
    """Where ``key``, as printed, ends as a word of its own."""
    return [place.end() for place in re.finditer(rf"(?<![\w'’.]){re.escape(key)}(?![\w'’]|\.\w)", text)]


def _is_article(key: str, text: str, end: int) -> bool:
    """ "A man", at the start of a sentence: not the letter. Digits before a word are a number of things."""
    return (key == "A" or key.isdigit()) and re.match(r"\s+[a-z]", text[end:]) is not None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
