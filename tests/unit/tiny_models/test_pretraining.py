"""Pretraining shows a tiny model exactly what the processor will show it later."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_models.__main__ import main
from tiny_models.auxiliary import Pretrainer
from tiny_models.examples import (
    augment,
    by_size,
    label_events,
    mirror,
    render_example,
    window,
)
from tiny_models.muon import orthogonalise
from tiny_models.packing import Packer
from tiny_models.stages import read_pretraining
from video_opd.config import PromptConfig
from video_opd.data.encode import PromptEncoder
from video_opd.data.video import clip_digest
from video_opd.errors import UserError
from video_opd.types import Clip
from video_opd.world.queries import COLOURS, FAMILIES, SHAPES
from video_opd.world.questions import general_questions
from video_opd.world.scene import reword, spell_of
from video_opd.world.tiny import build_model, build_processor


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def examples():
    """Two videos of one frame size, of different lengths, with two questions or more each."""
    found = [render_example("train", 3, i) for i in range(8)]
    group = max(by_size([e for e in found if len(e.scene.questions) > 1]), key=len)
    return group[:2]


def clip_of(example) -> Clip:
    return Clip(
        path=Path("none.mp4"),
        frames=example.frames,
        times_s=example.times_s,
        frame_indices=np.arange(len(example.times_s)),
        source_fps=example.scene.fps,
        duration_s=example.scene.duration_s,
        source_size_px=example.scene.size_px,
        digest=clip_digest(example.frames, example.times_s),
    )


def test_packed_questions_are_what_the_processor_writes(processor, examples):
    """Ids, positions, pixels of every question equal those of a prompt of its own."""
    model = build_model("test")
    batch = Packer(processor).batch(examples, np.random.default_rng(0))
    encoder = PromptEncoder(processor, PromptConfig(video_form="nested"))  # the form of the tiny models
    start = 0
    for b, example in enumerate(examples):
        clip = clip_of(example)
        for asked in (a for a in batch.answers if a.row == b):
            prompt = encoder.encode(clip, asked.question.query, "x")
            positions, _ = model.model.get_rope_index(
                prompt.input_ids,
                mm_token_type_ids=prompt.tensors["mm_token_type_ids"],
                video_grid_thw=prompt.tensors["video_grid_thw"],
            )
            seen = batch.mask[b, 0, asked.position - 1].nonzero().flatten()  # the video and this question
            assert torch.equal(batch.input_ids[b, seen], prompt.input_ids[0])
            assert torch.equal(batch.position_ids[:, b, seen], positions[:, 0])
        pixels = prompt.tensors["pixel_values_videos"]
        torch.testing.assert_close(batch.pixel_values[start : start + len(pixels)], pixels, atol=1e-5, rtol=0)
        start += len(pixels)


def responses_of(sequences, row: int) -> list[tuple[torch.Tensor, list[int]]]:
    """The positions that each question of a video sees, up to its response, and the response's tokens."""
    wanted = sequences.targets[row] >= 0
    found: list[tuple[torch.Tensor, list[int]]] = []
    for at in wanted.nonzero().flatten().tolist():
        if found and wanted[at - 1]:
            found[-1][1].append(int(sequences.targets[row, at]))
        else:
            found.append((sequences.mask[row, 0, at].nonzero().flatten(), [int(sequences.targets[row, at])]))
    return found


@pytest.mark.parametrize("kind", ["questions", "thinking"])
def test_packed_exchanges_are_what_the_processor_writes(processor, examples, kind):
    """Prompt and positions of every question, in the prompt style and mode in which it is asked later."""
    model, packer = build_model("test"), Packer(processor)
    if kind == "questions":
        sequences = packer.questions(examples, np.random.default_rng(4))
        encoder = PromptEncoder(processor, PromptConfig(style="question", video_form="nested"))
    else:
        sequences = packer.thinking(examples, np.random.default_rng(4), per_video=2)
        encoder = PromptEncoder(processor, PromptConfig(thinking=True, video_form="nested"))
    rng = np.random.default_rng(4)
    for b, example in enumerate(examples):
        if kind == "questions":
            asked = [(q.query, q.answer) for q in general_questions(example.scene, rng)]
        else:
            asked = []
            for index in rng.permutation(len(example.scene.questions))[:2]:
                question = example.scene.questions[index]
                actor, spell = example.scene.actors[question.actor], spell_of(example.scene, question)
                there = f"{spell.start_s:.2f} to {spell.end_s:.2f}"
                thought = f"<think>the {actor.colour} {actor.shape}: {there}</think>"
                span = f"{question.span[0]:.2f} to {question.span[1]:.2f}"
                asked.append((reword(example.scene, question, rng), thought + span))
        found = responses_of(sequences, b)
        assert len(found) == len(asked) > 1
        for (seen, written), (query, answer) in zip(found, asked, strict=True):
            prompt = encoder.encode(clip_of(example), query, "x")
            positions, _ = model.model.get_rope_index(
                prompt.input_ids,
                mm_token_type_ids=prompt.tensors["mm_token_type_ids"],
                video_grid_thw=prompt.tensors["video_grid_thw"],
            )
            assert torch.equal(sequences.input_ids[b, seen], prompt.input_ids[0])
            assert torch.equal(sequences.position_ids[:, b, seen], positions[:, 0])
            assert processor.tokenizer.decode(written) == answer + "<|im_end|>"


def test_packed_forward_equals_one_question_at_a_time(processor, examples):
    module = Pretrainer(build_model("tiny")).eval()
    packer = Packer(processor)
    batch = packer.batch(examples[:1], np.random.default_rng(0))
    together, _, _ = module.hidden(batch)
    for index, asked in enumerate(batch.answers):
        alone = examples[0].__class__(
            scene=examples[0].scene.__class__(
                **{**examples[0].scene.__dict__, "questions": (examples[0].scene.questions[index],)}
            ),
            frames=examples[0].frames,
            times_s=examples[0].times_s,
        )
        single = packer.batch([alone], np.random.default_rng(0))
        hidden, _, _ = module.hidden(single)
        torch.testing.assert_close(
            together[0, asked.position - 1],
            hidden[0, single.answers[0].position - 1],
            atol=1e-5,
            rtol=1e-5,
        )


def test_pointers_look_at_the_pairs_that_hold_the_boundaries(processor, examples):
    batch = Packer(processor).batch(examples, np.random.default_rng(0), per_video=2)
    where = {(int(r), int(p)): i for i, (r, p) in enumerate(batch.ends)}
    pairs = np.concatenate([e.times_s.reshape(-1, 2) for e in examples])
    for row, at, head, key in batch.pointers.tolist():
        asked = max(
            (a for a in batch.answers if a.row == row and a.position - 1 <= at), key=lambda a: a.position
        )
        boundary = asked.question.span[head]
        first, second = pairs[where[row, key]]
        gap = second - first
        assert first - gap - 1e-6 < boundary <= second + gap + 1e-6
    colours = [list(COLOURS)[i] for i in batch.about[:, 0]]
    shown = {a.colour for e in examples for a in e.scene.actors}
    assert set(colours) <= shown


def test_mirror_and_window_keep_the_truth(examples):
    rng = np.random.default_rng(0)
    scene = examples[0].scene
    twice = mirror(mirror(scene))
    assert [q.family for q in twice.questions] == [q.family for q in scene.questions]
    assert all(
        "left" in a.family
        for a, b in zip(mirror(scene).questions, scene.questions, strict=True)
        if "right" in b.family
    )
    cut = window(examples[0], 6, rng)
    assert len(cut.times_s) == 12 and cut.scene.questions
    for q in cut.scene.questions:
        assert cut.times_s[0] - 1e-6 <= q.span[0] and q.span[1] <= cut.times_s[-1] + 0.25
    other = augment(cut, rng)
    assert other.frames.shape == cut.frames.shape and not np.array_equal(other.frames, cut.frames)


def test_event_labels_begin_where_the_span_begins(examples):
    example = examples[0]
    pairs = example.times_s.reshape(-1, 2)
    labels = label_events(example.scene, pairs)
    for q in example.scene.questions:
        actor = example.scene.actors[q.actor]
        look = list(COLOURS).index(actor.colour) * len(SHAPES) + SHAPES.index(actor.shape)
        active = labels[:, :2, look, FAMILIES.index(q.family)].reshape(-1)
        times = example.times_s[active.astype(bool)]
        assert times.min() >= q.span[0] - 1e-6 and times.max() < q.span[1]


def test_orthogonalise_gives_near_orthogonal_rows():
    x = orthogonalise(torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.5 and values.max() < 1.5


def test_losses_have_gradients_for_every_part(processor, examples):
    module = Pretrainer(build_model("tiny"))
    losses = module.losses(Packer(processor).batch(examples, np.random.default_rng(0), per_video=2))
    assert set(losses) == {"answer", "events", "clock", "objects", "pointer", "query"}
    torch.stack(list(losses.values())).sum().backward()
    lost = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [name for name in lost if "lm_head" not in name and "patch_embed.proj.bias" not in name] == []


def test_a_recipe_with_an_unknown_key(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("stages:\n  - {name: a, step: 3}\n")
    with pytest.raises(UserError, match="steps"):
        read_pretraining(path)


def test_the_command_prints_the_folders_of_its_models(tmp_path, capsys, monkeypatch) -> None:
    asked = []

    def run_recipe(path: Path | None, out: str, workers: int | None) -> list[Path]:
        asked.append((path, out, workers))
        return [Path(out) / "tiny-base", Path(out) / "tiny-teacher"]

    monkeypatch.setattr("tiny_models.__main__.run_recipe", run_recipe)
    main(["--out", "made"])
    assert capsys.readouterr().out.splitlines() == ["made/tiny-base", "made/tiny-teacher"]
    recipe = tmp_path / "r.yaml"
    recipe.write_text("stages: []\n")
    main(["--recipe", str(recipe), "--workers", "3"])
    assert capsys.readouterr().out.splitlines() == [
        "runs/world-models/tiny-base",
        "runs/world-models/tiny-teacher",
    ]
    assert asked == [(None, "made", None), (recipe, "runs/world-models", 3)]
    with pytest.raises(SystemExit):
        main(["--recipe", str(tmp_path / "absent.yaml")])
    assert "no such file" in capsys.readouterr().err
