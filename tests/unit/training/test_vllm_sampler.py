"""The folder through which vLLM gets the student's weights; vLLM itself is tested by ``make test-vllm``."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import model_cases as cases
import pytest
import torch
from safetensors.torch import load_file

from video_opd.config import VLLMConfig
from video_opd.errors import UserError
from video_opd.models.policy import HFPolicy
from video_opd.training import vllm_sampler
from video_opd.training.vllm_sampler import VLLMSampler
from video_opd.world.shipped import shipped


class Engine:
    """In the place of vLLM: notes what it is given."""

    def __init__(self, path: str, *given: Any, **settings: Any) -> None:
        self.path, self.loaded, self.closed = Path(path), 0, False

    def load_weights(self, folder: Path) -> None:
        assert folder == self.path
        self.loaded += 1

    def sample(self, prompts: Any, **settings: Any) -> list[Any]:
        return [load_file(self.path / "model.safetensors")["lm_head.weight"]]

    def close(self) -> None:
        self.closed = True


@pytest.fixture()
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """What stands for /dev/shm, and the folder for temporary files."""
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.setattr(vllm_sampler, "IN_MEMORY", memory)
    monkeypatch.setattr(vllm_sampler.tempfile, "gettempdir", lambda: str(disk))
    monkeypatch.setattr(vllm_sampler, "VLLMPolicy", Engine)
    return memory, disk


def make(run: Path, dtype: str = "float32") -> VLLMSampler:
    policy = HFPolicy(cases.model(3), cases.processor())
    return VLLMSampler(str(shipped("tiny-base")), policy, dtype, VLLMConfig(), run)


def sampled(made: Any) -> torch.Tensor:
    """The weight that the engine finds when it samples."""
    return made.sample([])[0]


def test_vllm_has_the_weights_of_the_moment_and_no_others(places: tuple[Path, Path], tmp_path: Path) -> None:
    made = make(tmp_path / "run")
    engine: Any = made.engine
    weight = made.student.model.lm_head.weight
    assert made.folder.parent == places[0] and (made.folder / "tokenizer.json").is_file()
    assert torch.equal(sampled(made), weight)
    with torch.no_grad():
        weight.mul_(2)
    assert not torch.equal(sampled(made), weight)  # nobody has said so
    made.weights_changed()
    assert torch.equal(sampled(made), weight)
    assert torch.equal(sampled(made), weight) and engine.loaded == 2
    made.close()
    assert engine.closed and not list(places[0].iterdir())
    half = make(tmp_path / "run", "bfloat16")
    assert sampled(half).dtype == torch.bfloat16
    half.close()


def test_what_a_killed_run_left_is_removed(places: tuple[Path, Path], tmp_path: Path) -> None:
    killed = make(tmp_path / "run")
    killed.sample([])
    other = make(tmp_path / "other")
    assert other.folder != killed.folder
    again = make(tmp_path / "run")
    assert again.folder == killed.folder and not (again.folder / "model.safetensors").exists()
    assert other.folder.is_dir()


def test_weights_go_to_the_disk_where_memory_has_no_room(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    free = {places[0]: 1000, places[1]: 1 << 40}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free[Path(path)]))
    assert make(tmp_path / "run").folder.parent == places[1]
    free[places[1]] = 1000
    with pytest.raises(UserError, match=r"weights for vLLM take .* there is no room in .*memory or .*disk"):
        make(tmp_path / "run")


def test_weights_that_cannot_be_written_are_an_error_of_one_line(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    made = make(tmp_path / "run")
    shutil.rmtree(made.folder)
    with pytest.raises(UserError, match=r"the student's weights for vLLM cannot be written") as error:
        made.sample([])
    assert len(str(error.value).splitlines()) == 1


def test_a_worker_ends_with_the_process_that_asks_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as owner:
        code = "import sys; from video_opd.models.vllm_worker import end_with; end_with(int(sys.argv[1]))"
        with subprocess.Popen([sys.executable, "-c", code, str(owner.pid)]) as worker:
            with pytest.raises(subprocess.TimeoutExpired):
                worker.wait(timeout=3)
            os.kill(owner.pid, signal.SIGKILL)
            owner.wait()
            assert worker.wait(timeout=60) == 1
