"""The demo: a folder that holds another demo is left as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from video_opd.cli import main
from video_opd.config import dump_recipe
from video_opd.files import write_text
from video_opd.models.inference import with_video_form
from video_opd.world.demo import demo_recipe


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the folder of a demo of 4 steps, seed 0, that was killed after its first step."""
    monkeypatch.chdir(tmp_path)
    out = Path("demo")
    recipe = with_video_form(demo_recipe(out, 0, 4))  # train knows the form in which the base sees a video
    write_text(out / "recipe.yaml", dump_recipe(recipe))
    for name in ("metrics.jsonl", "scores.jsonl", "selected.jsonl", "select.json"):
        write_text(out / name, '{"step": 1}\n')
    return out


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--steps", "5"],
            "demo holds a demo with --steps 4, and this one has 5: give --steps 4 to continue",
        ),
        ([], "--steps 4, and this one has 80"),  # the recipe's own number
        (["--steps", "4", "--seed", "1"], "--seed 0, and this one has 1"),
    ],
)
def test_another_demo_in_the_folder_is_found_before_anything_is_written(
    begun: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_of(begun)
    assert main(["demo", "--out", str(begun), *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err and "another --out" in err and "run.dir" not in err
    assert bytes_of(begun) == before


def test_a_folder_with_another_run_is_named_by_the_option(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = begun / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.0006", "lr: 0.1"))
    before = bytes_of(begun)
    assert main(["demo", "--out", str(begun), "--steps", "4"]) == 2
    err = capsys.readouterr().err
    assert "optim.lr" in err and "another --out" in err and "run.dir" not in err
    (begun / "round-1").mkdir()
    assert main(["demo", "--out", str(begun), "--steps", "4"]) == 2
    err = capsys.readouterr().err
    assert "video-opd rounds" in err and "another --out" in err and "run.dir" not in err
    assert bytes_of(begun) == before


def test_the_same_demo_goes_on(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from video_opd.world import make

    class Reached(Exception):
        pass

    def reached(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(make, "make_world", reached)
    from video_opd.world.demo import run_demo

    for out, steps in ((begun, 4), (Path("free"), 5)):
        with pytest.raises(Reached):
            run_demo(out, steps=steps)


@pytest.mark.parametrize("name", ["2024", "yes", "a #1", "a: b", "[x]"])
def test_a_folder_may_have_any_name(name: str) -> None:
    recipe = demo_recipe(Path(name), 3, 4)
    assert (recipe.run.dir, recipe.data.train) == (name, f"{name}/selected.jsonl")
    assert (recipe.run.seed, recipe.optim.max_steps) == (3, 4)
