"""What does it cost to ask a server, and what does it save to sample while servers score?

    python benchmarks/serving.py --out runs/serving

Throughput: the shipped tiny teacher scores prompts of a thousand tokens on noise videos, here and
behind ``video-opd serve-teacher`` on loopback, in turns, and the log-probs are compared. The ratio is that of
the seconds of the two in one turn.

Overlap: a run of some steps with three servers in threads of this process, which wait before they answer as
long as the student takes for a micro-batch (so a server is as on another card, and takes no CPU). Each
micro-batch by itself, the next one sampled meanwhile, and all of a step sampled before.

Demo: ``video-opd demo`` is run twice, with the teacher in its process and behind a server, and the largest
difference of a weight is compared with the largest that training has moved one.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from common import (
    BASE,
    RESULTS,
    TEACHER,
    machine,
    make_pools,
    parser,
    step_seconds,
    video_opd,
    write_result,
)
from safetensors.torch import load_file

from video_opd.bench.work import prompts_of
from video_opd.config import TeacherConfig, VideoConfig, load_recipe
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.loading import load_processor, load_teacher, read_model_configs
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher
from video_opd.models.vocabulary import Vocabulary
from video_opd.reproduce.places import recipe as recipe_file
from video_opd.serving.app import Service, ServiceSettings
from video_opd.serving.connect import connect_teacher
from video_opd.serving.queue import ScoringQueue
from video_opd.serving.scorer import ModelFacts, Scorer
from video_opd.training.loop import train
from video_opd.world.demo import run_demo
from video_opd.world.shipped import shipped

POOL_SEED = 2100
RESPONSES, RESPONSE_TOKENS = 8, 12
PARTS = ("throughput", "overlap", "demo")
WAYS: dict[str, dict[str, Any]] = {
    "one after the other": {"teacher.overlap": False},
    "the next one sampled meanwhile": {},
    "a step sampled before": {"sampling.micro_batch_size": 8},
}


def main() -> None:
    arguments = parse()
    out, written = Path(arguments.out), RESULTS / "serving.json"
    record: dict[str, Any] = json.loads(written.read_text()) if written.exists() else {}
    record |= {"machine": machine()}
    for part in arguments.parts:
        if part == "throughput":
            with server_process() as url:
                record[part] = {
                    "log-probs": throughput(url, arguments.tokens, arguments.turns, full=False),
                    "distributions": throughput(url, arguments.tokens, arguments.turns, full=True),
                }
        elif part == "overlap":
            record[part] = overlap(out, arguments.steps)
        else:
            with server_process() as url:
                record[part] = demo(out, url)
        print(part, record[part])
    write_result("serving", record)


def parse() -> Any:
    arguments = parser(__doc__)
    arguments.add_argument("--out", default="runs/serving")
    arguments.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="others stay as they were"
    )
    arguments.add_argument("--tokens", type=int, default=1000, help="of a prompt")
    arguments.add_argument("--turns", type=int, default=12)
    arguments.add_argument("--steps", type=int, default=6)
    return arguments.parse_args()


@contextmanager
def server_process() -> Iterator[str]:
    """The address of ``video-opd serve-teacher`` with the shipped teacher."""
    command = video_opd("serve-teacher", shipped(TEACHER), "--port", 0)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"answers at (\S+)", line):
                break
        else:
            raise RuntimeError("the server ended before it answered")
        try:
            yield found[1]
        finally:
            process.terminate()


def throughput(url: str, tokens: int, turns: int, *, full: bool) -> dict[str, Any]:
    """Seconds of a batch of eight prompts, and the local teacher's share of the server's seconds."""
    student = read_model_configs(shipped(BASE)), load_processor(shipped(BASE))
    prompts = prompts_of(student[1], tokens, videos=8, keep_clips=True)
    numbers = torch.Generator().manual_seed(0)
    vocabulary = Vocabulary.of(*student)
    writable = [i for i in range(vocabulary.size) if i not in vocabulary.forbidden_ids]
    drawn = torch.randint(len(writable), (8, RESPONSES, RESPONSE_TOKENS), generator=numbers).tolist()
    responses = [[[writable[i] for i in one] for one in group] for group in drawn]
    local = LocalTeacher(HFPolicy(*load_teacher(shipped(TEACHER), "float32", "cpu"), vocabulary=vocabulary))
    served = TeacherConfig(path=str(shipped(TEACHER)), urls=(url,))
    remote = connect_teacher(served, VideoConfig(), student)
    off, seconds = 0.0, []
    for turn in range(turns + 1):
        here, own = timed(lambda: local.logprobs(prompts, responses, full=full))
        there, other = timed(lambda: remote.logprobs(prompts, responses, full=full))
        off = max(off, (own.logprobs_BT - other.logprobs_BT).abs().max().item())
        if turn:  # the first warms up
            seconds.append((here, there))
    return {
        "prompt_tokens": prompts[0].length,
        "largest_difference": off,
        "local_s": statistics.median(here for here, _ in seconds),
        "served_s": statistics.median(there for _, there in seconds),
        "throughput_ratio": statistics.median(here / there for here, there in seconds),
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def overlap(out: Path, steps: int) -> dict[str, Any]:
    """Seconds of a step in each way."""
    (pool,) = make_pools(out, [0], POOL_SEED, 16).values()
    recipe = load_recipe(recipe_file("video-opd-full"), []).changed(
        **{
            "data.train": str(pool),
            "data.workers": 1,
            "data.cache_dir": str(out / "clips"),
            "model.path": str(shipped(BASE)),
            "teacher.path": str(shipped(TEACHER)),
            "optim.batch_size": 16,
            "optim.micro_batch_size": 2,
            "optim.max_steps": steps,
            "run.trackers": (),
            "run.save_every": steps,
        }
    )
    alone = recipe.changed(**{"run.dir": str(out / "local"), "optim.max_steps": 3})
    train(alone)
    a_micro_batch = step_seconds([out / "local"]) / 8
    found: dict[str, Any] = {"waits_s": a_micro_batch, "servers": 3, "step_s": {}}
    models = {}
    for number, (name, changes) in enumerate(WAYS.items()):
        folder = out / f"overlap-{number}"
        with ExitStack() as stack:
            urls = tuple(stack.enter_context(slow_server(a_micro_batch)) for _ in range(3))
            result = train(recipe.changed(**{"run.dir": str(folder), "teacher.urls": urls, **changes}))
        found["step_s"][name] = step_seconds([folder])
        models[name] = load_file(result.model / "model.safetensors")
    first = models["one after the other"]
    found["largest_difference_of_a_weight"] = max(difference(first, other) for other in models.values())
    found["largest_move_of_a_weight"] = difference(first, load_file(shipped(BASE) / "model.safetensors"))
    return found


@contextmanager
def slow_server(wait_s: float) -> Iterator[str]:
    """A server in a thread of this process, which waits before it scores."""
    facts = ModelFacts(fingerprint=model_fingerprint(shipped(TEACHER)))

    class Slow(Scorer):
        def answer(self, *given: Any) -> Any:
            time.sleep(wait_s)
            return super().answer(*given)

    scorer = Slow(*load_teacher(shipped(TEACHER), "float32", "cpu"), facts=facts)
    service = Service(scorer, ScoringQueue(scorer), shipped(TEACHER), ServiceSettings())
    server = uvicorn.Server(uvicorn.Config(service.app(), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def demo(out: Path, url: str) -> dict[str, float]:
    found = []
    for name, changes in (("local", {}), ("served", {"teacher.urls": [url]})):
        run_demo(out / f"demo-{name}", changes=changes)
        found.append(load_file(out / f"demo-{name}" / "model" / "model.safetensors"))
    return {
        "largest_difference_of_a_weight": difference(*found),
        "largest_move_of_a_weight": difference(found[0], load_file(shipped(BASE) / "model.safetensors")),
    }


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((value.float() - other[name].float()).abs().max().item() for name, value in one.items())


if __name__ == "__main__":
    main()
