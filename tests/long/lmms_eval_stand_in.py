"""As much of lmms-eval as ``video-opd suite`` asks of it for one task of MVBench."""

from __future__ import annotations

import json
from pathlib import Path

from video_opd.suites.benchmarks import LMMS_EVAL

TASK = "mvbench_action_count"
VIDEOS = "perception/videos"

FILES = {
    f"lmms_eval-{LMMS_EVAL}.dist-info/METADATA": f"Name: lmms-eval\nVersion: {LMMS_EVAL}\n",
    "lmms_eval/__init__.py": "",
    "lmms_eval/api/__init__.py": "",
    "lmms_eval/api/model.py": "class lmms:\n    def __init__(self):\n        self.task_dict = {}\n",
    "lmms_eval/tasks/__init__.py": """
from pathlib import Path

class TaskManager:
    def __init__(self, include_path, **options):
        self.folder = Path(include_path)
""",
    "lmms_eval/tasks/mvbench/__init__.py": "",
    "lmms_eval/tasks/mvbench/utils.py": f"""
DATA_LIST = {{"action_count": "{VIDEOS}"}}

def mvbench_process_results(doc, results):
    right = "ABCD"[doc["candidates"].index(doc["answer"])]
    return {{"mvbench_accuracy": {{"score": int(results[0] == right)}}}}
""",
    f"lmms_eval/tasks/mvbench/{TASK}.yaml": "lmms_eval_specific_kwargs:\n  default: {}\n",
    "lmms_eval/evaluator.py": """
import json
from types import SimpleNamespace
from video_opd.suites import hooks

def simple_evaluate(model, tasks, task_manager, bootstrap_iters):
    samples, results = {}, {}
    for task in tasks:
        docs = [json.loads(line) for line in (task_manager.folder / f"{task}.jsonl").read_text().splitlines()]
        model.task_dict[task] = {"test": docs}
        requests = [SimpleNamespace(args=("", ask, {}, i, task, "test")) for i in range(len(docs))]
        texts = model.generate_until(requests)
        samples[task] = [
            {"doc_id": i, **hooks.mvbench(doc, [text])} for i, (doc, text) in enumerate(zip(docs, texts))
        ]
        scores = [sample["mvbench_accuracy"]["score"] for sample in samples[task]]
        results[task] = {"mvbench_accuracy,none": 100 * sum(scores) / len(scores)}
    return {"samples": samples, "results": results}

def ask(doc):
    video = {"type": "video", "url": doc["vopd_video"]}
    return [{"role": "user", "content": [video, {"type": "text", "text": doc["question"]}]}]
""",
    "tenacity.py": "class RetryError(Exception):\n    pass\n",
    "loguru.py": """
class logger:
    remove = staticmethod(lambda: None)
    add = staticmethod(lambda *arguments, **options: None)
""",
}


def write_stand_in(folder: Path) -> Path:
    """Writes the packages into ``folder``, for PYTHONPATH, and returns it."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def write_data(folder: Path, video: Path, rows: int = 2) -> Path:
    """Writes rows about copies of ``video`` in the layout of ``--data-root``, and returns ``folder``."""
    target = folder / "mvbench" / VIDEOS / "a.mp4"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(video.read_bytes())
    row = {"video": target.name, "candidates": ["1", "2", "3"], "answer": "2"}
    lines = [json.dumps({**row, "question": f"How many, {number}?"}) for number in range(rows)]
    (folder / "mvbench" / "action_count.jsonl").write_text("\n".join(lines) + "\n")
    return folder
