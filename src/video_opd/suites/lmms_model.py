"""Our model as lmms-eval calls it: given a video and a text, it writes a response.

:mod:`video_opd.suites.entry` makes it known to lmms-eval's own command, as ``--model video_opd``. This module
imports lmms-eval, so only code that needs lmms-eval imports it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from video_opd.errors import UserError
from video_opd.suites.hooks import NO_VIDEO
from video_opd.suites.responder import Responder
from video_opd.types import Sample


class VideoOPD(lmms):
    """The greedy responses of a model folder, each appended to a file as soon as it is there.

    ``pretrained`` is the model folder and ``answers`` the file; without a file, nothing is kept. The length
    that a task asks for is ignored: a greedy response of 64 tokens begins with the one of 16.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        answers: str | None = None,
        batch_size: int | str | None = 8,
        device: str | None = None,
        max_new_tokens: int | str | None = None,
        max_batch_size: int | None = None,  # lmms-eval gives it to every model
        *,
        responder: Responder | None = None,
    ) -> None:
        super().__init__()
        if responder is None:
            if not pretrained:
                raise UserError("video_opd needs a model: --model_args pretrained=FOLDER")
            self._temporary = None if answers else tempfile.TemporaryDirectory()
            responder = Responder(
                model=pretrained,
                out=Path(answers or f"{self._temporary.name}/answers.jsonl"),  # type: ignore[union-attr]
                batch_size=int(batch_size or 8),
                device=device,
                max_new_tokens=None if max_new_tokens is None else int(max_new_tokens),
            )
        self.responder = responder

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        samples = [self._sample(*request.args) for request in requests]
        texts = self.responder.respond(list({sample.id: sample for sample in samples}.values()))
        return [texts.get(sample.id, NO_VIDEO) for sample in samples]

    def _sample(
        self, context: str, to_messages: Any, settings: Mapping[str, Any], doc_id: int, task: str, split: str
    ) -> Sample:
        if settings.get("do_sample") and settings.get("temperature", 1) > 0:
            raise UserError(
                f"{task}: it asks for sampled responses, and video_opd is greedy; set do_sample: false in it"
            )
        video, text = _question(to_messages(self.task_dict[task][split][doc_id]), task)
        return Sample(id=f"{task}/{doc_id}/{video.name}", video=video, query=text)

    def generate_until_multi_round(self, requests: Any) -> list[str]:
        raise NotImplementedError("video_opd answers single questions")

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("video_opd answers questions, it scores no given answers")


def _question(messages: Sequence[Mapping[str, Any]], task: str) -> tuple[Path, str]:
    """The one video and the one text of a question."""
    content = [item for message in messages for item in message["content"]]
    kinds = [item["type"] for item in content]
    if [message["role"] for message in messages] != ["user"] or sorted(kinds) != ["text", "video"]:
        raise UserError(
            f"{task}: a question of {', '.join(kinds)}; choose tasks that ask with one video and one text"
        )
    by_type = {item["type"]: item for item in content}
    return Path(by_type["video"]["url"]), by_type["text"]["text"]
