"""The addresses of one model: the one with the fewest requests is asked, and others where it fails.

A request that is not answered is sent again, to another server where there is one, until ``wait_s`` is over
since its first failure and every server has been asked. An answer is either right or an error: what cannot be
read, or has another shape than was asked for, counts as not answered.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import urllib3
from safetensors import SafetensorError
from safetensors.numpy import load

from video_opd.errors import Unavailable, UserError
from video_opd.models.fingerprint import CONFIG_FILES
from video_opd.progress import log
from video_opd.serving.limits import TIMED_OUT
from video_opd.serving.messages import BODY, FILES, HEAD, MODEL, PROTOCOL, Computation
from video_opd.serving.reading import BadMessage, as_mapping, number_of, switch_of, text_of, whole_of

CONNECT_S = 10.0
DESCRIBE_S = 60.0  # for a server's word about itself, which takes it no work
READ_S = 900.0  # for its files and its head
MARGIN_S = 60.0  # beyond a server's own limit, for the way there and back
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0  # between two tries; doubled from one to the next
MOST_TIMEOUTS = 2  # of one request; the model would need as long for it again
OPEN_AFTER = 3  # failures in a row after which a server is left alone for a while
SAID_EVERY_S = 60  # what is waited for, by whichever request waits
AGAIN = (408, 425, 429, 500, 502, 503, 504)  # statuses after which the same request may be answered


class TeacherAway(Unavailable):
    """No server answered for as long as the run waits."""


class TeacherSlow(Unavailable):
    """The servers' model needs longer for a request than they work on one."""


class _NotAnswered(Exception):
    """One try failed, and another may not."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status  # of HTTP; None: there was no answer


class _TimedOut(_NotAnswered):
    """The server's model was at work on the request until the server's limit."""


@dataclass(kw_only=True)
class _Server:
    """One address, with what is known of it."""

    url: str
    pool: urllib3.PoolManager
    in_flight: int = 0
    failures: int = 0  # in a row
    closed_until: float = 0.0  # time.monotonic(), while its circuit is open
    limit_s: float | None = None  # for which it works on a request; None: it has not been asked
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> bytes:
        """The body of the answer. Raises UserError for a refusal, and _NotAnswered for everything else.

        An answer to ``body`` takes the model's work. It is waited for as long as the server itself allows, so
        that no second copy of a request is sent while the first one is worked on.
        """
        if body is None:
            return self._send(method, path, headers, None, DESCRIBE_S if path == MODEL else READ_S)
        limit_s = self.limit_s  # another thread may find a failure meanwhile
        if limit_s is None:
            token = {name: value for name, value in headers.items() if name == "Authorization"}
            limit_s = self.limit_s = _read_description(self.ask("GET", MODEL, token)).timeout_s
        began_s = time.monotonic()
        try:
            return self._send(method, path, headers, body, limit_s + MARGIN_S)
        except _NotAnswered as error:
            # A proxy between them may answer so, too, but earlier.
            if error.status == TIMED_OUT and time.monotonic() - began_s >= limit_s:
                raise _TimedOut(str(error), error.status) from error
            raise

    def _send(
        self, method: str, path: str, headers: dict[str, str], body: bytes | None, read_s: float
    ) -> bytes:
        try:
            answer = self.pool.request(
                method,
                self.url + path,
                body=body,
                headers=headers,
                timeout=urllib3.Timeout(connect=CONNECT_S, read=read_s),
                retries=False,
                redirect=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _NotAnswered(f"{type(error).__name__}: {_line(str(error))}") from error
        if answer.status == 200:
            return bytes(answer.data)
        said = _line(answer.data.decode(errors="replace"))
        if answer.status in AGAIN or not 400 <= answer.status < 500:
            raise _NotAnswered(f"status {answer.status}: {said}", answer.status)
        raise UserError(f"{self.url} refuses (status {answer.status}): {said}")

    def succeeded(self) -> None:
        with self.lock:
            self.failures, self.closed_until = 0, 0.0

    def failed(self) -> None:
        with self.lock:
            self.failures += 1
            self.limit_s = None  # it may be started again with another
            if self.failures >= OPEN_AFTER:
                exponent = min(self.failures - OPEN_AFTER, 6)
                pause = min(LONGEST_PAUSE_S, SHORTEST_PAUSE_S * 2**exponent)
                self.closed_until = time.monotonic() + pause * random.uniform(0.5, 1.5)


@dataclass
class _FailedTries:
    """The tries at one request that failed."""

    began_s: float = 0.0  # time.monotonic() of the first failure
    reason: str = ""  # of the last one
    timeouts: int = 0
    timeout: str = ""  # the reason of the last one that timed out
    urls: set[str] = field(default_factory=set)

    def add(self, url: str, error: Exception) -> None:
        if not self.urls:
            self.began_s = time.monotonic()
        self.urls.add(url)
        self.reason = f"{url}: {error}"
        if isinstance(error, _TimedOut):
            self.timeouts, self.timeout = self.timeouts + 1, self.reason

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.began_s

    @property
    def since(self) -> str:
        return datetime.fromtimestamp(time.time() - self.waited_s).strftime("%H:%M:%S")

    def as_error(self) -> Unavailable:
        """What they come to."""
        if self.timeouts:
            return TeacherSlow(
                f"the teacher needs longer for a request than its server's limit ({self.timeout}); start it "
                "with a longer --timeout-s, or ask about fewer prompts at a time (teacher.micro_batch_size, "
                "--batch-size)"
            )
        return TeacherAway(
            f"no teacher has answered since {self.since} ({self.reason}); start it, and repeat"
        )


class Servers:
    """Several addresses of one model. The one with the fewest requests in flight is asked."""

    def __init__(self, urls: Sequence[str], token: str | None = None, wait_s: float = 3600.0) -> None:
        assert urls, "one server or several"
        pool = urllib3.PoolManager(maxsize=16)
        self.servers = [_Server(url=url.rstrip("/"), pool=pool) for url in urls]
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.wait_s = wait_s
        self._choosing = threading.Lock()
        self._said = -math.inf  # time.monotonic() of the last word about waiting

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None,
        read: Callable[[bytes], Any],
        encoding: str | None = None,
    ) -> Any:
        """What ``read`` makes of an answer. Raises UserError for a refusal, TeacherAway after ``wait_s``,
        and TeacherSlow where the model needs longer than the servers allow.

        ``encoding`` is the body's Content-Encoding.
        """
        failed, among, pause = _FailedTries(), self.servers, SHORTEST_PAUSE_S
        headers = {**self.headers, "Content-Type": BODY}
        if encoding is not None:
            headers["Content-Encoding"] = encoding
        while True:
            with self._least_loaded(among) as server:
                try:
                    answer = read(server.ask(method, path, headers, body))
                    server.succeeded()
                    return answer
                except (_NotAnswered, BadMessage) as error:
                    server.failed()
                    failed.add(server.url, error)
            among = self._left(failed)
            if not among or failed.timeouts == MOST_TIMEOUTS:
                raise failed.as_error()
            if time.monotonic() - self._said > SAID_EVERY_S:
                self._said = time.monotonic()
                log(f"the teacher has not answered since {failed.since} ({failed.reason}); waiting")
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(LONGEST_PAUSE_S, 2 * pause)

    def of_each(self, path: str, read: Callable[[bytes], Any]) -> list[Any]:
        """What ``read`` makes of every server's answer."""
        found = []
        for server in self.servers:
            alone = Servers([server.url], wait_s=self.wait_s)
            alone.headers = self.headers
            found.append(alone.ask("GET", path, None, read))
        return found

    def _left(self, failed: _FailedTries) -> list[_Server]:
        """The servers that may be asked next: all of them while the run waits, then those that this request
        has not been sent to."""
        if failed.waited_s <= self.wait_s:
            return self.servers
        return [server for server in self.servers if server.url not in failed.urls]

    @contextmanager
    def _least_loaded(self, among: Sequence[_Server]) -> Iterator[_Server]:
        with self._choosing:  # two threads at once would both find the same one idle
            now = time.monotonic()
            ready = [server for server in among if server.closed_until <= now]
            server = min(ready or among, key=lambda s: (s.in_flight, s.failures, random.random()))
            with server.lock:
                server.in_flight += 1
        try:
            yield server
        finally:
            with server.lock:
                server.in_flight -= 1


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a server says of itself."""

    model: str  # the fingerprint
    name: str
    computation: Computation
    reads_files: bool
    timeout_s: float  # for which it works on a request
    body_bytes: int  # of a request, at most
    reply_bytes: int


def describe(servers: Servers) -> Described:
    """What all servers say of themselves, with the smallest of their limits. Raises UserError if they hold
    different models, or compute or read files differently."""
    found = servers.of_each(MODEL, _read_description)
    for server, one in zip(servers.servers, found, strict=True):
        if one.model != found[0].model:
            raise UserError(
                f"{server.url} holds the model {one.name} ({one.model}), and {servers.servers[0].url} "
                f"{found[0].name} ({found[0].model}); give teacher.urls of one model"
            )
        if (one.computation, one.reads_files) != (found[0].computation, found[0].reads_files):
            raise UserError(
                f"{server.url} and {servers.servers[0].url} are not started alike (--dtype, --quantization, "
                f"--engine, --root): {one} and {found[0]}"
            )
    return replace(
        found[0],
        timeout_s=min(one.timeout_s for one in found),
        body_bytes=min(one.body_bytes for one in found),
        reply_bytes=min(one.reply_bytes for one in found),
    )


@contextmanager
def files_of_model(servers: Servers) -> Iterator[Path]:
    """A folder with the small files of the servers' model, to compare tokens and templates; removed after."""
    files = servers.ask("GET", FILES, None, _read_files)
    with tempfile.TemporaryDirectory(prefix="video-opd-teacher-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def head_of_model(servers: Servers) -> np.ndarray:
    """The rows of the model's ``lm_head``: float32, or the bits of bfloat16 (uint16)."""
    found: np.ndarray = servers.ask("GET", HEAD, None, _read_head)
    return found


def _read_head(body: bytes) -> np.ndarray:
    try:
        weight: np.ndarray = load(body)["weight"]
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadMessage("its head cannot be read") from error
    if weight.ndim != 2 or weight.dtype not in (np.float32, np.uint16):
        raise BadMessage(f"its head is {weight.dtype} of {weight.ndim} dimensions")
    return weight


def _read_description(body: bytes) -> Described:
    try:
        tree = as_mapping(json.loads(body), "its answer")
    except (ValueError, RecursionError) as error:
        raise BadMessage("its answer is no description of a model") from error
    protocol = whole_of(tree, "protocol")
    if protocol != PROTOCOL:  # first of all: another version has other fields
        raise UserError(
            f"the teacher's server speaks version {protocol} of the protocol, and this is version "
            f"{PROTOCOL}: install the same release on both sides"
        )
    return Described(
        model=text_of(tree, "model"),
        name=text_of(tree, "name"),
        computation=Computation.of(tree),
        reads_files=switch_of(tree, "reads_files"),
        timeout_s=number_of(tree, "timeout_s"),
        body_bytes=int(number_of(tree, "body_bytes")),
        reply_bytes=int(number_of(tree, "reply_bytes")),
    )


def _read_files(body: bytes) -> dict[str, bytes]:
    try:
        arrays = load(body)
    except (SafetensorError, ValueError, KeyError) as error:
        raise BadMessage("its files cannot be read") from error
    if unknown := sorted(set(arrays) - set(CONFIG_FILES)):
        raise BadMessage(f"it sends a file that no model has: {unknown[0]!r:.60}")
    return {name: array.tobytes() for name, array in arrays.items()}


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
