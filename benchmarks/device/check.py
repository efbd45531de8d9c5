"""Runs the sections of the GPU check one after another, each with a time limit, and makes one table of them.

    bash benchmarks/device/run.sh            # installs what was carried, then runs this

A section is a script of this folder in a process of its own: it may fail, hang or be killed, and the next one
goes on. Its rows are written while it works, so a section that ran out of time leaves what it has measured.
Only the standard library is imported here: the runner must outlive a broken installation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HALF_S = 420.0  # limit of all sections of a half; both fit into a quarter of an hour
PATIENCE = 6.0  # factor on the limits on a machine without a GPU


@dataclass(frozen=True, kw_only=True)
class Section:
    """``command`` is called with ``--out FILE`` and, for tiny shapes, ``--tiny``."""

    name: str
    command: Sequence[str]
    limit_s: float


def script(name: str, limit_s: float) -> Section:
    return Section(name=name, command=(sys.executable, str(HERE / f"{name}.py")), limit_s=limit_s)


MACHINE = script("machine", 40)
HALVES = (
    (script("parity", 75), script("graphs", 75), script("real_shape", 180), script("where_time_goes", 45)),
    (script("memory", 160), script("decoding", 40), script("demo", 180)),
)
SECTIONS = tuple(section for half in HALVES for section in half)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "device")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; without a GPU always")
    chosen_by = parser.add_mutually_exclusive_group()
    chosen_by.add_argument("--half", type=int, choices=(1, 2), help="one half of the sections")
    chosen_by.add_argument(
        "--only", nargs="+", choices=[section.name for section in SECTIONS], help="these sections"
    )
    parser.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="SECTION=SECONDS",
        help="another time limit of a section",
    )
    parser.add_argument(
        "--total", type=float, help=f"seconds of all sections; default with a GPU: {HALF_S:.0f} a half"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a section is not left behind
    began_s = time.monotonic()
    patience = 1.0 if card_seen() else PATIENCE
    first = run_section(MACHINE, arguments.out, MACHINE.limit_s * patience, tiny=False)
    save([first], arguments.out)
    # If torch was too slow to report the card, the system's own word counts.
    gpu = first["record"].get("gpu", card_seen())
    patience, tiny = (1.0, arguments.tiny) if gpu else (PATIENCE, True)
    limits = dict(given.split("=") for given in arguments.limit)
    asked = SECTIONS if arguments.half is None else HALVES[arguments.half - 1]
    chosen = [
        Section(
            name=section.name,
            command=section.command,
            limit_s=float(limits.get(section.name, section.limit_s * patience)),
        )
        for section in asked
        if arguments.only is None or section.name in arguments.only
    ]
    total_s = arguments.total or HALF_S * patience * (2 if arguments.half is None else 1)
    left_s = total_s - (time.monotonic() - began_s)
    return run_sections(chosen, arguments.out, left_s, tiny=tiny, done=[first])


def card_seen() -> bool:
    """Whether the system has an NVIDIA card, before torch is asked."""
    return any(Path("/dev").glob("nvidia*")) or shutil.which("nvidia-smi") is not None


def run_sections(
    sections: Sequence[Section],
    out: Path,
    total_s: float,
    *,
    tiny: bool,
    done: Sequence[Mapping[str, Any]] = (),
) -> int:
    """Runs them in order; 0 if all are ok. ``device.json`` and ``device.md`` grow with every section."""
    ends_s = time.monotonic() + total_s
    results = list(done)
    for section in sections:
        results.append(run_section(section, out, min(section.limit_s, ends_s - time.monotonic()), tiny=tiny))
        save(results, out)
    print("\n" + (out / "device.md").read_text(encoding="utf-8"))
    return int(any(result["outcome"] != "ok" for result in results))


def run_section(section: Section, out: Path, limit_s: float, *, tiny: bool) -> dict[str, Any]:
    """Returns outcome, seconds and record of the section; its printed lines go to ``device.log``."""
    if limit_s <= 0:
        return {"part": section.name, "outcome": "no time left", "seconds": 0.0, "limit_s": 0.0, "record": {}}
    out.mkdir(parents=True, exist_ok=True)
    file, log = out / f"{section.name}.json", out / "device.log"
    file.unlink(missing_ok=True)
    command = [*section.command, "--out", str(file), *(["--tiny"] if tiny else [])]
    began_s = time.monotonic()
    with log.open("a", encoding="utf-8") as output:
        print(f"\n== {section.name}: {' '.join(command)}", file=output, flush=True)
        outcome = run_limited(command, limit_s, output)
    result = {
        "part": section.name,
        "outcome": outcome,
        "seconds": time.monotonic() - began_s,
        "limit_s": limit_s,
        "record": read_record(file),
    }
    file.unlink(missing_ok=True)
    print(row_of(result), flush=True)
    return result


def run_limited(command: Sequence[str], limit_s: float, output: Any) -> str:
    """Returns ``ok``, ``failed`` or ``timed out``. No process that the command has started outlives it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment(),
        cwd=ROOT,
        start_new_session=True,  # a process group of its own, which is killed as a whole
    )
    try:
        return "ok" if process.wait(limit_s) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment() -> dict[str, str]:
    """Returns the variables with which a section finds the package and the benchmarks' modules."""
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # measurements of all sizes follow one another
    }


def read_record(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record


def save(results: Sequence[Mapping[str, Any]], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "device.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "device.md").write_text(table(results), encoding="utf-8")


def row_of(result: Mapping[str, Any]) -> str:
    record = result["record"]
    return (
        f"| {result['part']} | {result['outcome']} | {result['seconds']:.0f} of {result['limit_s']:.0f} s "
        f"| {record.get('summary', 'nothing was written: see device.log')} |"
    )


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns Markdown: a row for each section, then the rows of each."""
    lines = ["| part | outcome | time | summary |", "|---|---|---|---|", *map(row_of, results)]
    for result in results:
        rows = result["record"].get("rows", [])
        if rows:
            lines += ["", f"## {result['part']}", "", "| what | figure | |", "|---|---|---|"]
            lines += [f"| {row['what']} | {row['figure']} | {mark(row['ok'])} |" for row in rows]
    return "\n".join(lines) + "\n"


def mark(ok: bool | None) -> str:
    return {True: "ok", False: "FAILED", None: ""}[ok]


if __name__ == "__main__":
    sys.exit(main())
