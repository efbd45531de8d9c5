"""What tests of scoring servers share: prompts with clips, and a server of a tiny model on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import model_cases as cases
import numpy as np
import torch
import uvicorn
from safetensors.torch import load_file

from video_opd.config import PromptConfig, Recipe, load_recipe
from video_opd.data.encode import PromptEncoder
from video_opd.data.video import clip_digest
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher
from video_opd.models.vocabulary import Vocabulary
from video_opd.reproduce.places import recipe as recipe_file
from video_opd.serving.app import Service, ServiceSettings
from video_opd.serving.client import RemoteTeacher
from video_opd.serving.limits import Limits
from video_opd.serving.messages import PromptMessage, ScoreRequest, WritableTokens
from video_opd.serving.queue import ScoringQueue
from video_opd.serving.scorer import ModelFacts, Scorer
from video_opd.serving.servers import Described, Servers
from video_opd.types import Clip, EncodedPrompt
from video_opd.world.shipped import shipped

FINGERPRINT = "f" * 32
TEACHER = shipped("tiny-teacher")
BASE = str(shipped("tiny-base"))
Weights = dict[str, torch.Tensor]
QUERIES = ("the red circle appears", "a blue square moves left", "it blinks", "the ring grows")


def clip(seed: int = 0, frames: int = 6, side: tuple[int, int] = (64, 96)) -> Clip:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, size=(frames, *side, 3), dtype=np.uint8)
    times_s = np.sort(rng.uniform(0, 20, size=frames))
    return Clip(
        path=Path(f"clip-{seed}.mp4"),
        frames=pixels,
        times_s=times_s,
        frame_indices=np.arange(frames),
        source_fps=2.0,
        duration_s=20.0,
        source_size_px=side,
        digest=clip_digest(pixels, times_s),
    )


def prompts(form: Any = "nested") -> list[EncodedPrompt]:
    """Four prompts on two clips of different sizes, one with an odd number of frames."""
    encoder = PromptEncoder(cases.processor(), PromptConfig(video_form=form), keep_clips=True)
    clips = (clip(0), clip(0), clip(1, frames=5, side=(96, 64)), clip(0))
    return [encoder.encode(c, q, f"row {n}") for n, (c, q) in enumerate(zip(clips, QUERIES, strict=True))]


def drawn_prompt() -> EncodedPrompt:
    """A prompt on a clip of one colour."""
    noise = clip(2)
    pixels = np.full_like(noise.frames, 77)
    drawn = replace(noise, frames=pixels, digest=clip_digest(pixels, noise.times_s))
    encoder = PromptEncoder(cases.processor(), PromptConfig(video_form="nested"), keep_clips=True)
    return encoder.encode(drawn, "it blinks", "drawn")


RESPONSES: list[list[tuple[int, ...]]] = [[(5, 9, 3), (7, 2)], [(11,)], [(4, 4, 4, 6)], [(8, 1), (1, 2, 3)]]


def local_teacher(seed: int = 7) -> LocalTeacher:
    student = Vocabulary.of(cases.model(0), cases.processor())
    return LocalTeacher(HFPolicy(cases.model(seed), cases.processor(), "prefix", vocabulary=student))


def scorer(seed: int = 7, **options: Any) -> Scorer:
    return Scorer(cases.model(seed), cases.processor(), facts=ModelFacts(fingerprint=FINGERPRINT), **options)


def service(model: Path | None = None, settings: ServiceSettings | None = None, **options: Any) -> Service:
    made = scorer(**options)
    return Service(made, ScoringQueue(made), model or Path("teacher"), settings or ServiceSettings())


@contextmanager
def serving(app: Any, port: int = 0) -> Iterator[str]:
    """The address of a server of ``app`` in a thread of this process."""
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended before it answered"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()


def remote_teacher(
    urls: Sequence[str],
    wait_s: float = 20.0,
    token: str | None = None,
    served: Described | None = None,
    **options: Any,
) -> RemoteTeacher:
    student = Vocabulary.of(cases.model(0), cases.processor())
    return RemoteTeacher(Servers(urls, token, wait_s), student, served or described(), **options)


def described(**changes: Any) -> Described:
    """What a server of :func:`service` says of itself."""
    return replace(
        Described(
            model=FINGERPRINT,
            name="teacher",
            computation=ModelFacts(fingerprint=FINGERPRINT).computation,
            reads_files=False,
            timeout_s=600.0,
            body_bytes=Limits().body_bytes,
            reply_bytes=Limits().reply_bytes,
        ),
        **changes,
    )


def score_request(name: str = "row") -> ScoreRequest:
    """A request about no clip, for what does not look at it."""
    prompt = PromptMessage(
        id=name, clip=0, token_ids=np.array([1], np.int32), responses=(np.array([2], np.int32),)
    )
    return ScoreRequest(
        model=FINGERPRINT,
        computation=described().computation,
        vocabulary=WritableTokens(size=9),
        clips=(),
        prompts=(prompt,),
    )


def recipe(data: Path, folder: Path, **changes: Any) -> Recipe:
    return load_recipe(recipe_file("video-opd-full"), []).changed(
        **{
            "data.train": str(data),
            "data.workers": 0,
            "model.path": BASE,
            "teacher.path": str(TEACHER),
            "optim.batch_size": 4,
            "optim.micro_batch_size": 2,
            "optim.max_steps": 3,
            "run.dir": str(folder),
            "run.trackers": (),
            "run.save_every": 10,
            **changes,
        }
    )


def weights(model: Path) -> Weights:
    return load_file(model / "model.safetensors")


def assert_same(found: Path, expected: Weights) -> None:
    base = weights(Path(BASE))
    moved = max(float((value - base[name].float()).abs().max()) for name, value in expected.items())
    for name, value in weights(found).items():
        torch.testing.assert_close(value, expected[name], atol=1e-3 * moved, rtol=0)
