"""Our model as lmms-eval sees it: it is asked with a video and a text, and writes a text.

The entry point ``lmms_eval.models`` → :func:`manifest` makes it ``--model video_opd`` of lmms-eval's own
command. Imported only where lmms-eval is installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from video_opd.errors import UserError
from video_opd.suites.answering import Answerer
from video_opd.suites.hooks import NO_VIDEO
from video_opd.types import Sample


class VideoOPD(lmms):
    """Answers of a checkpoint, greedy, each appended to a file as soon as it is there.

    ``pretrained`` is a model folder. ``answers`` is that file; without one, nothing is kept. What a task says
    about the length of an answer is ignored: a greedy answer of 64 tokens begins with the one of 16.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        answers: str | None = None,
        batch_size: int | str | None = 8,
        device: str | None = None,
        max_new_tokens: int | str = 64,
        max_batch_size: int | None = None,  # lmms-eval hands it to every model
        *,
        answerer: Answerer | None = None,
    ) -> None:
        super().__init__()
        if answerer is None:
            if not pretrained:
                raise UserError("video_opd needs a model: --model_args pretrained=FOLDER")
            self._temporary = None if answers else tempfile.TemporaryDirectory()
            answerer = Answerer(
                model=pretrained,
                out=Path(answers or f"{self._temporary.name}/answers.jsonl"),  # type: ignore[union-attr]
                batch_size=int(batch_size or 8),
                device=device,
                max_new_tokens=int(max_new_tokens),
            )
        self.answerer = answerer

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        samples = [self._sample(*request.args) for request in requests]
        texts = self.answerer.answer(list({sample.id: sample for sample in samples}.values()))
        return [texts.get(sample.id, NO_VIDEO) for sample in samples]

    def _sample(
        self, context: str, to_messages: Any, settings: Mapping[str, Any], doc_id: int, task: str, split: str
    ) -> Sample:
        if settings.get("do_sample") and settings.get("temperature", 1) > 0:
            raise UserError(f"{task}: it asks for sampled answers; video_opd answers greedily")
        video, text = _question(to_messages(self.task_dict[task][split][doc_id]), task)
        return Sample(id=f"{task}/{doc_id}/{video.name}", video=video, query=text)

    def generate_until_multi_round(self, requests: Any) -> list[str]:
        raise NotImplementedError("video_opd answers single questions")

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("video_opd answers questions, it scores no given answers")


def _question(messages: Sequence[Mapping[str, Any]], task: str) -> tuple[Path, str]:
    """The one video and the one text of a question."""
    content = [part for message in messages for part in message["content"]]
    kinds = [part["type"] for part in content]
    if [message["role"] for message in messages] != ["user"] or sorted(kinds) != ["text", "video"]:
        raise UserError(f"{task}: a question of {', '.join(kinds)}; video_opd reads one video and one text")
    parts = {part["type"]: part for part in content}
    return Path(parts["video"]["url"]), parts["text"]["text"]
