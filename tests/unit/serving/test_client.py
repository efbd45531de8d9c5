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

import pytest
import serving_cases as cases
import torch

from video_opd.errors import Unavailable, UserError
from video_opd.serving import servers
from video_opd.serving.messages import MODEL
from video_opd.serving.servers import Servers, TeacherAway, describe


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "SHORTEST_PAUSE_S", 0.001)
    monkeypatch.setattr(servers, "LONGEST_PAUSE_S", 0.05)


class Unreliable:
    """An ASGI app in front of another one, which spoils requests in the order of ``faults``."""

    def __init__(self, app, faults: list[str]) -> None:
        self.app, self.faults, self.asked = app, list(faults), 0

    async def __call__(self, scope, receive, send) -> None:
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
            "503": (503, b"busy\n"), "429": (429, b"later\n"),
            "garbage": (200, b"<html>a proxy's page</html>"), "empty": (200, b""), "301": (301, b""),
        }.get(fault, (200, b"x"))  # fmt: skip
        headers = [(b"content-length", str(len(body) + (100 if fault == "cut" else 0)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": fault == "cut"})


def test_failures_are_asked_again_until_the_scores_are_right() -> None:
    asked = cases.prompts()
    expected = cases.local_teacher().logprobs(asked, cases.RESPONSES)
    faults = ["500", "503", "429", "garbage", "empty", "cut", "301", "500", "500", "500", "500"]
    app = Unreliable(cases.service().app(), faults)
    with cases.serving(app) as url:
        found = cases.remote_teacher([url]).logprobs(asked, cases.RESPONSES)
    torch.testing.assert_close(found.logprobs_BT, expected.logprobs_BT, atol=1e-5, rtol=0)
    assert app.asked == len(faults) + 1


def test_another_server_answers_for_one_that_fails() -> None:
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
    monkeypatch.setattr(servers, "READ_S", 0.1)
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


def test_an_adapter_has_the_files_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(cases.TEACHER)}))
    app = cases.service(model=tmp_path).app()
    with cases.serving(app) as url, servers.files_of_model(Servers([url])) as folder:
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= set(found)
    for name, content in found.items():
        assert content == (cases.TEACHER / name).read_bytes()


def test_another_version_of_the_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with cases.serving(cases.service().app()) as url:
        monkeypatch.setattr(servers, "PROTOCOL", 2)
        with pytest.raises(UserError, match=r"speaks version 1 of the protocol, and this is version 2"):
            Servers([url]).ask("GET", MODEL, None, servers._read_description)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
