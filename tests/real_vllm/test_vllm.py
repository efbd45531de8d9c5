"""vLLM itself, on a CPU: it must read our prompts, and give the log-probs of this package's own engine."""

from __future__ import annotations

import bisect
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import serving_cases
import torch
import uvicorn

from video_opd.bench.work import prompts_of
from video_opd.cli import main
from video_opd.config import PromptConfig, TeacherConfig, VideoConfig, VLLMConfig
from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl
from video_opd.models import vllm_policy
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.loading import load_model, load_processor, read_model_configs
from video_opd.models.policy import HFPolicy
from video_opd.models.vllm_policy import VLLMPolicy
from video_opd.models.vocabulary import Vocabulary
from video_opd.serving.app import Service, ServiceSettings
from video_opd.serving.connect import connect_teacher
from video_opd.serving.queue import ScoringQueue
from video_opd.serving.scorer import ModelFacts, Scorer
from video_opd.serving.serve import try_out
from video_opd.training.loop import train
from video_opd.training.vllm_sampler import VLLMSampler
from video_opd.types import EncodedPrompt
from video_opd.world.make import make_world
from video_opd.world.shipped import shipped

pytestmark = pytest.mark.vllm
BASE, TEACHER = str(shipped("tiny-base")), str(shipped("tiny-teacher"))
SETTINGS = VLLMConfig(max_tokens=2048)
ENGINES = {"hf": [], "vllm": ["--engine", "vllm", "--vllm.max_tokens", "2048"]}


def own_policy(path: str = BASE) -> HFPolicy:
    return HFPolicy(*load_model(path, dtype="float32", device="cpu"))


def make_policy(path: str = BASE, **options: Any) -> VLLMPolicy:
    processor = load_processor(path)
    vocabulary = Vocabulary.of(read_model_configs(path), processor)
    options = {"settings": SETTINGS, "reference": lambda _: own_policy(path), **options}
    return VLLMPolicy(path, processor, vocabulary, dtype="float32", **options)


@pytest.fixture(scope="module")
def prompts() -> list[EncodedPrompt]:
    """Both forms around a video, two queries on each of two videos; and one with an odd number of frames, at
    times that are no multiples of anything."""
    processor = load_processor(BASE)
    found = []
    for form in ("release", "nested"):
        settings = PromptConfig(video_form=form)
        found += prompts_of(processor, 300, queries=2, videos=2, keep_clips=True, prompt=settings)
    return [*found, uneven(processor)]


def uneven(processor: Any) -> EncodedPrompt:
    from video_opd.data.encode import PromptEncoder

    encoder = PromptEncoder(processor, keep_clips=True)
    return encoder.encode(serving_cases.clip(3, frames=7), "it blinks", "uneven")


@pytest.fixture(scope="module")
def policy() -> Iterator[VLLMPolicy]:
    made = make_policy()
    yield made
    made.close()


@pytest.fixture(scope="module")
def own() -> HFPolicy:
    return own_policy()


def test_greedy_responses_and_their_log_probs_are_our_own(
    policy: VLLMPolicy, own: HFPolicy, prompts: list[EncodedPrompt]
) -> None:
    found = policy.sample(prompts, max_new_tokens=16, temperature=0.0)
    expected = own.sample(prompts, max_new_tokens=16, temperature=0.0)
    for (mine,), (theirs,) in zip(found, expected, strict=True):
        assert (mine.token_ids, mine.text, mine.truncated) == (
            theirs.token_ids,
            theirs.text,
            theirs.truncated,
        )
        assert mine.recorded == pytest.approx(theirs.recorded, abs=1e-4)
    cut = policy.sample(prompts[:1], max_new_tokens=2, temperature=0.0)[0][0]
    assert cut.truncated and cut.token_ids == expected[0][0].token_ids[:2]


def test_scores_are_our_own(policy: VLLMPolicy, own: HFPolicy, prompts: list[EncodedPrompt]) -> None:
    seeds = [[10 * i + j for j in range(3)] for i in range(len(prompts))]
    groups = own.sample(prompts, n=3, max_new_tokens=12, seeds=seeds)
    responses = [[rollout.token_ids for rollout in group] for group in groups]
    found, expected = policy.logprobs(prompts, responses), own.logprobs(prompts, responses)
    assert torch.equal(found.mask_BT, expected.mask_BT)
    torch.testing.assert_close(found.logprobs_BT, expected.logprobs_BT, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 20}])
def test_what_is_sampled_has_the_log_probs_of_its_distribution(
    policy: VLLMPolicy, own: HFPolicy, prompts: list[EncodedPrompt], settings: dict[str, Any]
) -> None:
    seeds = [[10 * i + j for j in range(2)] for i in range(len(prompts))]
    groups = policy.sample(prompts, n=2, max_new_tokens=12, seeds=seeds, **settings)
    assert policy.sample(prompts, n=2, max_new_tokens=12, seeds=seeds, **settings) == groups
    responses = [[rollout.token_ids for rollout in group] for group in groups]
    scores = own.logprobs(prompts, responses, temperature=settings.get("temperature", 1.0))
    for row, rollout in zip(scores.logprobs_BT.tolist(), (r for group in groups for r in group), strict=True):
        for score, recorded in zip(row, rollout.recorded, strict=False):
            if settings:  # the filters leave fewer tokens, so each is likelier
                assert recorded >= score - 1e-4
            else:
                assert recorded == pytest.approx(score, abs=1e-4)


def test_the_same_distribution_is_sampled(policy: VLLMPolicy, own: HFPolicy) -> None:
    """400 first tokens of each engine against the exact distribution, by a chi-squared test."""
    prompt = prompts_of(load_processor(BASE), 100, keep_clips=True)[0]

    def shares(engine: Any, offset: int) -> dict[int, float]:
        seeds = [[offset + i for i in range(400)]]
        (group,) = engine.sample([prompt], n=400, max_new_tokens=1, seeds=seeds)
        found: dict[int, float] = {}
        for rollout in group:
            found[rollout.token_ids[0]] = found.get(rollout.token_ids[0], 0) + 1 / 400
        return found

    full = own.logprobs([prompt], [[(policy.vocabulary.pad_id,)]], full=True).full_BTV
    assert full is not None
    exact = full[0, 0].exp()
    for engine in (policy, own):
        found = shares(engine, 1000)
        # Pearson's chi squared over the tokens that are expected five times or more, the others together.
        common = {i: 400 * float(p) for i, p in enumerate(exact) if 400 * p >= 5}
        counts = {i: 400 * found.get(i, 0.0) for i in common}
        terms = [(counts[i] - wanted) ** 2 / wanted for i, wanted in common.items()]
        rest, others = 400 - sum(common.values()), 400 - sum(counts.values())
        if rest >= 5:
            terms.append((others - rest) ** 2 / rest)
        freedom = len(terms) - 1
        assert freedom >= 3
        # Wilson and Hilferty: the cube root is nearly normal; four standard deviations.
        cube = (sum(terms) / freedom) ** (1 / 3)
        spread = math.sqrt(2 / (9 * freedom))
        assert (cube - (1 - 2 / (9 * freedom))) / spread < 4


def test_a_shifted_prompt_is_refused(prompts: list[EncodedPrompt], monkeypatch: pytest.MonkeyPatch) -> None:
    shifted = make_policy(settings=VLLMConfig(max_tokens=2048, check=False))
    fold = vllm_policy.folded
    monkeypatch.setattr(vllm_policy, "folded", lambda *given: fold(*given)[1:])
    with pytest.raises(UserError, match=r"vLLM read another prompt: token 0 is .*placeholders of the video"):
        shifted.sample(prompts[:1], max_new_tokens=4, temperature=0.0)
    shifted.close()


def test_other_weights_are_refused_on_the_first_prompt(prompts: list[EncodedPrompt]) -> None:
    other = make_policy(reference=lambda _: own_policy(TEACHER))
    for _ in range(2):  # what was refused is not used the next time
        with pytest.raises(UserError, match=r"vLLM gives response token \d+ .* and this package's engine"):
            other.sample(prompts[:1], max_new_tokens=4, temperature=0.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), videos={"train": 2}, workers=1)["train"]


def test_predict_gives_the_same_rows(data: Path, tmp_path: Path) -> None:
    rows = []
    for engine in ("hf", "vllm"):
        out = tmp_path / f"{engine}.jsonl"
        words = ["--out", str(out), "--max-new-tokens", "16", *ENGINES[engine]]
        assert main(["predict", BASE, str(data), *words]) == 0
        rows.append([row for _, row in read_jsonl(out)])
    assert rows[0] == rows[1] and len(rows[0]) > 4
    notes = json.loads((tmp_path / "vllm.jsonl.meta.json").read_text())
    assert '"engine": "vllm"' in json.dumps(notes)


def test_score_asks_both_models(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    words = ["score", "--student", BASE, "--teacher", TEACHER, "--data", str(data), "--k", "1"]
    shared = ["--reverse-kl", "--temperature", "0"]
    rows = []
    for engine in ("hf", "vllm"):
        assert main([*words, *shared, "--out", str(out), "--overwrite", *ENGINES[engine]]) == 0
        rows.append([row for _, row in read_jsonl(out)])
    for mine, theirs in zip(*rows, strict=True):
        assert mine["student_responses"] == theirs["student_responses"]
        assert mine["teacher_responses"] == theirs["teacher_responses"]
        assert mine["reverse_kl"] == pytest.approx(theirs["reverse_kl"], abs=1e-4)


def test_sampled_scores_are_of_the_same_distribution(tmp_path: Path) -> None:
    """``score`` with k = 4 by both engines, on as many rows: a paired test of the rows' mean IoU, and the
    two-sample test of Kolmogorov and Smirnov on where the answers begin."""
    data = make_world(tmp_path / "world", videos={"train": 8}, seed=5, workers=1)["train"]
    rows = {}
    for engine in ("hf", "vllm"):
        out = tmp_path / f"{engine}.jsonl"
        words = ["score", "--student", BASE, "--teacher", TEACHER, "--data", str(data), "--out", str(out)]
        assert main([*words, "--k", "4", *ENGINES[engine]]) == 0
        rows[engine] = [row for _, row in read_jsonl(out)]
    assert [row["id"] for row in rows["hf"]] == [row["id"] for row in rows["vllm"]] and len(rows["hf"]) > 25
    for role in ("student", "teacher"):
        pairs = zip(rows["hf"], rows["vllm"], strict=True)
        off = torch.tensor([a[f"{role}_iou"] - b[f"{role}_iou"] for a, b in pairs], dtype=torch.float64)
        assert off.abs().max() > 0  # other draws
        assert abs(off.mean()) < 4 * off.std() / math.sqrt(len(off))
        starts = [
            sorted(span[0] for row in rows[engine] for span in row[f"{role}_spans"] if span)
            for engine in ("hf", "vllm")
        ]
        places = sorted({*starts[0], *starts[1]})
        shares = [[bisect.bisect_right(found, x) / len(found) for x in places] for found in starts]
        largest = max(abs(a - b) for a, b in zip(*shares, strict=True))
        n, m = map(len, starts)
        assert largest < 1.95 * math.sqrt((n + m) / (n * m))  # one in a thousand is above


def test_the_sampler_of_a_run_has_the_students_weights_of_the_moment(
    prompts: list[EncodedPrompt], tmp_path: Path
) -> None:
    student = own_policy()
    sampler = VLLMSampler(BASE, student, "float32", SETTINGS, tmp_path / "run")
    seeds = [[i] for i in range(len(prompts))]

    def off() -> float:
        """How far the recorded log-probs are from the student's."""
        groups = sampler.sample(prompts, max_new_tokens=8, seeds=seeds)
        scores = student.logprobs(prompts, [[r.token_ids for r in group] for group in groups]).logprobs_BT
        return max(
            abs(a - b)
            for row, (rollout,) in zip(scores.tolist(), groups, strict=True)
            for a, b in zip(row, rollout.recorded, strict=False)
        )

    assert off() < 1e-4
    for scale in (1.02, 0.97):  # what an optimiser would do
        with torch.no_grad():
            for parameter in student.model.parameters():
                parameter.mul_(scale)
        assert off() > 1e-2
        sampler.weights_changed()
        assert off() < 1e-4
    folder = sampler.folder
    sampler.close()
    assert not folder.exists()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_run_samples_with_vllm_and_stays_on_policy(data: Path, tmp_path: Path, adapted: bool) -> None:
    changes = {"lora.parts": ("language",), "lora.rank": 4} if adapted else {}
    made = serving_cases.recipe(
        data,
        tmp_path / "run",
        **{
            "sampling.engine": "vllm",
            "loss.max_importance_weight": 2.0,
            "loss.estimator": "sampled",
            "optim.lr": 1e-3,
            **changes,
        },
    )
    result = train(made)
    assert result.steps == 3
    rows = [row for _, row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert all(row["update/done"] == 1 and row["weights/changed"] > 0 for row in rows)
    for row in rows:  # weights of 1: sampler and trainer are one model in every step
        assert row["policy/importance_weight_mean"] == pytest.approx(1, abs=1e-3)


@contextmanager
def serving(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def test_a_server_on_vllm_scores_and_samples(prompts: list[EncodedPrompt]) -> None:
    policy = make_policy(TEACHER)
    facts = ModelFacts(fingerprint=model_fingerprint(TEACHER), engine="vllm")
    scorer = Scorer(
        read_model_configs(TEACHER), policy.processor, facts=facts, make_policy=policy.with_vocabulary
    )
    try_out(policy)
    assert policy._running.engine is not None
    app = Service(scorer, ScoringQueue(scorer), Path(TEACHER), ServiceSettings()).app()
    student = read_model_configs(BASE), load_processor(BASE)
    own = HFPolicy(*load_model(TEACHER, dtype="float32", device="cpu"), vocabulary=Vocabulary.of(*student))
    greedy = own.sample(prompts, max_new_tokens=12, temperature=0.0)
    responses = [[rollout.token_ids for rollout in group] for group in greedy]
    with serving(app) as url:
        remote = connect_teacher(TeacherConfig(path=TEACHER, urls=(url,)), VideoConfig(), student)
        scores = remote.logprobs(prompts, responses)
        found = remote.sample(prompts, max_new_tokens=12, temperature=0.0)
        with pytest.raises(UserError, match="vLLM gives no whole distributions"):
            remote.logprobs(prompts[:1], responses[:1], full=True)
    policy.close()
    torch.testing.assert_close(
        scores.logprobs_BT, own.logprobs(prompts, responses).logprobs_BT, atol=1e-4, rtol=0
    )
    assert [[r.token_ids for r in group] for group in found] == responses
