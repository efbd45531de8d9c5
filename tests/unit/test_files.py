"""Files and folders are replaced whole or not at all, whatever stops the writing."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest

from video_opd import files
from video_opd.errors import UserError
from video_opd.files import (
    discard_unfinished,
    discard_unfinished_file,
    is_same_file,
    read_text,
    relative_path,
    replacing_file,
    replacing_folder,
    write_text,
)


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_made_with_its_folder_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    for text in ("old", "new é"):
        assert write_text(target, text) == target
        assert content(tmp_path) == {"deep/a.txt": text}
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_the_permissions_of_a_file_that_was_there_stay(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("old")
    for mode in (0o600, 0o640, 0o444):
        (tmp_path / "secret").chmod(mode)
        with replacing_file(tmp_path / "secret") as temporary:
            assert stat.S_IMODE(temporary.stat().st_mode) == mode | 0o600  # from the first byte on
            temporary.write_text("new")
        assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == mode
    write_text(tmp_path / "other", "")
    (tmp_path / "plain").touch()
    assert (tmp_path / "other").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "n" * 242, "n" * 243])
def test_the_longest_names_are_written_and_their_leftovers_removed(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "a")
    assert content(tmp_path) == {name: "a"}
    with replacing_file(tmp_path / name) as temporary:
        left = temporary.name
    (tmp_path / left).write_text("of a killed writer")
    other = name[:-1] + "m"
    discard_unfinished_file(tmp_path / other)
    assert (tmp_path / left).exists()  # another file's
    discard_unfinished_file(tmp_path / name)
    assert content(tmp_path) == {name: ""}


def test_readers_see_the_old_file_until_the_block_has_ended(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with replacing_file(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old" and temporary.parent == tmp_path
        assert list(tmp_path.glob("*.json")) == [target], "no pattern of the target finds it"
    assert content(tmp_path) == {"a.json": "new"}


def test_the_content_is_on_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        done.append(f"{Path(target).name} is there")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", noted_fsync)
    monkeypatch.setattr(files.os, "replace", noted_replace)
    with replacing_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    assert done == [temporary.name, "a.txt is there"]
    done.clear()
    with replacing_folder(tmp_path / "step-4") as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text("x")
        (folder / "state").write_text("x")
    assert sorted(done[:2]) == ["state", "weights"] and done[2:] == ["step-4 is there"]
    done.clear()
    with replacing_file(tmp_path / "cached", flush=False) as temporary:
        temporary.write_text("x")
    assert done == ["cached is there"]


@pytest.mark.parametrize("broken", [KeyError("a bug"), KeyboardInterrupt(), UserError("a wrong row")])
def test_what_the_block_raises_passes_and_the_old_stays(tmp_path: Path, broken: BaseException) -> None:
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "step-4" / "state", "old")
    before = content(tmp_path)
    with pytest.raises(type(broken)) as caught, replacing_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise broken
    assert caught.value is broken
    with pytest.raises(type(broken)) as caught, replacing_folder(tmp_path / "step-4") as folder:
        (folder / "state").write_text("half")
        raise broken
    assert caught.value is broken
    assert content(tmp_path) == before and {path.name for path in tmp_path.iterdir()} == {"a.txt", "step-4"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_names_the_place_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "step-4" / "state", "old")
    before = content(tmp_path)
    monkeypatch.setattr(files.os, step, full_disk)
    says = r"cannot be written \(No space left on device; \d+\.\d GiB are free there\): free some space"
    with pytest.raises(UserError, match=rf"a\.txt: {says}"):
        write_text(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    monkeypatch.setattr(files.os, step, full_disk)
    with pytest.raises(UserError, match=rf"step-4: {says}"), replacing_folder(tmp_path / "step-4") as folder:
        (folder / "state").write_text("new")
    assert content(tmp_path) == before


def test_a_folder_that_cannot_take_its_place_gives_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "model" / "weights", "old")
    replace = os.replace
    calls: list[Path] = []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            full_disk()
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", second_fails)
    with pytest.raises(UserError), replacing_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert len(calls) == 3 and content(tmp_path) == {"model/weights": "old"}


def test_a_folder_loses_the_files_that_the_new_one_has_not(tmp_path: Path) -> None:
    write_text(tmp_path / "model" / "weights", "old")
    write_text(tmp_path / "model" / "adapter" / "weights", "old")
    with replacing_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert content(tmp_path) == {"model/weights": "new"} and os.listdir(tmp_path) == ["model"]


def test_through_a_link_the_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    write_text(tmp_path / "there" / "a.txt", "old")
    write_text(tmp_path / "there" / "model" / "weights", "old")
    (tmp_path / "a.txt").symlink_to("there/a.txt")
    (tmp_path / "model").symlink_to("there/model")
    write_text(tmp_path / "a.txt", "new")
    with replacing_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert (tmp_path / "a.txt").is_symlink() and (tmp_path / "model").is_symlink()
    assert content(tmp_path / "there") == {"a.txt": "new", "model/weights": "new"}


def test_devices_and_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(UserError, match="not a plain file"):
            write_text(path, "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file; name a folder"), replacing_folder(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match=r"file/a\.txt: cannot be written"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_a_record_that_is_too_large_or_never_ends_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("{}")
    assert read_text(path) == "{}"
    with path.open("r+b") as file:
        file.truncate(200 << 20)
    with pytest.raises(UserError, match=r"state\.json: larger than 16 MiB"):
        read_text(path)
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="not a plain file"):
            read_text(odd)


def test_a_folder_that_a_kill_left_aside_is_brought_back(tmp_path: Path) -> None:
    for name, text in (
        (".old-model", "old"),
        (".part-model", "new"),
        (".old-step-2", "old"),
        ("step-2", "new"),
    ):
        write_text(tmp_path / name / "weights", text)
    discard_unfinished(tmp_path)
    assert content(tmp_path) == {"model/weights": "old", "step-2/weights": "new"}
    assert sorted(os.listdir(tmp_path)) == ["model", "step-2"]
    (tmp_path / "model").rename(tmp_path / ".old-model")
    with pytest.raises(KeyError), replacing_folder(tmp_path / "model"):
        raise KeyError
    assert content(tmp_path) == {"model/weights": "old", "step-2/weights": "new"}


def write_and_die(root: Path, kind: str) -> None:
    replacing = replacing_file if kind == "file" else replacing_folder
    with replacing(root / "target") as temporary:
        (temporary if kind == "file" else temporary / "weights").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_leaves_the_old_and_remains_that_are_recognised(tmp_path: Path, kind: str) -> None:
    write_text(tmp_path / ("target" if kind == "file" else "target/weights"), "old")
    before = content(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=write_and_die, args=(tmp_path, kind))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 2
    discard_unfinished(tmp_path)
    discard_unfinished(tmp_path / "not there")
    assert content(tmp_path) == before and os.listdir(tmp_path) == ["target"]


def discard_in_another_process(folder: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=discard_unfinished, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_what_a_living_writer_has_not_finished_stays(tmp_path: Path) -> None:
    """A command that starts in the folder meanwhile removes only what dead writers left."""
    (tmp_path / ".part-of-an-earlier-version.json.0badcafe").write_text("half")
    (tmp_path / ".part-link").symlink_to("nowhere")
    os.mkfifo(tmp_path / ".part-pipe")
    with replacing_file(tmp_path / "report.html") as temporary:
        discard_in_another_process(tmp_path)
        discard_unfinished(tmp_path)
        assert os.listdir(tmp_path) == [temporary.name]
        with open(temporary, "w") as file:
            file.write("first")
        discard_in_another_process(tmp_path)  # closing the file did not end the lock
        temporary.write_text("second")
        discard_in_another_process(tmp_path)
    assert content(tmp_path) == {"report.html": "second"}


def test_a_file_that_was_removed_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = files.fcntl.flock, 0

    def removed_before(descriptor: int, how: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            discard_in_another_process(tmp_path)
        real(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", removed_before)
    with replacing_file(tmp_path / "a.txt") as temporary:
        monkeypatch.undo()
        discard_in_another_process(tmp_path)
        temporary.write_text("whole")
    assert calls == 2 and content(tmp_path) == {"a.txt": "whole"}


def test_without_locks_nothing_that_may_be_written_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with replacing_file(tmp_path / "a.txt") as temporary:
        discard_unfinished(tmp_path)
        temporary.write_text("whole")
        discard_unfinished(tmp_path)
    assert content(tmp_path) == {"a.txt": "whole"}


def test_two_paths_name_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "hard").hardlink_to("a")
    (tmp_path / "to-new").symlink_to("new")
    for one, other in (
        ("a", tmp_path / "a"),
        ("a", "link"),
        ("a", "hard"),
        ("new", "./new"),
        ("new", "to-new"),
    ):
        assert is_same_file(one, other) and is_same_file(other, one)
    pairs = [("a", "new"), ("a", "b"), (os.devnull, os.devnull), (".", "."), ("a", "a\0"), ("x" * 300, "a")]
    for one, other in pairs:
        assert not is_same_file(one, other) and not is_same_file(other, one)


def test_a_relative_path_holds_behind_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``..`` behind a link leaves the folder that it points to. Without links nothing changes."""
    for folder in ("videos/more", "runs/a", "disk/far/away"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs/linked").symlink_to(tmp_path / "disk/far/away")
    (tmp_path / "seen").symlink_to(tmp_path / "videos")
    monkeypatch.chdir(tmp_path / "runs")
    video = tmp_path / "videos/more/v.mp4"
    video.write_bytes(b"v")
    assert relative_path(video, tmp_path / "runs/a") == "../../videos/more/v.mp4"
    assert relative_path("../seen/more/v.mp4", "a") == "../../seen/more/v.mp4"
    assert relative_path(video, tmp_path / "videos/more") == "v.mp4"
    for folder in ("linked", "a"):
        for path in (
            video,
            tmp_path / "seen/more/v.mp4",
            Path("../seen/more/v.mp4"),
            Path("linked/../../../seen/more/v.mp4"),
        ):
            assert (Path(folder) / relative_path(path, folder)).samefile(video)
