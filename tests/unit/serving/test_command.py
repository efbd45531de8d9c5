"""``video-opd serve-teacher``: what it refuses at once, and how it ends."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import serving_cases as cases
from model_cases import model, processor
from places import SRC

from video_opd.cli import main
from video_opd.errors import Unavailable
from video_opd.models.fingerprint import model_fingerprint
from video_opd.serving.messages import HEALTH
from video_opd.types import TokenLogprobs


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    model(7).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@contextmanager
def served(teacher: Path, *flags: str, token: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    words = [sys.executable, "-m", "video_opd", "serve-teacher", str(teacher), "--port", "0", *flags]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "VIDEO_OPD_TOKEN": token}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"answers at (https?://\S+)", line):
                yield process, found[1]
                break
        else:
            raise AssertionError("it ended without an address")
    finally:
        process.kill()
        process.wait()


def test_a_server_answers_what_it_has_and_ends_when_it_is_told_to(teacher: Path) -> None:
    asked = cases.prompts()
    expected = cases.local_teacher().logprobs(asked, cases.RESPONSES)
    with served(teacher, token="secret") as (process, url):
        assert urllib.request.urlopen(url + HEALTH).read() == b"ok\n"
        remote = cases.remote_teacher(
            [url], 1.0, token="secret", served=cases.described(model=model_fingerprint(teacher))
        )
        found: list[TokenLogprobs] = []
        away: list[Unavailable] = []

        def ask() -> None:
            try:
                found.append(remote.logprobs(asked, cases.RESPONSES))
            except Unavailable as error:  # it came after the signal
                away.append(error)

        asking = [threading.Thread(target=ask) for _ in range(8)]
        for thread in asking:
            thread.start()
        while not found:  # some are answered, others wait or are on their way
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        for thread in asking:
            thread.join(timeout=60)
    assert len(found) + len(away) == 8
    for scores in found:
        assert (scores.logprobs_BT - expected.logprobs_BT).abs().max() < 1e-5


def test_over_tls(teacher: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    with served(teacher, "--tls-certificate", str(certificate), "--tls-key", str(key)) as (_, url):
        assert url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(certificate))
        assert urllib.request.urlopen(url + HEALTH, context=trusted).status == 200


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0 is not this machine alone: set a token in VIDEO_OPD_TOKEN"),
        (["--tls-key", "key.pem"], "TLS needs both --tls-certificate and --tls-key"),
        (["--tls-key", "k", "--tls-certificate", "c"], "no such file"),
        (["--root", "absent"], "--root absent: no such folder"),
        (["--token-file", "absent"], "absent: No such file"),
        (["--host", "example.invalid"], "set a token in VIDEO_OPD_TOKEN"),
        (["--port", "99999"], "--port is 99999"),
    ],
)
def test_what_cannot_be_served_is_said_before_a_model_is_loaded(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VIDEO_OPD_TOKEN", raising=False)
    assert main(["serve-teacher", "no-model", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_in_use(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        assert main(["serve-teacher", str(teacher), "--port", port]) == 2
    assert f"127.0.0.1:{port} cannot be had" in capsys.readouterr().err


def test_a_token_file_holds_one_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "token"
    for text in ("", "two words", "ß"):
        file.write_text(text)
        assert main(["serve-teacher", "no-model", "--token-file", str(file)]) == 2
        assert "one word of ASCII" in capsys.readouterr().err


def test_two_thousand_silent_clients_keep_nobody_from_being_answered(teacher: Path) -> None:
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert most == resource.RLIM_INFINITY or most > 4096, "a process may open too few files for this test"
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, most))
    silent = []
    try:
        with served(teacher) as (_, url):
            address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
            for number in range(2000):
                silent.append(socket.create_connection(address, timeout=20))
                if number % 2:
                    silent[-1].sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\n")
            remote = cases.remote_teacher([url], served=cases.described(model=model_fingerprint(teacher)))
            assert remote.logprobs(cases.prompts(), cases.RESPONSES).mask_BT.any()
    finally:
        for one in silent:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))


def test_packages_of_the_extra_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert main(["serve-teacher", "no-model"]) == 2
    assert "serve-teacher needs uvicorn, which is not installed: pip install" in capsys.readouterr().err
