"""Which option a response means, decided before lmms-eval scores it. Standard library only.

lmms-eval's own readers differ from one benchmark to the next: TempCompass does not know ``(B) left``, MVBench
takes the article in "it is a man" for the letter A, and Video-MME takes the capital of a word for a letter.
Here one set of rules reads every response, and passes on the bare letter (or label, or "yes") that every
stock scorer knows. The first rule that matches counts, and its name is kept. A response that no rule reads
counts as wrong.

============ =====================================================  ===============================
rule         matches                                                examples
============ =====================================================  ===============================
``alone``    the whole text is an option's letter                   ``B``, ``(b).``, ``**B**``
``leading``  the text begins with a letter that is set off          ``B. left``, ``(B) left``, ``Option B``
``wording``  the whole text is the wording of one option            ``left``
``stated``   the last letter behind "answer" or "option is"; if     ``The best option is (B).``
             there is none, the last one behind "option" alone
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
_PRAISE = r"(?:(?:the|my|best|correct|right|final)\s+)*"
_LABEL = rf"{_PRAISE}(?:answer|option|choice|sentence|caption)"
_IS = r"(?:\s+(?:is|would be|should be)\s*[:=]?|\s*[:=])"
# This must follow a letter, or it may be an article or the start of a word.
_SET_OFF = r"(?:[\"'“”‘’*_`]*[.):\]}](?!\w\.)|\s*[-–—]\s|\s*\n|[\"'“”‘’*_`$]*\s*$)"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """``option`` is a key of the options, or "yes" or "no", or None if no rule matched."""

    option: str | None
    rule: str


_NOTHING = Choice(option=None, rule=UNREAD)


def after_thinking(text: str) -> str:
    """The text after ``</think>``; the whole text if it holds no thinking; "" if the thinking never ended."""
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    return "" if text.lstrip().startswith("<think>") else text.strip()


def read_choice(text: str, options: Mapping[str, str]) -> Choice:
    """The one of ``options`` (letter or digit → wording) that the text means."""
    text = after_thinking(text)
    if not options:
        return _NOTHING
    keys = {key.casefold(): key for key in options}
    any_case = "|".join(map(re.escape, keys))
    as_printed = "|".join(map(re.escape, options))

    if found := re.fullmatch(rf"{_BEFORE}({any_case}){_AFTER}", text, re.IGNORECASE):
        return Choice(option=keys[found[1].casefold()], rule="alone")
    leading = rf"{_BEFORE}(?:(?i:{_LABEL}(?:\s+is)?)[\s:*_]*{_BEFORE})?({as_printed}){_SET_OFF}"
    if found := re.match(leading, text):
        return Choice(option=found[1], rule="leading")
    same = [key for key, wording in options.items() if _plain(wording) == _plain(text) != ""]
    if len(same) == 1:
        return Choice(option=same[0], rule="wording")
    # "The answer is B, as option C shows": a letter that is only named does not count beside a stated one.
    for label in (rf"{_PRAISE}answer{_IS}?|{_LABEL}{_IS}", _LABEL):
        if letter := _last(rf"\b(?i:{label})\s*{_BEFORE}({as_printed})(?!\w)", text):
            return Choice(option=letter, rule="stated")
    standing = {key: places for key in options if (places := _standing(key, text))}
    if len(standing) == 1:
        [(key, ends)] = standing.items()
        if any(not _is_article(key, text, end) for end in ends):
            return Choice(option=key, rule="single")
    return _NOTHING


def read_yes_no(text: str) -> Choice:
    """The word "yes" or "no": the first word of the text, or the one that it says the answer is."""
    text = after_thinking(text)
    stated = rf"{_BEFORE}(?:{_LABEL}(?:\s+is)?[\s:*_]*)?{_BEFORE}(yes|no)\b"
    if found := re.match(stated, text, re.IGNORECASE):
        return Choice(option=found[1].lower(), rule="leading")
    return _NOTHING


def _last(pattern: str, text: str) -> str | None:
    found = [match for match in re.finditer(pattern, text) if not _is_article(match[1], text, match.end(1))]
    return found[-1][1] if found else None


def _standing(key: str, text: str) -> list[int]:
    """Returns the ends of all places where ``key``, as printed, is a separate word."""
    return [place.end() for place in re.finditer(rf"(?<![\w'’.]){re.escape(key)}(?![\w'’]|\.\w)", text)]


def _is_article(key: str, text: str, end: int) -> bool:
    """True for "A man" at the start of a sentence, and for digits before a word, which count things."""
    return (key == "A" or key.isdigit()) and re.match(r"\s+[a-z]", text[end:]) is not None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))
