"""A teacher's server that is killed five times in a run costs time, and no step."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from places import SRC
from process_cases import wait_until
from serving_cases import TEACHER, assert_same, recipe, weights

from video_opd.serving import servers
from video_opd.training.loop import train
from video_opd.world.make import make_world

pytestmark = [pytest.mark.slow]
KILLS, STEPS = 5, 18


class Server:
    """A server in a process of its own, at one port for all its lives."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = int(listening.getsockname()[1])
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-m", "video_opd", "serve-teacher", str(TEACHER), "--port", str(self.port)]
        self.process = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(SRC)})

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def test_a_server_that_is_killed_five_times_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "LONGEST_PAUSE_S", 0.5)
    data = make_world(tmp_path / "world", videos={"train": 4}, workers=1)["train"]
    expected = weights(train(recipe(data, tmp_path / "local", **{"optim.max_steps": STEPS})).model)
    server, killed = Server(), 0
    changes: dict[str, Any] = {
        "optim.max_steps": STEPS,
        "teacher.urls": (f"http://127.0.0.1:{server.port}",),
        "teacher.wait_s": 300.0,
    }
    metrics = tmp_path / "remote" / "metrics.jsonl"

    def steps() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def has_steps(count: int) -> bool:
        return steps() >= count

    def kill_again_and_again() -> None:
        nonlocal killed
        for number in range(KILLS):
            wait_until(partial(has_steps, 2 + 3 * number))
            server.kill()
            killed += 1
            server.start()

    killer = threading.Thread(target=kill_again_and_again, daemon=True)
    killer.start()
    try:
        result = train(recipe(data, tmp_path / "remote", **changes))
    finally:
        server.kill()
    assert killed == KILLS and result.steps == steps() == STEPS
    assert_same(result.model, expected)
