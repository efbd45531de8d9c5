"""The scoring server's HTTP side, as a Starlette app: who may ask, how much, and how long."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from safetensors.numpy import save
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from video_opd.errors import UserError
from video_opd.models.checkpoint_files import base_of, find_file
from video_opd.models.fingerprint import CONFIG_FILES
from video_opd.progress import log
from video_opd.serving.limits import BAD, BUSY, TIMED_OUT, TOO_LARGE, Refused
from video_opd.serving.messages import (
    BODY,
    DEFLATE,
    FILES,
    HEAD,
    HEALTH,
    METRICS,
    MODEL,
    PROTOCOL,
    SAMPLE,
    SCORE,
    SampleReply,
    SampleRequest,
    ScoreRequest,
    pack_sample_reply,
    pack_score_reply,
    unpack_sample_request,
    unpack_score_request,
)
from video_opd.serving.queue import Answer, ScoringQueue, Waiting
from video_opd.serving.reading import BadMessage
from video_opd.serving.scorer import Scorer

UNAUTHORISED, NO_BODY, FAILED = 401, 408, 500
EXPANDED_AT_ONCE = 16 << 20  # bytes of a compressed body
T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """How a server answers. ``token`` None: everybody may ask."""

    token: str | None = None
    in_flight: int = 64  # requests that are read, waiting or scored at a time
    read_s: float = 60.0  # for a request's body
    score_s: float = 600.0  # from the last byte of a request to its reply
    decoders: int = 4  # threads that look at clips


class Service:
    """The routes, and what they share."""

    def __init__(self, scorer: Scorer, scoring: ScoringQueue, model: Path, settings: ServiceSettings) -> None:
        self.scorer, self.scoring, self.model, self.settings = scorer, scoring, model, settings
        self.decoders = ThreadPoolExecutor(settings.decoders, thread_name_prefix="clips")
        self.in_flight = self.held_bytes = 0
        self.one_head = asyncio.Lock()
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "video_opd_requests", "Requests by status", ["status"], registry=self.registry
        )
        self.responses = Counter(
            "video_opd_responses", "Responses that were scored or sampled", registry=self.registry
        )
        self.tokens = Counter(
            "video_opd_response_tokens", "Tokens of these responses", registry=self.registry
        )
        self.seconds = Histogram(
            "video_opd_request_seconds", "Time of a request that was answered", registry=self.registry
        )
        gauge = Gauge(
            "video_opd_requests_in_flight", "Requests that are not answered", registry=self.registry
        )
        gauge.set_function(lambda: self.in_flight)
        waiting = Gauge(
            "video_opd_requests_waiting", "Requests that wait for the model", registry=self.registry
        )
        waiting.set_function(lambda: len(scoring))

    def app(self) -> Starlette:
        routes = [
            Route(HEALTH, self._answer(self.health, open_to_all=True)),
            Route(METRICS, self._answer(self.metrics)),
            Route(MODEL, self._answer(self.describe)),
            Route(FILES, self._answer(self.files)),
            Route(HEAD, self._answer(self.head)),
            Route(SCORE, self._answer(self.score), methods=["POST"]),
            Route(SAMPLE, self._answer(self.sample), methods=["POST"]),
        ]
        return Starlette(routes=routes)

    def _answer(self, handler: Handler, *, open_to_all: bool = False) -> Handler:
        """``handler`` for those who may ask. A refusal is one line of text, and so is a fault of our own."""

        async def answer(request: Request) -> Response:
            try:
                if not open_to_all:
                    self._check_token(request)
                response = await handler(request)
            except Refused as error:
                response = _text(error.status, str(error))
            except BadMessage as error:
                response = _text(BAD, str(error))
            except ClientDisconnect:
                response = _text(BAD, "the request was cut off")
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0]
                log(f"a request failed: {type(error).__name__}: {reason}")
                response = _text(FAILED, "the server failed; its own output says how")
            self.requests.labels(str(response.status_code)).inc()
            return response

        return answer

    def _check_token(self, request: Request) -> None:
        if self.settings.token is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.settings.token.encode()):
            raise Refused(UNAUTHORISED, "give this server's token: Authorization: Bearer ...")

    async def health(self, request: Request) -> Response:
        return _text(200, "ok")

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def describe(self, request: Request) -> Response:
        facts = {
            "protocol": PROTOCOL,
            "model": self.scorer.facts.fingerprint,
            **asdict(self.scorer.facts.computation),
            "name": self.model.name,
            "reads_files": bool(self.scorer.roots),
            "timeout_s": self.settings.score_s,
            "body_bytes": self.scorer.limits.body_bytes,
            "reply_bytes": self.scorer.limits.reply_bytes,
        }
        return Response(json.dumps(facts), media_type="application/json")

    async def files(self, request: Request) -> Response:
        """The small files of the model's folder, with which a client compares tokens and templates."""
        base = base_of(str(self.model))  # an adapter has the tokenizer of its base
        found = {name: find_file(base, name) for name in CONFIG_FILES}
        arrays = {
            name: np.frombuffer(path.read_bytes(), dtype=np.uint8)
            for name, path in found.items()
            if path is not None
        }
        return Response(save(arrays), media_type=BODY)

    async def head(self, request: Request) -> Response:
        """``lm_head``, for a client that asks for hidden states."""
        async with self.one_head:  # it is large, and asked for once a run
            content = await asyncio.to_thread(lambda: save(self.scorer.head()))
        return Response(content, media_type=BODY)

    async def score(self, request: Request) -> Response:
        return await self._work(request, unpack_score_request, pack_score_reply)

    async def sample(self, request: Request) -> Response:
        return await self._work(request, unpack_sample_request, pack_sample_reply)

    async def _work(
        self,
        request: Request,
        unpack: Callable[[bytes], ScoreRequest | SampleRequest],
        pack: Callable[[Any], bytes],
    ) -> Response:
        if self.in_flight >= self.settings.in_flight:
            raise Refused(BUSY, f"{self.in_flight} requests are in flight; come back")
        self.in_flight += 1
        began = time.monotonic()
        body, answered = _Body(self), Answer()
        try:
            await body.read(request)
            reply = await self._in_time(self._reply(body, unpack, answered), answered)
        finally:
            self.in_flight -= 1
            body.forget()
        self.seconds.observe(time.monotonic() - began)
        return Response(await asyncio.to_thread(pack, reply), media_type=BODY)

    async def _reply(
        self, body: _Body, unpack: Callable[[bytes], ScoreRequest | SampleRequest], answered: Answer
    ) -> Any:
        loop = asyncio.get_running_loop()
        message = await asyncio.to_thread(unpack, body.content)
        prompts = await loop.run_in_executor(self.decoders, partial(self.scorer.encode, message))
        try:
            reply = await asyncio.wrap_future(self.scoring.put(Waiting(message, prompts, answered)))
        except UserError as error:
            raise Refused(BAD, str(error)) from error
        if isinstance(message, ScoreRequest):
            lengths = message.response_lengths
        else:
            lengths = [len(rollout.token_ids) for rollout in cast(SampleReply, reply).rollouts]
        self.responses.inc(len(lengths))
        self.tokens.inc(sum(lengths))
        return reply

    async def _in_time(self, work: Coroutine[Any, Any, T], answered: Answer) -> T:
        limit = f"{self.settings.score_s:g} s (--timeout-s)"
        try:
            return await asyncio.wait_for(work, self.settings.score_s)
        except (TimeoutError, asyncio.TimeoutError):
            if answered.running():  # it would take as long again
                raise Refused(TIMED_OUT, f"the model was still at work on this after {limit}") from None
            raise Refused(BUSY, f"not begun within {limit}: the model was at work on others") from None


class _Body:
    """The body of one request. What all of them hold together is bounded, too."""

    def __init__(self, service: Service) -> None:
        self.service, self.content, self._held = service, b"", 0

    async def read(self, request: Request) -> None:
        """Reads it. Raises :class:`Refused` for one that is too large or does not come in time."""
        settings = self.service.settings
        try:
            refused = await asyncio.wait_for(self._read(request), settings.read_s)
        except (TimeoutError, asyncio.TimeoutError):
            raise Refused(NO_BODY, f"the body did not come within {settings.read_s:g} s") from None
        if refused is not None:
            raise refused

    async def _read(self, request: Request) -> Refused | None:
        """Why it is refused. The rest is then read and thrown away: a client that is still sending when the
        connection ends does not hear why."""
        limits, parts = self.service.scorer.limits, []
        told = request.headers.get("content-length", "0")
        refused = None
        if told.isdecimal() and int(told) > limits.body_bytes:
            refused = Refused(TOO_LARGE, f"a body of {int(told) >> 20} MiB, above {limits.body_bytes >> 20}")
        async for part in request.stream():
            if refused is not None:
                continue
            parts.append(part)
            self._held += len(part)
            self.service.held_bytes += len(part)
            if self._held > limits.body_bytes:
                refused = Refused(TOO_LARGE, f"a body above {limits.body_bytes >> 20} MiB")
            elif self.service.held_bytes > limits.held_bytes:
                refused = Refused(BUSY, "too many large requests are in flight; come back")
            if refused is not None:
                parts.clear()
                self.forget()
        self.content = b"".join(parts)
        encoding = request.headers.get("content-encoding")
        if refused is not None or encoding is None:
            return refused
        return await self._expand(encoding)

    async def _expand(self, encoding: str) -> Refused | None:
        """Expands a compressed body in pieces, within the same bounds. Why it is refused, if it is."""
        limits = self.service.scorer.limits
        if encoding != DEFLATE:
            return Refused(BAD, f"a body in {encoding!r:.40}; it may be compressed by {DEFLATE}")
        reader, rest, parts, length = zlib.decompressobj(), self.content, [], 0
        while not reader.eof:
            try:
                part = await asyncio.to_thread(reader.decompress, rest, EXPANDED_AT_ONCE)
            except zlib.error:
                return Refused(BAD, f"a body that is not in {DEFLATE}")
            rest = reader.unconsumed_tail
            if not part and not reader.eof:
                return Refused(BAD, f"a body that ends before its {DEFLATE} does")
            parts.append(part)
            length += len(part)
            self._held += len(part)
            self.service.held_bytes += len(part)
            if length > limits.body_bytes:
                return Refused(TOO_LARGE, f"a body above {limits.body_bytes >> 20} MiB when it is expanded")
            if self.service.held_bytes > limits.held_bytes:
                return Refused(BUSY, "too many large requests are in flight; come back")
        self.content = b"".join(parts)
        return None

    def forget(self) -> None:
        self.service.held_bytes -= self._held
        self.content, self._held = b"", 0


def _text(status: int, text: str) -> Response:
    headers = {"Retry-After": "1"} if status == BUSY else None
    return PlainTextResponse(" ".join(text.split()) + "\n", status, headers)
