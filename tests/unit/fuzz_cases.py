"""Broken files, each a function of (kind, number), and what the project makes of them.

    python tests/unit/fuzz_cases.py KIND FIRST LAST FOLDER

runs the cases ``FIRST`` to ``LAST - 1``. For each it prints ``begin N`` and, when it is done, ``end N WHAT``,
so that who reads it knows which case a crash or a hang belongs to. WHAT is ``read`` (the file was good
enough), ``refused`` (one line of UserError), or ``wrong: …``.

Data files, predictions, recipes and videos are here. ``fuzz_tables.py`` has annotations of other formats,
``fuzz_models.py`` the files of model folders, and ``fuzz_runs.py`` those of runs and their outputs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import random
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from places import ROOT

from video_opd.errors import UserError

RECIPES = ROOT / "recipes"

# --- bytes -------------------------------------------------------------------------------------------


def mutate(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """One to eight blows: bits, bytes, blocks removed, repeated, overwritten, swapped; the end cut off."""
    blob = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if not blob:
            break
        at = rng.randrange(len(blob))
        size = min(rng.choice((1, 2, 4, 8, 64, 1000)), len(blob) - at)
        blow = rng.randrange(8)
        if blow == 0:
            blob[at] ^= 1 << rng.randrange(8)
        elif blow == 1:
            blob[at : at + size] = rng.randbytes(size)
        elif blow == 2:
            blob[at : at + size] = bytes([rng.choice((0, 0xFF))]) * size
        elif blow == 3:
            del blob[at : at + size]
        elif blow == 4:
            blob[at:at] = blob[at : at + size] * rng.choice((1, 2, 10))
        elif blow == 5:
            del blob[at:]
        elif blow == 6 and other:
            start = rng.randrange(len(other))
            blob[at : at + size] = other[start : start + size]
        else:
            # Sizes and offsets are big-endian words: extreme ones reach code that noise does not.
            blob[at : at + 4] = rng.choice((0, 1, 7, 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)).to_bytes(
                4, "big"
            )
    return bytes(blob)


def odd_bytes(rng: random.Random, text: str) -> bytes:
    """A text file that went wrong on its way: noise, another encoding, a cut, bytes that are no text."""
    data = text.encode("utf-8")
    return rng.choice(
        (
            lambda: rng.randbytes(rng.choice((0, 1, 10, 1000))),
            lambda: mutate(rng, data),
            lambda: mutate(rng, data),
            lambda: text.encode("utf-16"),
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: data.replace(b"\n", b"\r"),
            lambda: data[: rng.randrange(len(data) + 1)],
            lambda: data + b"\x00" * rng.choice((1, 5000)),
            lambda: b"\x1f\x8b" + data,
            lambda: rng.choice(
                (b"", b"\n\n \n", b"null\n", b"[]\n", b"{}\n", b"{" * 100_000, b"[" * 100_000)
            ),
        )
    )()


# --- trees -------------------------------------------------------------------------------------------


def odd_value(rng: random.Random) -> Any:
    return rng.choice(
        (
            lambda: None,
            lambda: rng.choice((True, False)),
            lambda: rng.choice((0, -1, 1, 2**63, -(2**64), 10**400)),
            lambda: rng.choice((0.0, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))),
            lambda: rng.choice(
                ("", " ", "\x00", "\ud800", "a/../../b", "x" * 5000, "0", "nan", "<|video_pad|>")
            ),
            lambda: [],
            lambda: {},
            lambda: [odd_value(rng) for _ in range(rng.randrange(4))],
            lambda: {"start": 1, "end": odd_value(rng)},
            lambda: [[rng.uniform(-5, 50), rng.uniform(-5, 50)]],
            lambda: [[1, 2, 3], [[[[[]]]]], None],
        )
    )()


def odd_rows(rng: random.Random, rows: list[dict[str, Any]]) -> str:
    """The rows with keys removed, renamed or given another value, repeated, or put into the wrong form."""
    rows = copy.deepcopy(rows)
    for _ in range(rng.choice((1, 1, 2, 4))):
        row = rng.choice(rows)
        key = rng.choice([*row, "id", "spans"])
        blow = rng.randrange(6)
        spans = row.get("spans")
        if blow == 0 and isinstance(spans, list) and spans and isinstance(spans[0], list) and spans[0]:
            spans[0][rng.randrange(len(spans[0]))] = odd_value(rng)
        elif blow <= 2:
            row[key] = odd_value(rng)
        elif blow == 3:
            row.pop(key, None)
        elif blow == 4:
            row[rng.choice(("response", "span", "rules", "source", "ID", ""))] = odd_value(rng)
        else:
            rows.insert(rng.randrange(len(rows)), copy.deepcopy(row))
    lines = [json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows]
    if rng.random() < 0.1:
        lines[rng.randrange(len(lines))] = json.dumps(odd_value(rng))
    return rng.choice(("\n", "\n", "\n\n", "")).join(lines) + rng.choice(("\n", ""))


def odd_tree(rng: random.Random, tree: Any, wrong: Callable[[random.Random], Any] | None = None) -> Any:
    """The tree with one to three of its values removed, renamed, or replaced by another or by its neighbour.

    ``wrong`` gives the values that replace others; without it, they are odd numbers and odd values.
    """
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            return (wrong or odd_value)(rng)
        holder, key = rng.choice(places)
        blow = rng.randrange(8)
        if blow == 0:
            del holder[key]
        elif blow == 1 and isinstance(holder, dict):
            holder[rng.choice((f"{key}_", str(key).upper(), "", "\x00", "../x"))] = holder.pop(key)
        elif blow == 2:
            other, name = rng.choice(places)
            with contextlib.suppress(LookupError):  # it was removed before
                holder[key] = copy.deepcopy(other[name])
        elif blow == 3 and isinstance(holder[key], list):
            holder[key] *= rng.choice((0, 2, 50))
        elif wrong is not None:
            holder[key] = wrong(rng)
        else:
            holder[key] = odd_number(rng) if blow < 6 else odd_value(rng)
    return tree


def odd_number(rng: random.Random) -> Any:
    """What no setting is, or almost none."""
    return copy.deepcopy(rng.choice(ODD_NUMBERS))  # the next blow may change it in place


ODD_NUMBERS = (
    0, 0, 1, -1, -16, 3, 10**9, 10**18, 2**63, 10**400, 0.5, -0.5, 1e-320, 1e300, float("inf"), float("-inf"),
    float("nan"), float("nan"), "16", "1e300", True, False, None, [16], {"a": 16},
)  # fmt: skip


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(the list or the mapping, the index or the key) of every value in the tree."""
    if not isinstance(tree, dict | list):
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        yield from _places(value)


def broken_json(rng: random.Random, text: str) -> bytes:
    """The text of a JSON value with its bytes or its values broken."""
    if rng.random() < 0.25:
        return odd_bytes(rng, text)
    tree = odd_tree(rng, json.loads(text))
    return json.dumps(tree, indent=rng.choice((None, 1))).encode("utf-8", errors="surrogatepass")


# --- what becomes of them ----------------------------------------------------------------------------

MOST_LETTERS = 20_000
MOST_MEMORY = 2 << 30  # bytes that a case may add to its process


def outcome(work: Callable[[], object]) -> str:
    """``read``, ``refused``, or ``wrong`` for a refusal that is not one line, or one for want of memory."""
    try:
        work()
    except UserError as error:
        text = str(error).strip()
        if not text or "\n" in text:
            return f"wrong: not one line: {text[:300]!r}"
        if len(text) > MOST_LETTERS:
            return f"wrong: a line of {len(text)} letters: {text[:300]!r}"
        if re.search(r"[Aa]llocat|out of memory|MemoryError", text):
            return f"wrong: it asked for too much memory: {text[:300]!r}"
        return "refused"
    return "read"


def limit_memory() -> None:
    """A case that asks for more ends in an error, and the machine goes on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


# --- data files, predictions, recipes, videos --------------------------------------------------------


def annotation_rows() -> list[dict[str, Any]]:
    return [
        {
            "id": f"s{i}",
            "video": f"{i // 2}.mp4",
            "query": f"query {i}",
            "duration": 20.0,
            "spans": [[2.0 + i, 6.0 + i], [10.0, 14.0]][: 1 + i % 2],
            "source": "x" if i % 2 else "y",
        }
        for i in range(6)
    ]


def prediction_rows() -> list[dict[str, Any]]:
    forms: list[dict[str, Any]] = [
        {"responses": ["3.00 to 7.00", "?"], "spans": [[3.0, 7.0], None], "rules": ["exact", "none"]},
        {"response": "The event happens in 00:03 - 00:07."},
        {"span": [3.0, 7.0]},
        {"responses": ["between 3 and 7 seconds"]},
        {"span": None},
        {"responses": ["7 to 3"], "query": "query 5", "truncated": [False]},
    ]
    return [{"id": f"s{i}", **form} for i, form in enumerate(forms)]


def lines_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def broken_rows(rng: random.Random, rows: list[dict[str, Any]]) -> bytes:
    if rng.random() < 0.5:
        return odd_bytes(rng, lines_of(rows))
    return odd_rows(rng, rows).encode("utf-8", errors="surrogatepass")


def run_command(*words: object) -> str:
    """``video-opd WORDS``: read, refused, or wrong (an exception that is no UserError, or not one line)."""
    from video_opd.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    said = err.getvalue()
    if "Traceback" in said or "--debug" in said:
        return f"wrong: exit {code}: {said[-300:]!r}"
    if code in (0, 1):  # 1: data check found rows that cannot be used
        return "read"
    if code == 2 and said.count("\n") == 1:
        return "refused"
    return f"wrong: exit {code}: {said[-300:]!r}"


def annotation_case(rng: random.Random, folder: Path) -> str:
    data, answers = folder / "d.jsonl", folder / "p.jsonl"
    data.write_bytes(broken_rows(rng, annotation_rows()))
    answers.write_text(lines_of(prediction_rows()))
    if rng.random() < 0.3:
        return run_command("data", "check", data, "--json")
    return run_command("evaluate", "--data", data, "--predictions", answers, "--json", "-")


def prediction_case(rng: random.Random, folder: Path) -> str:
    data, answers, note = folder / "d.jsonl", folder / "p.jsonl", folder / "p.jsonl.meta.json"
    data.write_text(lines_of(annotation_rows()))
    answers.write_bytes(broken_rows(rng, prediction_rows()))
    note.unlink(missing_ok=True)
    if rng.random() < 0.3:
        provenance = {"input": {"prompt": {"style": "paper"}, "video": {"fps": 2.0}}, "answers": {"n": 1}}
        note.write_bytes(broken_rows(rng, [provenance]))
    form = rng.choice(("text", "markdown", "latex", "json"))
    protocol = rng.choice(("paper", "timelens"))
    words = ("--protocol", protocol, "--format", form, "--any-protocol")
    return run_command("evaluate", "--data", data, "--predictions", answers, *words)


# Lines that are valid YAML and wrong in a recipe.
YAML_LINES = (
    "optim: {lr: 1e999}", "optim: {lr: .nan}", "optim: {betas: [0.9]}", "video: {fps: 0x10}",
    "run: {seed: 1_0}", "data: 2026-99-99", "data: {train: 2026-11-24}", "optim: {lr: " + "9" * 400 + "}",
    "sampling: {top_k: " + "9" * 5000 + "}", "sampling: {top_k: " + "9" * 400 + "}", "a: &a [*a]",
    "a: &a {b: *a}", "a: &a {k: v}\nb: &b {a: *a, c: *a}", "? [a, b]\n: c", "1: 2", "null: null",
    "!!python/object:os.system x", "x: !!binary aGk=", "x: !!set {a, b}", "<<: *nothing", "method: [grpo]",
    "method: sft", "- a\n- b", "%YAML 9.9", "x: '\\ud800'", "model: null", "model: []",
    "teacher: {by_source: {1: 2}}", "run: {trackers: {a: b}}", "evaluate: {data: x.jsonl}",
    "tvdf: {strategy: random}", "lora: {parts: [vision]}", "\t- x",
    "\n".join(f"k{i}: &k{i} {{a: *k{i - 1}, b: *k{i - 1}}}" if i else "k0: &k0 {a: b}" for i in range(40)),
)  # fmt: skip


def broken_recipe(rng: random.Random, text: str) -> bytes:
    """The text of a recipe with its bytes, a line or a value broken, or another text."""
    lines = text.splitlines()
    blow = rng.randrange(4)
    if blow == 0:
        return odd_bytes(rng, text)
    if blow == 1:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(YAML_LINES))
    elif blow == 2:
        return rng.choice(YAML_LINES).encode()
    else:
        number = rng.randrange(len(lines))
        key, _, _ = lines[number].partition(":")
        lines[number] = f"{key}: {json.dumps(odd_value(rng))}"
    return "\n".join(lines).encode("utf-8", errors="surrogatepass")


def recipe_case(rng: random.Random, folder: Path) -> str:
    from video_opd.config import dump_recipe, load_recipe

    text = rng.choice(sorted(RECIPES.rglob("*.yaml"))).read_text(encoding="utf-8")
    path = folder / "r.yaml"
    path.write_bytes(broken_recipe(rng, text))
    overrides = [
        f"--{rng.choice(('optim.lr', 'x', 'run', 'video.fps.a'))}",
        rng.choice(("1", "{", "a: &a [*a]")),
    ]
    try:
        dump_recipe(load_recipe(path, overrides if rng.random() < 0.2 else ()))
    except UserError as error:
        return "refused" if str(error).strip() else "wrong: an empty message"
    return "read"


class Videos:
    """Small good files of several containers and codecs, made once a process."""

    made: dict[str, bytes] | None = None

    @classmethod
    def get(cls, folder: Path) -> dict[str, bytes]:
        if cls.made is None:
            from video_cases import write_sound, write_video

            good = {
                "h264.mp4": write_video(folder / "h264.mp4", 24, size=(64, 96)),
                "fast.mp4": write_video(
                    folder / "fast.mp4", 12, size=(64, 64), container_options={"movflags": "faststart"}
                ),
                "mpeg4.mp4": write_video(folder / "mpeg4.mp4", 12, size=(64, 64), codec="mpeg4"),
                "turned.mp4": write_video(folder / "turned.mp4", 12, size=(64, 96), rotation=90),
                "late.mkv": write_video(
                    folder / "late.mkv", 12, size=(64, 64), times_s=[0.1 * i * i for i in range(12)]
                ),
                "mjpeg.avi": write_video(folder / "mjpeg.avi", 8, size=(64, 64), codec="mjpeg"),
                "vp9.webm": write_video(folder / "vp9.webm", 12, size=(64, 64), codec="libvpx-vp9"),
                "h264.ts": write_video(folder / "h264.ts", 12, size=(64, 64)),
                "mpeg2.mpg": write_video(folder / "mpeg2.mpg", 12, size=(64, 64), codec="mpeg2video"),
                "flash.flv": write_video(folder / "flash.flv", 12, size=(64, 64), codec="flv"),
                "sound.mp4": write_sound(folder / "sound.mp4"),
            }
            cls.made = {name: path.read_bytes() for name, path in good.items()}
            for path in good.values():  # imports are not a case's time
                with contextlib.suppress(UserError):
                    read_video(path)
        return cls.made


def read_video(path: Path) -> None:
    from video_opd.config import VideoConfig
    from video_opd.data.video import load_clip, probe

    info = probe(path)
    assert info.frame_count > 0 and info.duration_s > 0
    clip = load_clip(path, VideoConfig(min_frame_tokens=4, max_frame_tokens=16, max_video_tokens=64))
    assert len(clip.frames) == len(clip.times_s) > 0 and len(clip.frames) % 2 == 0


def video_case(rng: random.Random, folder: Path) -> str:
    good = Videos.get(folder)
    name = rng.choice(sorted(name for name in good if name.endswith(".mp4") or rng.random() < 0.5))
    blow = rng.randrange(10)
    if blow == 0:
        blob = rng.randbytes(rng.choice((0, 1, 100, 10_000)))
    elif blow == 1:  # the start of one, the rest of another
        at = rng.randrange(len(good[name]))
        blob = good[name][:at] + good[rng.choice(sorted(good))][at:]
    elif blow == 2:  # only what stands before the frames, where the fields are
        head = bytearray(good[name])
        at = min(rng.randrange(1000), len(head) - 4)
        head[at : at + 4] = mutate(rng, bytes(head[at : at + 4]))[:4].ljust(4, b"\0")
        blob = bytes(head)
    else:
        blob = mutate(rng, good[name], good[rng.choice(sorted(good))])
    path = folder / f"broken{Path(name).suffix}"
    path.write_bytes(blob)
    try:
        read_video(path)
    except UserError as error:
        return "refused" if "\n" not in str(error).strip() else f"wrong: not one line: {error!r}"
    return "read"


CASES: dict[str, Callable[[random.Random, Path], str]] = {
    "annotation": annotation_case,
    "prediction": prediction_case,
    "recipe": recipe_case,
    "video": video_case,
}
MODULES = {
    **dict.fromkeys(("table", "queries", "durations"), "fuzz_tables"),
    **dict.fromkeys(("model", "processor", "tokenizer", "settings", "adapter"), "fuzz_models"),
    **dict.fromkeys(("output", "scores", "rounds", "report", "checkpoint", "resume"), "fuzz_runs"),
}


def case_of(kind: str) -> Callable[[random.Random, Path], str]:
    module = MODULES.get(kind)
    return CASES[kind] if module is None else importlib.import_module(module).CASES[kind]


def prepare(kind: str, folder: Path) -> None:
    """Makes what all cases of several kinds need, in a process that is forked for each kind."""
    if MODULES[kind] == "fuzz_models" and kind != "settings":
        from fuzz_models import good_adapter, good_folder

        good_folder(folder, True)
        good_adapter(folder)


def run_cases(kind: str, first: int, last: int, folder: Path, report: TextIO | None = None) -> None:
    """Tells ``report`` (stdout) of each case."""
    report = report or sys.stdout
    case = case_of(kind)
    for number in range(first, last):
        print(f"begin {number}", file=report, flush=True)
        try:
            what = case(random.Random(f"{kind}:{number}"), folder)
        except BaseException as error:
            what = f"wrong: {type(error).__name__}: {str(error)[:300]!r}"
        print(f"end {number} {what}", file=report, flush=True)


if __name__ == "__main__":
    run_cases(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
