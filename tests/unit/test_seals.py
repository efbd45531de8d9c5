"""Seals of files that grow: what was sealed is there as it was, whatever came after it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from video_opd.seals import NOTHING, Seal, Sealer


def test_a_seal_is_the_length_and_sha256_of_all_that_was_there(tmp_path: Path) -> None:
    path, content = tmp_path / "rows", b""
    sealer = Sealer(path)
    assert sealer.seal() == NOTHING == Seal(size=0, sha256=hashlib.sha256().hexdigest())
    for added in (b"first\n", bytes(range(256)) * 9_000, b"", b"last\n"):  # more than a block of a MiB
        content += added
        with path.open("ab") as file:
            file.write(added)
        seal = sealer.seal()
        assert seal == Seal(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        assert seal == Sealer(path).seal() and seal == Seal.read(seal.to_json())


def test_each_byte_is_read_once_and_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows"
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    path.write_bytes(b"first\n")
    sealer = Sealer(path)
    sealer.seal()
    path.write_bytes(b"FIRST\nsecond\n")  # the first bytes are not looked at again
    assert sealer.seal().sha256 == hashlib.sha256(b"first\nsecond\n").hexdigest() and len(flushed) == 2


def test_what_was_sealed_holds_while_nothing_of_it_changes(tmp_path: Path) -> None:
    path, content = tmp_path / "rows", bytes(range(256)) * 9_000
    path.write_bytes(content)
    seal = Sealer(path).seal()
    path.write_bytes(content + b"more")
    assert seal.holds(path) and NOTHING.holds(path)
    changed = bytearray(content)
    changed[-1] ^= 1
    for other in (bytes(changed), content[:-1], b"", bytes(len(content))):
        path.write_bytes(other)
        assert not seal.holds(path)
    path.unlink()
    assert not seal.holds(path) and NOTHING.holds(path)


def test_a_pipe_is_not_what_was_sealed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    assert not Seal(size=3, sha256="x").holds(tmp_path / "a") and not NOTHING.holds(tmp_path / "a")


@pytest.mark.parametrize("value", [None, [], [1], ["1", "a"], [True, "a"], [1, 2], {"size": 1}, "ab"])
def test_anything_else_is_no_seal(value: object) -> None:
    assert Seal.read(value) is None
