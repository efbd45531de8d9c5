"""Predictions: what is written, what is kept, what is refused; and once with a real tiny model and video."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import pytest
from answer_cases import FakeLoader, FakePolicy, make_prompt, make_samples
from prediction_cases import COUNTS, PROVENANCE, SAMPLED, queries_of, rows_of, seeded

from video_opd.errors import UserError
from video_opd.evaluation.batching import BLOCK_BATCHES, blocks_of_batches
from video_opd.evaluation.metrics import evaluate
from video_opd.evaluation.predict import GenerationSettings, PredictResult, predict
from video_opd.evaluation.predictions import read_predictions
from video_opd.evaluation.resume import provenance_path, read_provenance, write_provenance
from video_opd.models import fingerprint
from video_opd.models.fingerprint import model_fingerprint
from video_opd.types import Sample


def right(sample_id: str, seed: int | None) -> str:
    return "5.00 to 10.00"


def test_rows_are_those_of_a_predictions_file(tmp_path: Path) -> None:
    out, samples = tmp_path / "p.jsonl", make_samples(5)
    policy = FakePolicy(
        lambda i, seed: "10.00 to 5.00" if i == "s1" else "no idea" if i == "s2" else "5.00 to 10.00"
    )
    result = predict(policy, samples, FakeLoader(failing=["s4"]), out, provenance=PROVENANCE, batch_size=2)
    assert result == PredictResult(kept=0, answered=4, failed=1)
    rows = {row["id"]: row for row in rows_of(out)}
    assert rows["s0"]["responses"] == ["5.00 to 10.00"]
    assert rows["s0"]["spans"] == [[5.0, 10.0]] and rows["s0"]["rules"] == ["exact"]
    assert rows["s1"]["spans"] == [None] and rows["s1"]["rules"] == ["exact"]
    assert rows["s2"]["spans"] == [None] and rows["s2"]["rules"] == ["none"]
    metrics = evaluate(samples, read_predictions(out))
    assert (metrics.n, metrics.unparsed, metrics.missing, metrics.miou) == (5, 2, 1, 40.0)


def test_a_video_that_was_replaced_is_not_taken_for_answered(tmp_path: Path) -> None:
    out, video = tmp_path / "p.jsonl", tmp_path / "a" / "v.mp4"
    video.parent.mkdir()
    video.write_bytes(b"pictures")

    def again(path: Path) -> PredictResult:
        samples = [replace(sample, video=path) for sample in make_samples(2)]
        return predict(FakePolicy(right), samples, FakeLoader(), out, provenance=PROVENANCE)

    assert again(video).answered == 2
    assert [row["video_bytes"] for row in rows_of(out)] == [8, 8]
    moved = tmp_path / "b" / "v.mp4"
    moved.parent.mkdir()
    moved.write_bytes(b"pictures")
    for path in (video, moved, tmp_path / "gone.mp4"):
        assert again(path) == PredictResult(kept=2, answered=0, failed=0)
    moved.write_bytes(b"other pictures")
    with pytest.raises(UserError, match=r"p\.jsonl: id 's0' is there for another video .* 8 bytes"):
        again(moved)
    rows = [{key: row[key] for key in row if key != "video_bytes"} for row in rows_of(out)]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))  # an earlier version's
    write_provenance(out, read_provenance(out), None)
    assert again(moved).kept == 2


def test_greedy_is_the_default_and_takes_no_seeds(tmp_path: Path) -> None:
    policy = FakePolicy(right)
    predict(policy, make_samples(3), FakeLoader(), tmp_path / "p.jsonl", provenance=PROVENANCE)
    assert [(call["n"], call["temperature"]) for call in policy.calls] == [(1, 0.0)]


def test_draws_do_not_depend_on_batches_or_order(tmp_path: Path) -> None:
    samples = make_samples(9)
    written = []
    for i, (order, batch_size) in enumerate([(samples, 1), (samples, 4), (samples[::-1], 3)]):
        out = tmp_path / f"{i}.jsonl"
        settings = SAMPLED
        predict(
            FakePolicy(seeded),
            order,
            FakeLoader(),
            out,
            provenance=PROVENANCE,
            settings=settings,
            batch_size=batch_size,
        )
        written.append({row["id"]: row["responses"] for row in rows_of(out)})
    assert written[0] == written[1] == written[2]
    assert len({text for texts in written[0].values() for text in texts}) > 3
    other = tmp_path / "other.jsonl"
    settings = GenerationSettings(n=3, temperature=1.0, seed=5)
    predict(FakePolicy(seeded), samples, FakeLoader(), other, provenance=PROVENANCE, settings=settings)
    assert {row["id"]: row["responses"] for row in rows_of(other)} != written[0]


def test_a_kill_loses_nothing_and_the_rest_is_done_once(tmp_path: Path) -> None:
    out, samples = tmp_path / "p.jsonl", make_samples(12)
    with pytest.raises(KeyboardInterrupt):
        predict(
            FakePolicy(seeded),
            samples,
            FakeLoader(kill_after=10),
            out,
            provenance=PROVENANCE,
            settings=SAMPLED,
            batch_size=2,
        )
    finished = rows_of(out)
    assert len(finished) == 2 * BLOCK_BATCHES
    with out.open("a") as file:
        file.write('{"id": "s11", "resp')  # the kill came in the middle of a line
    loader = FakeLoader()
    result = predict(
        FakePolicy(seeded), samples, loader, out, provenance=PROVENANCE, settings=SAMPLED, batch_size=2
    )
    assert result == PredictResult(kept=8, answered=4, failed=0)
    assert set(loader.opened[0]) == {s.id for s in samples} - {row["id"] for row in finished}
    undisturbed = tmp_path / "q.jsonl"
    predict(
        FakePolicy(seeded),
        samples,
        FakeLoader(),
        undisturbed,
        provenance=PROVENANCE,
        settings=SAMPLED,
        batch_size=2,
    )
    key = lambda row: row["id"]  # noqa: E731
    assert sorted(rows_of(out), key=key) == sorted(rows_of(undisturbed), key=key)
    loader = FakeLoader()
    again = predict(FakePolicy(seeded), samples, loader, out, provenance=PROVENANCE, settings=SAMPLED)
    assert again == PredictResult(kept=12, answered=0, failed=0) and loader.opened == []


def test_a_larger_data_file_keeps_what_was_answered(tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    predict(FakePolicy(right), make_samples(3), FakeLoader(), out, provenance=PROVENANCE)
    assert predict(FakePolicy(right), make_samples(5), FakeLoader(), out, provenance=PROVENANCE).answered == 2


@pytest.mark.parametrize(
    ("provenance", "settings", "key"),
    [
        ({**PROVENANCE, "model": "xyz"}, GenerationSettings(), "model"),
        ({**PROVENANCE, "input": {"video": {"fps": 1.0}}}, GenerationSettings(), r"input\.video\.fps"),
        (PROVENANCE, GenerationSettings(max_new_tokens=9), r"answers\.max_new_tokens"),
    ],
)
def test_answers_of_two_models_never_share_a_file(
    tmp_path: Path, provenance: dict[str, Any], settings: GenerationSettings, key: str
) -> None:
    out = tmp_path / "p.jsonl"
    predict(FakePolicy(right), make_samples(2), FakeLoader(), out, provenance=PROVENANCE)
    before = out.read_text()
    with pytest.raises(UserError, match=f"{key}.*--overwrite"):
        predict(
            FakePolicy(right), make_samples(3), FakeLoader(), out, provenance=provenance, settings=settings
        )
    assert out.read_text() == before
    result = predict(
        FakePolicy(right),
        make_samples(3),
        FakeLoader(),
        out,
        provenance=provenance,
        settings=settings,
        overwrite=True,
    )
    assert result.answered == 3 and len(rows_of(out)) == 3


def test_other_files_are_not_continued(tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    predict(FakePolicy(right), make_samples(2), FakeLoader(), out, provenance=PROVENANCE)
    changed = [Sample(id="s0", video=Path("x"), query="another question")]
    with pytest.raises(UserError, match="another query"):
        predict(FakePolicy(right), changed, FakeLoader(), out, provenance=PROVENANCE)
    made = read_provenance(out)
    provenance_path(out).unlink()
    with pytest.raises(UserError, match="--overwrite"):
        predict(FakePolicy(right), make_samples(2), FakeLoader(), out, provenance=PROVENANCE)
    out.write_text('{"step": 1}\n')
    write_provenance(out, made, None)
    with pytest.raises(UserError, match=r"p\.jsonl:1"):
        predict(FakePolicy(right), make_samples(2), FakeLoader(), out, provenance=PROVENANCE)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="greedy"):
        GenerationSettings(n=2)
    with pytest.raises(UserError, match="temperature"):
        GenerationSettings(temperature=-1.0)
    with pytest.raises(UserError, match="at least 1"):
        GenerationSettings(n=0)


def test_batches_hold_like_lengths_and_every_item_once() -> None:
    items = [(sample, make_prompt(sample, 10 + 13 * i % 40)) for i, sample in enumerate(make_samples(30))]
    batches = list(chain.from_iterable(blocks_of_batches(items, 4)))
    assert sorted(s.id for batch in batches for s, _ in batch) == sorted(s.id for s, _ in items)
    assert max(map(len, batches)) == 4
    spread = [max(p.length for _, p in batch) - min(p.length for _, p in batch) for batch in batches]
    in_order = [items[i : i + 4] for i in range(0, 30, 4)]
    assert sum(spread) < sum(max(p.length for _, p in b) - min(p.length for _, p in b) for b in in_order)


def test_long_videos_do_not_wait_for_a_full_block() -> None:
    seen = 0

    def items() -> Any:
        nonlocal seen
        for sample in make_samples(16):
            seen += 1
            yield sample, make_prompt(sample, 40_000)

    next(blocks_of_batches(items(), 2))
    assert seen == 5 < 2 * BLOCK_BATCHES  # two videos of 40,000 tokens, which their queries share


@pytest.mark.parametrize("batch_size", [1, 4, 5, 8])
def test_the_queries_of_a_video_are_in_one_batch(batch_size: int) -> None:
    samples = queries_of(COUNTS)
    items = [(sample, make_prompt(sample, 10 + 13 * int(sample.video.stem) % 40)) for sample in samples]
    batches = list(chain.from_iterable(blocks_of_batches(items, batch_size)))
    assert sorted(s.id for batch in batches for s, _ in batch) == sorted(s.id for s in samples)
    assert max(map(len, batches)) <= batch_size
    for v, count in enumerate(COUNTS):
        spread = sum(any(s.video.stem == str(v) for s, _ in batch) for batch in batches)
        assert spread == -(-count // batch_size), v


def test_rows_of_a_video_need_not_lie_together_in_the_data(tmp_path: Path) -> None:
    """They are answered together, and the loader is given them so: a video is decoded once."""
    out, samples = tmp_path / "p.jsonl", queries_of(COUNTS)
    samples = sorted(samples, key=lambda sample: sample.id[::-1])
    loader, policy = FakeLoader(), FakePolicy(seeded)
    predict(policy, samples, loader, out, provenance=PROVENANCE, settings=SAMPLED, batch_size=9)
    runs = [video for video, _ in groupby(name[:-1] for name in loader.opened[0])]
    assert len(runs) == len(COUNTS)
    assert all(
        sum(any(i.startswith(f"s{v}") and len(i) == len(f"s{v}") + 1 for i in ids) for ids in policy.read)
        == 1
        for v in range(len(COUNTS))
    )
    ordered = tmp_path / "q.jsonl"
    predict(
        FakePolicy(seeded), queries_of(COUNTS), FakeLoader(), ordered, provenance=PROVENANCE, settings=SAMPLED
    )
    assert {row["id"]: row for row in rows_of(out)} == {row["id"]: row for row in rows_of(ordered)}


# --- fingerprints


def write_model(folder: Path, weights: bytes = b"w" * 100) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_fingerprint_is_of_content(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    before = model_fingerprint(folder)
    assert model_fingerprint(write_model(tmp_path / "copy")) == before
    (folder / "measured.json").write_text('{"mIoU": 50}')  # says nothing about the model
    os.utime(folder / "model.safetensors", (1, 1))
    assert model_fingerprint(folder) == before
    (folder / "model.safetensors").write_bytes(b"w" * 50 + b"v" + b"w" * 49)  # trained again
    changed = model_fingerprint(folder)
    (folder / "config.json").write_text('{"a": 1}')
    assert len({before, changed, model_fingerprint(folder)}) == 3
    assert model_fingerprint("org/name") == "name:org/name"


TENSORS = {"lm_head": [0, 400], "layers.0.norm": [400, 406], "layers.0.up": [406, 1400]}


def large_weights(changed: int | None = None) -> bytes:
    """A file of tensors, with another byte at one place of its data."""
    header = {
        name: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for name, (b, e) in TENSORS.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    data = bytearray(range(200)) * 7
    if changed is not None:
        data[changed] ^= 1
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("tensors", [True, False])
def test_large_weights_are_known_by_parts_of_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: bool
) -> None:
    """Copies on other machines, and at other times, are the same model. Another training changes the begin,
    the middle and the end of all tensors. A file that names none is read at many places."""
    monkeypatch.setattr(fingerprint, "_FULL_READ_BYTES", 10)
    monkeypatch.setattr(fingerprint, "_SAMPLE_BYTES", 4)
    monkeypatch.setattr(fingerprint, "_SAMPLES", 20)

    def found(name: str, weights: bytes, time_s: float) -> str:
        folder = write_model(tmp_path / name, weights if tensors else b"\xff" * 8 + weights)
        os.utime(folder / "model.safetensors", (time_s, time_s))
        return model_fingerprint(folder)

    before = found("m", large_weights(), 5)
    assert found("copy", large_weights(), 6) == before
    places = [0, 198, 399, 400, 403, 405, 406, 902, 1399] if tensors else [1399]
    changed = [found("m", large_weights(place), 5) for place in places]
    assert len({before, *changed}) == 1 + len(places)
    assert found("m", large_weights() + b"!", 5) != before
    if tensors:
        other = large_weights().replace(b"lm_head", b"lm_tail")
        assert found("m", other, 5) != before
    assert found("m", large_weights(), 9) == before


@pytest.mark.parametrize("content", [b"", b"short", (3).to_bytes(8, "little") + b"[1]", b"\0" * 64])
def test_a_damaged_large_file_has_a_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    """Whoever loads it says what is wrong with it."""
    monkeypatch.setattr(fingerprint, "_FULL_READ_BYTES", -1)
    folder = write_model(tmp_path / "m", content)
    assert model_fingerprint(folder) == model_fingerprint(folder)
