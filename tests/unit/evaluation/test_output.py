"""Outputs of other commands are refused as they are; changed and lost rows are named or made again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from video_opd.errors import UserError
from video_opd.evaluation.output import Output
from video_opd.evaluation.resume import (
    changed_since_written,
    note_changes,
    process_file_path,
    provenance_path,
    read_provenance,
    write_provenance,
)
from video_opd.seals import Sealer

MADE: dict[str, Any] = {"model": "m", "answers": {"n": 1}}
OTHER: dict[str, Any] = {"model": "another", "answers": {"n": 1}}


def row(number: int) -> dict[str, Any]:
    return {"id": f"s{number}", "responses": [f"{number}.00 to {number + 1}.00"]}


def written(out: Path, *, repeatable: bool = False) -> Output:
    """Six rows in two blocks, and one row after them."""
    output = Output(out, MADE, repeatable=repeatable)
    for block in (range(3), range(3, 6)):
        output.append([row(number) for number in block])
        output.end_block()
    output.append([row(6)])
    return output


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("repeatable", [True, False])
@pytest.mark.parametrize("tail", [b"", b'{"id": "s7", "respon', b"\n\n"])
@pytest.mark.parametrize("gone", [(), ("meta.json",), ("jsonl",)])
def test_rows_of_another_command_are_refused_as_they_are(
    tmp_path: Path, repeatable: bool, tail: bytes, gone: tuple[str, ...]
) -> None:
    """Neither a half last line nor the rows after the last block are cut before the refusal."""
    out = tmp_path / "p.jsonl"
    written(out, repeatable=True)
    with out.open("ab") as file:
        file.write(tail)
    if gone:
        (out if gone == ("jsonl",) else provenance_path(out)).unlink()
    if gone == ("jsonl",):  # those of several processes
        process_file_path(out, 1).write_bytes(json.dumps(row(7)).encode() + b"\n" + tail)
    (tmp_path / "p.jsonl.window").write_text("5")
    before = files(tmp_path)
    remedy = r"delete it and p\.jsonl\.meta\.json" if repeatable else "--overwrite"
    with pytest.raises(UserError, match=remedy):
        Output(out, OTHER, repeatable=repeatable)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "content", [b"a text of somebody", b"half a line\nand another", b'{"other": 1}\n{"ha', b"7"]
)
def test_a_file_that_is_no_output_is_refused_as_it_is(tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "notes.txt"
    out.write_bytes(content)
    with pytest.raises(UserError, match=r"has rows but no notes\.txt\.meta\.json"):
        Output(out, MADE)
    assert files(tmp_path) == {"notes.txt": content}


def test_the_rows_so_far_are_sealed(tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    output = written(out)
    note = json.loads(provenance_path(out).read_text())
    assert note == {**MADE, "written": Sealer(out).seal().to_json()} and read_provenance(out) == MADE
    assert not changed_since_written(out)
    with out.open("ab") as file:
        file.write(b'{"id": "s7", "respon')
    again = Output(out, MADE)
    assert again.ids == output.ids == {f"s{number}" for number in range(7)}
    again.append([row(7)])
    assert Output(out, MADE).ids == {f"s{number}" for number in range(8)} and not changed_since_written(out)


DAMAGE = {
    "a changed row": lambda text: text.replace(b"1.00 to 2.00", b"1.00 to 9.00"),
    "a lost first row": lambda text: text.partition(b"\n")[2],
    "a lost row of the block": lambda text: b"".join(text.splitlines(keepends=True)[:5]),
    "half a row of the block": lambda text: b"".join(text.splitlines(keepends=True)[:6])[:-9],
    "a bit": lambda text: bytes([text[0] ^ 1]) + text[1:],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_rows_that_changed_or_got_lost_are_named(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.jsonl"
    written(out)
    out.write_bytes(DAMAGE[kind](out.read_bytes()))
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"changed or lost since they were written.*delete \"written\""):
        Output(out, MADE)
    assert files(tmp_path) == before and changed_since_written(out)
    note_changes(out)
    assert "changed or lost" in capsys.readouterr().err
    if kind in ("a changed row", "a lost first row", "a lost row of the block"):  # these can be read
        write_provenance(out, read_provenance(out), None)  # what the message tells
        assert len(Output(out, MADE).ids) == len(out.read_bytes().splitlines())
    assert Output(out, MADE, overwrite=True).ids == set()


@pytest.mark.parametrize("kind", DAMAGE)
def test_rows_of_a_repeatable_output_are_made_again(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.jsonl"
    written(out, repeatable=True)
    out.write_bytes(DAMAGE[kind](out.read_bytes()))
    assert Output(out, MADE, repeatable=True).ids == set()
    assert "are made again" in capsys.readouterr().err and not out.exists()


def test_a_repeatable_output_is_cut_to_its_last_block(tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    written(out, repeatable=True)
    whole = out.read_bytes()
    blocks = b"".join(whole.splitlines(keepends=True)[:6])
    for content in (whole, whole[:-5], blocks):
        out.write_bytes(content)
        assert len(Output(out, MADE, repeatable=True).ids) == 6 and out.read_bytes() == blocks


@pytest.mark.parametrize("size", ["", "120", "-5", "0", "nonsense"])
def test_an_output_that_an_earlier_version_began_is_continued(tmp_path: Path, size: str) -> None:
    """It has no seal, and the size of the last block in a file of its own."""
    out, block = tmp_path / "p.jsonl", tmp_path / "p.jsonl.window"
    written(out)
    provenance_path(out).write_text(json.dumps(MADE))
    length = len(out.read_bytes())
    if size:
        block.write_text(size)
    kept = Output(out, MADE, repeatable=True).ids
    expected = {"120": 120, "-5": 0, "0": 0}.get(size, length)
    assert out.stat().st_size <= expected and len(kept) == out.read_bytes().count(b"\n")
    assert (len(kept) == 7) == (expected == length) and not block.exists()


@pytest.mark.parametrize("size", ["", "nonsense", "-5", "9" * 5000, "1e3", "60"])
@pytest.mark.parametrize("name", ["0", "x", "", "9"])
def test_a_damaged_end_of_a_block_keeps_the_rows_of_a_process(tmp_path: Path, name: str, size: str) -> None:
    """Its rows are whole lines either way; a size that is none, and that of no process, cuts nothing."""
    out, part = tmp_path / "p.jsonl", process_file_path(tmp_path / "p.jsonl", 0)
    provenance_path(out).write_text(json.dumps(MADE))
    part.write_text("".join(json.dumps(row(number)) + "\n" for number in range(3)))
    (tmp_path / f"p.jsonl.window-{name}").write_text(size)
    length = len(json.dumps(row(0))) + 1
    kept = {"-5": 0, "60": 60 // length}.get(size, 3) if name == "0" else 3
    assert Output(out, MADE, repeatable=True).ids == {f"s{number}" for number in range(kept)}
    assert not list(tmp_path.glob("*.window*")) and not part.exists()


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.part-0", "p.jsonl.meta.json"])
def test_a_pipe_or_a_folder_in_place_of_an_output_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "p.jsonl.window-0").write_text("3")
    for make in (Path.mkdir, os.mkfifo):
        make(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: not a plain file"):
            Output(tmp_path / "p.jsonl", MADE)
        if (tmp_path / name).is_dir():
            (tmp_path / name).rmdir()


def test_a_kill_during_a_merge_leaves_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "p.jsonl"
    written(out)
    process_file_path(out, 0).write_text(json.dumps(row(8)) + "\n")
    real = Path.unlink

    def killed(path: Path, **settings: Any) -> None:
        if "part-0" in path.name and not path.name.startswith("."):
            raise KeyboardInterrupt
        real(path, **settings)

    for when in ("the merged file", "the parts"):
        with monkeypatch.context() as patch:
            if when == "the parts":
                patch.setattr(Path, "unlink", killed)
            else:
                patch.setattr("video_opd.evaluation.resume.write_jsonl", _fails_at(out))
            with pytest.raises(KeyboardInterrupt):
                Output(out, MADE)
    assert Output(out, MADE).ids == {f"s{number}" for number in (*range(7), 8)}
    assert not changed_since_written(out) and not process_file_path(out, 0).exists()


def _fails_at(out: Path) -> Any:
    from video_opd.jsonl import write_jsonl

    def write(path: Path, rows: Any) -> None:
        write_jsonl(path, rows)
        if path == out:
            raise KeyboardInterrupt

    return write
