"""Runs the scoring server until it is told to end: uvicorn, with one model."""

from __future__ import annotations

import resource
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from video_opd.config import Dtype, ModelConfig, Quantization, VLLMConfig
from video_opd.config.sections import EngineName
from video_opd.data.encode import PromptEncoder
from video_opd.data.video import clip_digest
from video_opd.errors import UserError, need
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.inference import InferenceConfig, chosen_device, load_vllm_policy
from video_opd.models.loading import load_teacher, read_model_configs
from video_opd.models.vllm_policy import VLLMPolicy
from video_opd.progress import log
from video_opd.serving.address import Address, check_address
from video_opd.serving.app import Service, ServiceSettings
from video_opd.serving.limits import Limits
from video_opd.serving.queue import ScoringQueue
from video_opd.serving.scorer import ModelFacts, Scorer
from video_opd.types import Clip

OPEN_FILES = 65_536
BACKLOG = 2048  # connections that wait to be taken
SERVED_TOKENS = 32_768  # of a prompt and its response on vLLM, if --vllm.max_tokens says nothing else
DRAIN_S = 600  # for requests that are in flight when the server is told to end


def serve(
    model: str | Path,
    address: Address,
    settings: ServiceSettings,
    *,
    limits: Limits | None = None,
    roots: Sequence[Path] = (),
    dtype: Dtype | None = None,
    quantization: Quantization | None = None,
    device: str | None = None,
    engine: EngineName = "hf",
    vllm: VLLMConfig | None = None,
    batch_size: int = 8,
    cache_dir: str | Path | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then answers what is in flight and returns.

    Raises :class:`UserError` for a model that cannot be loaded and an address that cannot be had.
    """
    import uvicorn

    check_address(address, settings.token)
    listening = _listen(address)
    place = chosen_device(device)
    dtype = dtype or ("bfloat16" if place.startswith("cuda") else "float32")
    facts = ModelFacts(
        fingerprint=model_fingerprint(model),
        dtype=dtype,
        quantization=quantization,
        engine=engine,
    )
    make_policy = None
    if engine == "hf":
        loaded = load_teacher(model, dtype, place, quantization=quantization)
    else:
        need(quantization is None, "--engine vllm runs a model in its own type: leave out --quantization")
        as_loaded = ModelConfig(path=str(model), dtype=dtype)
        settings_of_vllm = vllm or VLLMConfig()
        if settings_of_vllm.max_tokens is None:  # the students' budgets are not known here
            settings_of_vllm = settings_of_vllm.changed(max_tokens=SERVED_TOKENS)
        policy = load_vllm_policy(InferenceConfig(model=as_loaded, vllm=settings_of_vllm), device)
        loaded, make_policy = (read_model_configs(model), policy.processor), policy.with_vocabulary
        try_out(policy)
    scorer = Scorer(
        *loaded,
        facts=facts,
        make_policy=make_policy,
        roots=roots,
        cache_dir=cache_dir,
        limits=limits,
    )
    scoring = ScoringQueue(scorer, batch_size)
    service = Service(scorer, scoring, Path(model), settings)
    scheme = "http" if address.certificate is None else "https"
    host, port = listening.getsockname()[:2]
    log(f"{model} ({scorer.facts.fingerprint}) answers at {scheme}://{host}:{port}")
    _allow_many_connections()
    config = uvicorn.Config(
        service.app(),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=DRAIN_S,
        ssl_certfile=address.certificate,
        ssl_keyfile=address.key,
    )
    try:
        _server(config).run(sockets=[listening])
    finally:
        scoring.close()
        listening.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    log("every request was answered")


def try_out(policy: VLLMPolicy) -> None:
    """Starts vLLM's engine on a prompt about noise, on which it is checked, before a request waits for it."""
    frames = np.random.default_rng(0).integers(0, 256, size=(4, 64, 64, 3), dtype=np.uint8)
    times_s = np.arange(4) / 2
    clip = Clip(
        path=Path("noise"),
        frames=frames,
        times_s=times_s,
        frame_indices=np.arange(4),
        source_fps=2.0,
        duration_s=2.0,
        source_size_px=(64, 64),
        digest=clip_digest(frames, times_s),
    )
    prompt = PromptEncoder(policy.processor, keep_clips=True).encode(clip, "it moves", "noise")
    policy.sample([prompt], max_new_tokens=1, temperature=0.0)


def _allow_many_connections() -> None:
    """Every connection is an open file, also of clients that never say anything."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _server(config: Any) -> Any:
    """uvicorn's server. Told to end, it ends its process by the signal when it is done; this one returns."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    return Server(config)


def _listen(address: Address) -> socket.socket:
    """The socket, bound before the model is loaded: a port in use is found at once."""
    try:
        (family, kind, *_, where), *_ = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen(BACKLOG)  # from now on clients wait, and are not refused
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{address.host}:{address.port} cannot be had ({reason}); choose another --port"
        ) from error
    return listening
