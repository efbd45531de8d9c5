"""A client gets the right scores or an error, whatever servers and connections do on the way."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving_cases as cases
import torch

from video_opd.errors import Unavailable, UserError
from video_opd.serving import servers
from video_opd.serving.app import Service, ServiceSettings
from video_opd.serving.limits import Limits
from video_opd.serving.messages import ScoreReply
from video_opd.serving.queue import Waiting
from video_opd.serving.reading import BadMessage
from video_opd.serving.servers import Servers, TeacherAway, TeacherSlow, describe
from video_opd.types import TokenLogprobs


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "SHORTEST_PAUSE_S", 0.001)
    monkeypatch.setattr(servers, "LONGEST_PAUSE_S", 0.05)


class Unreliable:
    """An ASGI app in front of another one, which spoils the requests for work in the order of ``faults``."""

    def __init__(self, app, faults: list[str]) -> None:
        self.app, self.faults, self.asked = app, list(faults), 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["method"] == "GET":
            await self.app(scope, receive, send)
            return
        self.asked += 1
        fault = self.faults.pop(0) if self.faults else ""
        if not fault:
            await self.app(scope, receive, send)
            return
        while (await receive()).get("more_body"):
            pass
        if fault == "late":
            await asyncio.sleep(0.5)
        status, body = {
            "500": (500, b"it broke\n"), "late": (500, b"it broke at last\n"),
            "503": (503, b"busy\n"), "504": (504, b"a proxy waits no longer"), "429": (429, b"later\n"),
            "garbage": (200, b"<html>a proxy's page</html>"), "empty": (200, b""), "301": (301, b""),
        }.get(fault, (200, b"x"))  # fmt: skip
        headers = [(b"content-length", str(len(body) + (100 if fault == "cut" else 0)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": fault == "cut"})


def test_failures_are_asked_again_until_the_scores_are_right() -> None:
    asked = cases.prompts()
    expected = cases.local_teacher().logprobs(asked, cases.RESPONSES)
    faults = [
        "500",
        "503",
        "504",
        "504",
        "504",
        "429",
        "garbage",
        "empty",
        "cut",
        "301",
        "500",
        "500",
        "500",
        "500",
    ]
    app = Unreliable(cases.service().app(), faults)
    with cases.serving(app) as url:
        found = cases.remote_teacher([url]).logprobs(asked, cases.RESPONSES)
    torch.testing.assert_close(found.logprobs_BT, expected.logprobs_BT, atol=1e-5, rtol=0)
    assert app.asked == len(faults) + 1


def test_another_server_answers_for_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "SHORTEST_PAUSE_S", 0.05)
    monkeypatch.setattr(servers, "LONGEST_PAUSE_S", 5.0)
    asked = cases.prompts()
    expected = cases.local_teacher().logprobs(asked, cases.RESPONSES)
    bad, good = Unreliable(cases.service().app(), ["500"] * 10_000), Unreliable(cases.service().app(), [])
    with cases.serving(bad) as a, cases.serving(good) as b:
        teacher = cases.remote_teacher([a, b, "http://127.0.0.1:9"])
        for _ in range(10):
            found = teacher.logprobs(asked, cases.RESPONSES)
            torch.testing.assert_close(found.logprobs_BT, expected.logprobs_BT, atol=1e-5, rtol=0)
    assert good.asked == 10 * 2  # two pieces of two prompts each
    assert bad.asked < good.asked  # its circuit opens


def test_a_failure_after_a_long_answer_is_the_first_moment_of_waiting() -> None:
    app = Unreliable(cases.service().app(), ["late"])
    with cases.serving(app) as url:
        found = cases.remote_teacher([url], wait_s=0.3).logprobs(cases.prompts()[:1], [[(1, 2)]])
    assert found.mask_BT.all() and app.asked == 2


def test_every_server_is_asked_before_the_work_ends() -> None:
    bad, good = Unreliable(cases.service().app(), ["late"] * 100), Unreliable(cases.service().app(), [])
    with cases.serving(bad) as a, cases.serving(good) as b:
        teacher = cases.remote_teacher([a, b], wait_s=1e-6)
        teacher.servers.servers[1].failures = 2  # of earlier requests: the other one is asked first
        assert teacher.logprobs(cases.prompts()[:1], [[(1, 2)]]).mask_BT.all()
    assert (bad.asked, good.asked) == (1, 1)


def test_a_server_that_comes_back_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = cases.prompts()[:1]
    port, app = free_port(), cases.service().app()
    teacher = cases.remote_teacher([f"http://127.0.0.1:{port}"])
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(teacher.logprobs(asked, [[(1, 2)]])))
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive() and not found
    with cases.serving(app, port):
        waiting.join(timeout=20)
    assert len(found) == 1
    assert "the teacher has not answered since" in capsys.readouterr().err


def test_a_server_that_stays_away_ends_the_work_with_one_line() -> None:
    teacher = cases.remote_teacher([f"http://127.0.0.1:{free_port()}"], wait_s=0.2)
    with pytest.raises(TeacherAway, match=r"no teacher has answered since \d\d:\d\d:\d\d") as error:
        teacher.logprobs(cases.prompts()[:1], [[(1, 2)]])
    assert isinstance(error.value, Unavailable) and not isinstance(error.value, UserError)
    assert len(str(error.value).splitlines()) == 1


def test_a_refusal_is_not_asked_again() -> None:
    app = Unreliable(cases.service().app(), [])
    with cases.serving(app) as url, pytest.raises(UserError, match=r"status 400"):
        cases.remote_teacher([url]).logprobs(cases.prompts()[:1], [[(10**6,)]])
    assert app.asked == 1


@contextmanager
def mute_server() -> Iterator[str]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_never_answers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "DESCRIBE_S", 0.1)
    with mute_server() as mute, cases.serving(cases.service().app()) as url:
        teacher = cases.remote_teacher([mute, url])
        for _ in range(3):
            assert teacher.logprobs(cases.prompts()[:1], [[(1, 2)]]).mask_BT.all()


def test_servers_must_hold_one_model() -> None:
    other = cases.service()
    other.scorer.facts = cases.ModelFacts(fingerprint="0" * 32)
    with cases.serving(cases.service().app()) as a, cases.serving(other.app()) as b:
        assert describe(Servers([a])).model == cases.FINGERPRINT
        with pytest.raises(UserError, match=r"give teacher\.urls of one model"):
            describe(Servers([a, b]))


def test_servers_must_compute_alike() -> None:
    other = cases.service()
    other.scorer.facts = cases.ModelFacts(fingerprint=cases.FINGERPRINT, dtype="bfloat16")
    refused = pytest.raises(UserError, match=r"are not started alike .*bfloat16.*float32")
    with cases.serving(cases.service().app()) as a, cases.serving(other.app()) as b, refused:
        describe(Servers([a, b]))


def test_the_smallest_limits_of_several_servers_count() -> None:
    small = cases.service(settings=ServiceSettings(score_s=5), limits=Limits(body_bytes=7, reply_bytes=9))
    with cases.serving(cases.service().app()) as a, cases.serving(small.app()) as b:
        found = describe(Servers([a, b]))
    assert (found.timeout_s, found.body_bytes, found.reply_bytes) == (5, 7, 9)


def test_an_adapter_has_the_files_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(cases.TEACHER)}))
    app = cases.service(model=tmp_path).app()
    with cases.serving(app) as url, servers.files_of_model(Servers([url])) as folder:
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= set(found)
    for name, content in found.items():
        assert content == (cases.TEACHER / name).read_bytes()


def test_another_version_of_the_protocol_is_named() -> None:
    with pytest.raises(UserError, match=r"speaks version 1 of the protocol, and this is version 2"):
        servers._read_description(b'{"protocol": 1, "model": "m"}')
    for body in (b"[]", b"<html>", b"{}", b'{"protocol": "2"}', b'{"protocol": 2}'):
        with pytest.raises(BadMessage):
            servers._read_description(body)


class Slow:
    """Makes the scorer of ``service`` take its time, and counts the batches that it works on."""

    def __init__(self, service: Service, takes_s: float) -> None:
        self.answer, self.takes_s, self.batches = service.scorer.answer, takes_s, 0
        service.scorer.answer = self.work  # type: ignore[method-assign, assignment]

    def work(self, *given: Any) -> Any:
        self.batches += 1
        time.sleep(self.takes_s)
        return self.answer(*given)


@pytest.fixture
def short_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a client wait for little more than a server works."""
    monkeypatch.setattr(servers, "MARGIN_S", 0.3)


def test_a_client_waits_as_long_as_its_server_works(
    monkeypatch: pytest.MonkeyPatch, short_margin: None
) -> None:
    monkeypatch.setattr(servers, "READ_S", 0.3)
    service = cases.service(settings=ServiceSettings(score_s=60))
    slow = Slow(service, 1.5)
    with cases.serving(service.app()) as url:
        assert cases.remote_teacher([url]).logprobs(cases.prompts()[:1], [[(1, 2)]]).mask_BT.all()
    assert slow.batches == 1


def test_a_server_that_is_started_again_with_a_longer_limit_is_waited_for(short_margin: None) -> None:
    service, port = cases.service(settings=ServiceSettings(score_s=60)), free_port()
    slow, teacher = Slow(service, 1.5), cases.remote_teacher([f"http://127.0.0.1:{port}"])
    teacher.servers.servers[0].limit_s = 0.1  # it said so before it was ended
    found: list[TokenLogprobs] = []
    asking = threading.Thread(target=lambda: found.append(teacher.logprobs(cases.prompts()[:1], [[(1, 2)]])))
    asking.start()
    while not teacher.servers.servers[0].failures:
        time.sleep(0.01)
    with cases.serving(service.app(), port):
        asking.join(timeout=60)
    assert len(found) == 1 and slow.batches == 1


def test_a_request_that_always_takes_too_long_is_said_to_be_that() -> None:
    service = cases.service(settings=ServiceSettings(score_s=1.0))
    slow = Slow(service, 1.5)
    refused = pytest.raises(TeacherSlow, match=r"still at work on this after 1 s .*a longer --timeout-s")
    with cases.serving(service.app()) as url, refused as error:
        cases.remote_teacher([url]).logprobs(cases.prompts()[:1], [[(1, 2)]])
    assert slow.batches <= 3 and len(str(error.value).splitlines()) == 1


def test_a_request_that_only_waits_too_long_for_others_is_sent_again() -> None:
    service = cases.service(settings=ServiceSettings(score_s=0.2))
    others, answer, held = threading.Event(), service.scorer.answer, cases.prompts()[:1]

    def after_others(requests: Any, prompts: Any) -> Any:
        if requests[0] is not other:
            return answer(requests, prompts)
        others.wait(60)
        return [ScoreReply(logprobs=np.zeros((1, 1), np.float32))]

    service.scorer.answer = after_others  # type: ignore[method-assign]
    other = cases.score_request()
    service.scoring.put(Waiting(other, held))
    found: list[TokenLogprobs] = []
    with cases.serving(service.app()) as url:
        teacher = cases.remote_teacher([url])
        asking = threading.Thread(target=lambda: found.append(teacher.logprobs(held, [[(1, 2)]])))
        asking.start()
        busy, deadline = service.requests.labels("503")._value, time.monotonic() + 60
        while busy.get() < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        service.settings = ServiceSettings()
        others.set()
        asking.join(timeout=60)
    assert busy.get() >= 3 and len(found) == 1


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
