"""A step of GRPO and of on-policy distillation by TRL, ms-swift and video-opd, side by side on a CPU.

    python benchmarks/peers/run.py --out runs/peers

The same tiny Qwen3-VL, videos, number of visual tokens, responses, threads and updates; each framework in a
virtual environment of its own, which the first run builds from the package index with pip (about 6 GB each)
and later ones use again. Ways take turns: one process each, one after another, ``--repeats`` times; ratios
are taken within a turn. ``benchmarks/results/peers.json`` has everything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import BASE, TEACHER, machine, write_result

from video_opd.bench.timing import quartiles
from video_opd.config import VideoConfig
from video_opd.data.prompts import build_messages
from video_opd.data.video import load_clip
from video_opd.jsonl import write_jsonl
from video_opd.progress import log
from video_opd.world.shipped import shipped

HERE = Path(__file__).parent
SOURCE_FPS, FPS = 8, 2.0
PAIR_S = 2 / FPS  # seconds of a pair of frames
CELL_PX = 32  # a visual token shows 32 × 32 px of a pair
QUERIES = ("the red circle moves left", "a blue square appears", "the green ring gets bigger")
OURS = "video-opd"
LAST = (
    *("framework", "prompt_tokens", "visual_tokens", "answer_tokens"),
    *("patches_a_step", "positions_a_step"),
)
TRAINED_WEIGHTS = 1_368_384  # all of the student's
ENDS, NEVER_SAID = ("<|im_end|>", "<|endoftext|>"), "<|vision_pad|>"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One framework doing one job. ``at_once``: responses in one forward and backward."""

    framework: str
    method: str
    prompts: int
    rollouts: int
    at_once: int
    environment: str | None = None  # none: this interpreter's
    script: str = "ours.py"

    @property
    def name(self) -> str:
        return f"{self.framework}, {self.at_once} at once"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes that are the same for every way."""

    pairs: int = 16
    side_px: int = 256
    tokens: int = 16
    steps: int = 3
    warmup: int = 1
    threads: int = 2
    lr: float = 1e-6
    seed: int = 0

    @property
    def visual_tokens(self) -> int:
        """The number of visual tokens of a prompt."""
        return self.pairs * (self.side_px // CELL_PX) ** 2


@dataclass(frozen=True, kw_only=True)
class Data:
    """The student, and the same questions on the same videos as each framework reads them."""

    student: Path
    ours: Path
    trl: Path
    swift: Path

    def of(self, way: Way) -> Path:
        return {"ours.py": self.ours, "with_trl.py": self.trl, "with_ms_swift.py": self.swift}[way.script]


def jobs(prompts: int = 2, rollouts: int = 8, distilled: int = 8) -> dict[str, list[Way]]:
    """Returns the jobs, each with the ways that it compares.

    The others are measured against the first way: this project with a recipe's defaults, a prompt at a time.
    """
    group = prompts * rollouts
    trl: dict[str, Any] = {"environment": "trl", "script": "with_trl.py"}
    swift: dict[str, Any] = {"environment": "ms-swift", "script": "with_ms_swift.py"}
    grpo: dict[str, Any] = {"method": "grpo", "prompts": prompts, "rollouts": rollouts}
    one: dict[str, Any] = {"prompts": distilled, "rollouts": 1}
    sizes = (1, 2, distilled)
    return {
        f"GRPO: {prompts} prompts, {rollouts} answers each": [
            Way(framework=OURS, at_once=rollouts, **grpo),
            Way(framework=OURS, at_once=group, **grpo),
            *(
                Way(framework=name, at_once=at_once, **grpo, **where)
                for name, where in (("TRL", trl), ("ms-swift", swift))
                for at_once in (group, 2)
            ),
        ],
        f"distillation: {distilled} prompts, one answer each": [
            *(Way(framework=OURS, method="video-opd", at_once=at_once, **one) for at_once in sizes),
            *(
                Way(framework=f"ms-swift {method.upper()}", method=method, at_once=at_once, **one, **swift)
                for method in ("gkd", "opd-rl")
                for at_once in sizes
            ),
        ],
    }


def write_video(path: Path, plan: Plan, seed: int) -> None:
    """Coarse noise that drifts: cheap to encode, and no two frames or videos are the same."""
    import av

    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (plan.side_px // 16, plan.side_px // 16, 3), dtype=np.uint8)
    picture = cells.repeat(16, 0).repeat(16, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(SOURCE_FPS))
        stream.width = stream.height = plan.side_px
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "superfast", "crf": "24", "threads": "1"}
        for i in range(round(plan.pairs * PAIR_S * SOURCE_FPS)):
            image = np.roll(picture, (i, 2 * i), (0, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def budget_of(plan: Plan) -> VideoConfig:
    cells = (plan.side_px // CELL_PX) ** 2
    return VideoConfig(fps=FPS, min_frame_tokens=cells, max_frame_tokens=cells)


def write_data(folder: Path, plan: Plan, videos: int) -> Data:
    """``videos`` videos with a question each. Videos that are there already are left as they are."""
    from PIL import Image

    folder = folder / f"{plan.pairs}x{plan.side_px}"
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    ours, trl, swift = [], [], []
    for i in range(videos):
        query, path = QUERIES[i % len(QUERIES)], (folder / "videos" / f"{i:03}.mp4").resolve()
        if not path.exists():
            write_video(path, plan, i)
        frames = load_clip(path, budget_of(plan)).frames
        assert frames.shape[:3] == (2 * plan.pairs, plan.side_px, plan.side_px), frames.shape
        images = [str(path.with_name(f"{i:03}-{pair:03}.png")) for pair in range(plan.pairs)]
        for image, frame in zip(images, frames[::2], strict=True):
            Image.fromarray(frame).save(image)
        duration_s = plan.pairs * PAIR_S
        ours.append(
            {
                "id": f"q{i:03}",
                "video": str(path),
                "query": query,
                "duration": duration_s,
                "spans": [[0.0, duration_s / 2]],
            }
        )
        swift.append({"messages": messages(query, video="<video>"), "videos": [str(path)]})
        trl.append({"prompt": messages(query), "images": images})
    written = {"ours": ours, "trl": trl, "swift": swift}
    for name, rows in written.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return Data(student=write_student(folder), **{name: folder / f"{name}.jsonl" for name in written})


def write_student(folder: Path) -> Path:
    """The tiny base, but that it never ends a response: all have as many tokens as are allowed.

    The head's rows of the two tokens that end one become that of a token that was never taught.
    """
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoTokenizer

    source, made = shipped(BASE), folder / "student"
    shutil.copytree(source, made, dirs_exist_ok=True)
    weights = load_file(source / "model.safetensors")
    assert not AutoConfig.from_pretrained(source).tie_word_embeddings, "the rows are those of the head alone"
    never, *ends = AutoTokenizer.from_pretrained(source).convert_tokens_to_ids([NEVER_SAID, *ENDS])
    head = weights["lm_head.weight"].clone()
    head[ends] = head[never].clone()
    save_file({**weights, "lm_head.weight": head}, made / "model.safetensors", metadata={"format": "pt"})
    return made


def messages(query: str, video: str = "") -> list[dict[str, str]]:
    """Our prompt as texts; ``video`` is what stands for it."""
    return [
        {
            "role": message["role"],
            "content": "".join(
                video if part["type"] == "video" else part["text"] for part in message["content"]
            ),
        }
        for message in build_messages(query)
    ]


def settings_of(way: Way, plan: Plan, data: Data, folder: Path) -> dict[str, Any]:
    """Returns the settings that a framework's script is given."""
    return {
        **asdict(plan),
        "visual_tokens": plan.visual_tokens,
        "frame_tokens": (plan.side_px // CELL_PX) ** 2,
        "fps": FPS,
        "method": way.method,
        "prompts": way.prompts,
        "rollouts": way.rollouts,
        "answers_at_once": way.at_once,
        "model": str(data.student.resolve()),
        "teacher": str(shipped(TEACHER)),
        "rows": str(data.of(way).resolve()),
        "folder": str(folder.resolve()),
    }


def python_of(environment: str | None, venvs: Path) -> Path:
    """The interpreter of an environment, built if it is not there."""
    if environment is None:
        return Path(sys.executable)
    folder = venvs / environment
    python, ready = folder / "bin" / "python", folder / "ready.txt"
    wanted = (HERE / f"requirements-{environment}.txt").read_text()
    if not ready.exists() or ready.read_text() != wanted:
        log(f"building the environment {environment}")
        venv.create(folder, with_pip=True, symlinks=True)
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "-r",
            str(HERE / f"requirements-{environment}.txt"),
        ]
        subprocess.run(install, check=True)
        ready.write_text(wanted)
    return python.absolute()


def run_way(way: Way, plan: Plan, data: Data, python: Path, folder: Path) -> dict[str, Any]:
    """One process. Raises RuntimeError with the end of what it said, if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, found, said = folder / "settings.json", folder / "record.json", folder / "said.txt"
    found.unlink(missing_ok=True)
    asked.write_text(json.dumps(settings_of(way, plan, data, folder / "run"), indent=1))
    environment = {**os.environ, "OMP_NUM_THREADS": str(plan.threads), "CUDA_VISIBLE_DEVICES": ""}
    if way.environment is not None:
        environment.pop("PYTHONPATH", None)  # nothing of ours is among what they import
    load = os.getloadavg()[0]
    with said.open("w") as file:
        done = subprocess.run(
            [str(python), str(HERE / way.script), str(asked.resolve()), str(found.resolve())],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if done.returncode != 0 or not found.exists():
        raise RuntimeError(f"{way.name} ({way.method}) failed:\n" + said.read_text()[-3000:])
    record = json.loads(found.read_text())
    check_same_work(way, plan, record)
    return {**record, "load_before": round(load, 2)}


def check_same_work(way: Way, plan: Plan, record: Mapping[str, Any]) -> None:
    """Raises RuntimeError where a way was given less or more to do than the plan says."""
    expected = {
        "visual_tokens": [plan.visual_tokens],
        "answer_tokens": plan.tokens,
        "trained_weights": TRAINED_WEIGHTS,
        "trained_dtypes": ["torch.float32"],
        "threads": plan.threads,
    }
    for key, value in expected.items():
        if record[key] != value:
            raise RuntimeError(f"{way.name} ({way.method}): {key} is {record[key]}, not {value}")


def summarise(turns: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns medians over the turns of a way, and how many times longer than ``reference`` a turn took."""
    seconds = [statistics.median(turn["seconds"]) for turn in turns]
    against = [statistics.median(turn["seconds"]) for turn in reference]
    return {
        "seconds": statistics.median(seconds),
        "times_ours": quartiles([a / b for a, b in zip(seconds, against, strict=True)]),
        "peak_above_loaded": statistics.median(turn["peak_bytes"] - turn["loaded_bytes"] for turn in turns),
        **{key: statistics.median(turn[key] for turn in turns) for key in ("peak_bytes", "loaded_bytes")},
        **{key: turns[-1][key] for key in LAST},
        "turns": list(turns),
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, of one job."""
    lines = [
        "| | s a step | times the first | peak | above what was loaded | prompt tokens (visual) | answer "
        "tokens | patches encoded | positions computed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, way in found.items():
        ratio = way["times_ours"]
        spread = f"{ratio['median']:.1f}× [{ratio['low']:.1f}, {ratio['high']:.1f}]"
        low, high = min(way["prompt_tokens"]), max(way["prompt_tokens"])
        lines.append(
            f"| {name} | {way['seconds']:.2f} | {spread} | {way['peak_bytes'] / 2**20:.0f} MiB "
            f"| {way['peak_above_loaded'] / 2**20:.0f} MiB "
            f"| {low if low == high else f'{low} to {high}'} ({way['visual_tokens'][0]}) "
            f"| {way['answer_tokens']:.1f} | {way['patches_a_step']:,.0f} | {way['positions_a_step']:,.0f} |"
        )
    return "\n".join(lines)


def verdict(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line a peer: its fastest way against our fastest, its smallest against our smallest."""
    by_framework: dict[str, list[Mapping[str, Any]]] = {}
    for name, way in found.items():
        by_framework.setdefault(name.split(",")[0], []).append(way)

    def fastest(framework: str) -> Mapping[str, Any]:
        return min(by_framework[framework], key=lambda way: way["seconds"])

    def smallest(framework: str) -> float:
        return min(way["peak_above_loaded"] for way in by_framework[framework])

    return [
        f"{peer}: a step takes {fastest(peer)['seconds'] / fastest(OURS)['seconds']:.1f} times as long as "
        f"ours (fastest ways) and {smallest(peer) / smallest(OURS):.1f} times its memory (smallest ways)"
        for peer in by_framework
        if peer != OURS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="environments, videos, runs")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of a process, the first warms up")
    parser.add_argument("--threads", type=int, default=Plan.threads)
    parser.add_argument(
        "--only", default="", help="ways whose name has this in it, and ours; writes no result"
    )
    args = parser.parse_args()
    plan = Plan(steps=args.steps, threads=args.threads)
    compared = jobs()
    if args.only:
        compared = {
            job: [way for way in ways if way.framework == OURS or args.only in way.name]
            for job, ways in compared.items()
            if any(args.only in way.name for way in ways)
        }
    every = [(job, way) for job, ways in compared.items() for way in ways]
    pythons = {way.environment: python_of(way.environment, args.out / "venvs") for _, way in every}
    data = write_data(args.out / "data", plan, max(way.prompts for _, way in every) * plan.steps)
    turns: dict[tuple[str, Way], list[dict[str, Any]]] = {key: [] for key in every}
    results: dict[str, dict[str, Any]] = {}
    for turn in range(args.repeats):
        start = turn % len(every)
        for i, (job, way) in enumerate(every[start:] + every[:start]):
            folder = args.out / "ways" / f"{way.method}-{way.framework}-{way.at_once}".replace(" ", "-")
            record = run_way(way, plan, data, pythons[way.environment], folder)
            turns[job, way].append(record)
            seconds = statistics.median(record["seconds"])
            log(f"turn {turn + 1}, {i + 1}/{len(every)}: {way.method}, {way.name}: {seconds:.2f} s a step")
        results = {
            job: {way.name: summarise(turns[job, way], turns[job, ways[0]]) for way in ways}
            for job, ways in compared.items()
        }
        if not args.only:  # after each turn: a run that is stopped leaves what it has
            write_result("peers", {"machine": machine(), "plan": asdict(plan), "jobs": results})
    for job, found in results.items():
        print(f"\n{job}\n\n{table(found)}\n\n" + "\n".join(verdict(found)))


if __name__ == "__main__":
    main()
