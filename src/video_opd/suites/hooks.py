"""The functions that lmms-eval calls for each row of our task files: the video's path, and the score.

A response is read first (letters.py); lmms-eval's own function of the task then scores the letter that was
read. Three cases never reach that function. A response in which nothing was read: MVBench would take it out
of the denominator, TempCompass would send it to a judge over the network. A row without a response, because
its video failed. And a judge that failed, which the stock code counts as a wrong response: here it is an
error.

The task files name these functions, and lmms-eval imports them.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from video_opd.suites.letters import UNREAD, Choice, after_thinking, read_choice, read_yes_no

Doc: TypeAlias = Mapping[str, Any]
Scored: TypeAlias = dict[str, Any]

VIDEO_KEY = "vopd_video"  # the key of a row that holds the path of its video
ROW_KEY = "vopd_row"  # the key of a scored row that holds what our results are made of
NO_VIDEO = "[no answer: the video could not be read]"
# Stands for a response in which nothing was read; no stock scorer finds a letter in it.
NOTHING_READ = "unread"

_MISSING = Choice(option=None, rule="missing")


class JudgeError(RuntimeError):
    """The judge model gave no verdict."""


def doc_to_visual(doc: Doc) -> list[str]:
    return [doc[VIDEO_KEY]]


def mvbench(doc: Doc, results: Sequence[str]) -> Scored:
    from lmms_eval.tasks.mvbench.utils import mvbench_process_results

    options = dict(zip(string.ascii_uppercase, doc["candidates"], strict=False))
    choice = _read(results[0], lambda text: read_choice(text, options))
    scored = mvbench_process_results(doc, [choice.option or NOTHING_READ])
    return _with_row(scored, scored["mvbench_accuracy"]["score"], choice)


def videomme(doc: Doc, results: Sequence[str]) -> Scored:
    from lmms_eval.tasks.videomme.utils import videomme_process_results

    options = lettered(doc["options"])
    choice = _read(results[0], lambda text: read_choice(text, options))
    scored = videomme_process_results(doc, [choice.option or NOTHING_READ])
    return _with_row(scored, scored["videomme_perception_score"]["score"], choice)


def tempcompass_multi_choice(doc: Doc, results: Sequence[str], *, judge: bool = False) -> Scored:
    from lmms_eval.tasks.tempcompass.utils import tempcompass_process_results_multi_choice as stock

    found = lettered(doc["question"].split("\n"))
    options = {letter: found[letter] for letter in found if letter in "ABCD"}  # the stock scorer's letters
    choice = _read(results[0], lambda text: read_choice(text, options))
    return _tempcompass(stock, doc, results[0], choice, choice.option, judge)


def tempcompass_yes_no(doc: Doc, results: Sequence[str], *, judge: bool = False) -> Scored:
    from lmms_eval.tasks.tempcompass.utils import tempcompass_process_results_yes_no as stock

    choice = _read(results[0], read_yes_no)
    return _tempcompass(stock, doc, results[0], choice, choice.option, judge)


def tempcompass_caption_matching(doc: Doc, results: Sequence[str], *, judge: bool = False) -> Scored:
    from lmms_eval.tasks.tempcompass.utils import tempcompass_process_results_caption_matching as stock

    # After the first line of the question, each line is "Sentence A: …" or "Option 1: …".
    lines = [line.partition(": ") for line in doc["question"].split("\n")[1:]]
    labels = {label.split()[-1]: label for label, _, _ in lines if label}
    options = {label.split()[-1]: wording for label, _, wording in lines if label}
    choice = _read(results[0], lambda text: read_choice(text, options))
    return _tempcompass(stock, doc, results[0], choice, labels.get(choice.option or ""), judge)


def tempcompass_multi_choice_judged(doc: Doc, results: Sequence[str]) -> Scored:
    return tempcompass_multi_choice(doc, results, judge=True)


def tempcompass_yes_no_judged(doc: Doc, results: Sequence[str]) -> Scored:
    return tempcompass_yes_no(doc, results, judge=True)


def tempcompass_caption_matching_judged(doc: Doc, results: Sequence[str]) -> Scored:
    return tempcompass_caption_matching(doc, results, judge=True)


def tempcompass_captioning_judged(doc: Doc, results: Sequence[str]) -> Scored:
    from lmms_eval.tasks.tempcompass.utils import tempcompass_process_results_captioning as stock

    if results[0] == NO_VIDEO:
        return _tempcompass_wrong(doc, results[0], _MISSING)
    caption = after_thinking(results[0])
    if not caption:
        return _tempcompass_wrong(doc, results[0], Choice(option=None, rule=UNREAD))
    scored = stock(doc, [caption])
    if scored["avg_accuracy"]["rating"] < 0:
        raise JudgeError(f"the judge gave no verdict on the caption of {doc['video_id']}")
    return _with_row(scored, scored["avg_accuracy"]["rating"], Choice(option=caption, rule="judged"))


def lettered(lines: Sequence[str]) -> dict[str, str]:
    """``{"A": "left", …}``, from the lines that begin with ``A.`` or ``A)``."""
    found = [re.match(r"\s*\(?([A-Z])[.)]\s*(.*)", line) for line in lines]
    return {match[1]: match[2] for match in found if match is not None}


def _read(text: str, read: Callable[[str], Choice]) -> Choice:
    return _MISSING if text == NO_VIDEO else read(text)


def _tempcompass(
    stock: Callable[[Doc, list[str]], Scored],
    doc: Doc,
    text: str,
    choice: Choice,
    read: str | None,
    judge: bool,
) -> Scored:
    """``read`` is the word that the stock scorer recognises. Without one, a judge decides, or it is wrong.

    The judge is shown what follows the thinking; if nothing does, the response is wrong without a judge.
    """
    text = after_thinking(text)
    if read is None and (choice is _MISSING or not judge or not text):
        return _tempcompass_wrong(doc, text, choice)
    scored = stock(doc, [read if read is not None else text])
    rated = scored["avg_accuracy"]
    if read is None:
        if not rated["match_success"] and not rated.get("chatgpt_response"):
            raise JudgeError(f"the judge gave no verdict on an answer about {doc['video_id']}")
        choice = Choice(option=text, rule="judged")
    return _with_row(scored, rated["rating"], choice)


def _tempcompass_wrong(doc: Doc, text: str, choice: Choice) -> Scored:
    """The score of a row that counts as wrong, in the form of the stock code."""
    rated = {"video_id": doc["video_id"], "video-llm-prediction": text, "rating": 0, "dim": doc["dim"]}
    return _with_row({"avg_accuracy": rated, f"{doc['dim']}_accuracy": rated}, 0, choice)


def _with_row(scored: Scored, score: float, choice: Choice) -> Scored:
    return {**scored, ROW_KEY: {"score": float(score), "read": choice.option, "rule": choice.rule}}
