"""A run whose teacher is in another process ends with the weights of one that holds it, whatever happens."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import serving_cases as cases
from serving_cases import BASE, TEACHER, Weights, assert_same, recipe, weights

from video_opd.config import dump_recipe, load_recipe
from video_opd.errors import Unavailable, UserError
from video_opd.models.fingerprint import model_fingerprint
from video_opd.models.loading import load_teacher
from video_opd.models.policy import HFPolicy
from video_opd.models.vocabulary import Vocabulary
from video_opd.serving import limits, servers
from video_opd.serving.app import Service, ServiceSettings
from video_opd.serving.limits import Limits
from video_opd.serving.queue import ScoringQueue
from video_opd.serving.scorer import ModelFacts, Scorer
from video_opd.training import components, rounds
from video_opd.training.loop import train
from video_opd.training.rounds import run_rounds
from video_opd.training.run_folder import RunFolder
from video_opd.world.make import make_world


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    return make_world(folder, videos={"train": 2}, workers=1)["train"]


@pytest.fixture(scope="module")
def service() -> Service:
    scorer = Scorer(
        *load_teacher(TEACHER, "float32", "cpu"), facts=ModelFacts(fingerprint=model_fingerprint(TEACHER))
    )
    return Service(scorer, ScoringQueue(scorer), TEACHER, ServiceSettings())


@pytest.fixture(scope="module")
def local(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return weights(train(recipe(data, tmp_path_factory.mktemp("local") / "run")).model)


def test_what_is_sampled_while_a_server_scores_does_not_matter(
    data: Path, service: Service, local: Weights, tmp_path: Path
) -> None:
    """Each micro-batch by itself, the next one sampled meanwhile, or all of a step sampled before; and with
    hidden states in place of distributions."""
    service.scorer.roots = []
    ways: tuple[dict[str, Any], ...] = (
        {"teacher.overlap": False},
        {"sampling.micro_batch_size": 3},
        {"teacher.receive": "hidden"},
    )
    for number, changes in enumerate(ways):
        with cases.serving(service.app()) as url:
            asked = recipe(data, tmp_path / f"run-{number}", **{"teacher.urls": (url,), **changes})
            assert_same(train(asked).model, local)


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ({}, ["sampled", "sampled", "scored", "scored"]),
        ({"teacher.overlap": False}, ["sampled", "scored", "sampled", "scored"]),
        ({"sampling.micro_batch_size": 2}, ["sampled", "sampled", "scored", "scored"]),
    ],
)
def test_the_next_micro_batch_is_sampled_while_a_server_scores(
    data: Path,
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    order: list[str],
) -> None:
    """The server answers only when the student has gone on as far as it should."""
    service.scorer.roots = []
    events: list[str] = []
    answer, sample = service.scorer.answer, HFPolicy.sample
    expected = order.index("scored")

    def noted(self: HFPolicy, *given: Any, **settings: Any) -> Any:
        found = sample(self, *given, **settings)
        events.append("sampled")
        return found

    def late(*given: Any) -> Any:
        deadline = time.monotonic() + 20
        while len(events) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        events.append("scored")
        return answer(*given)

    monkeypatch.setattr(HFPolicy, "sample", noted)
    monkeypatch.setattr(service.scorer, "answer", late)
    with cases.serving(service.app()) as url:
        settings = {"teacher.urls": (url,), "optim.max_steps": 1, "run.check": False, **changes}
        train(recipe(data, tmp_path / "run", **settings))
    assert events == order


@pytest.mark.parametrize("send", ["value", "reference"])
def test_a_run_through_a_server_ends_with_the_weights_of_a_local_one(
    data: Path, service: Service, local: Weights, tmp_path: Path, send: str
) -> None:
    service.scorer.roots = [data.parent.resolve()] if send == "reference" else []
    with cases.serving(service.app()) as url:
        asked = recipe(data, tmp_path / "run", **{"teacher.urls": (url,), "teacher.send": send})
        assert_same(train(asked).model, local)


def test_a_teacher_that_stays_away_leaves_a_checkpoint_and_no_step_is_lost(
    data: Path,
    service: Service,
    local: Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(servers, "SHORTEST_PAUSE_S", 0.001)
    answered = 0

    async def dies(scope: Any, receive: Any, send: Any) -> None:
        """Answers the handshake and three requests: it is away in the middle of a later step."""
        nonlocal answered
        answered += scope["path"].endswith("score")
        if answered > 3:
            raise ConnectionError
        await app(scope, receive, send)

    app = service.app()
    folder, port = tmp_path / "run", free_port()
    changes = {"teacher.urls": (f"http://127.0.0.1:{port}",), "teacher.wait_s": 0.3}
    with cases.serving(dies, port), pytest.raises(Unavailable, match="no teacher has answered since"):
        train(recipe(data, folder, **changes))
    (checkpoint,) = RunFolder(folder).checkpoints.iterdir()
    assert checkpoint.name in ("step-1", "step-2")
    with cases.serving(app) as url:  # started again, elsewhere
        result = train(recipe(data, folder, **{"teacher.urls": (url,)}))
    assert result.steps == 3
    assert_same(result.model, local)


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def no_models(*given: Any, **settings: Any) -> Any:
    raise AssertionError("a model is loaded, or rows are scored, before the servers are asked")


def test_a_server_of_another_model_is_refused_before_the_student_is_loaded(
    data: Path, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.scorer.roots = []
    monkeypatch.setattr(components, "load_student", no_models)
    with cases.serving(service.app()) as url:
        wrong: dict[str, dict[str, Any]] = {
            r"holds the model tiny-teacher .* and teacher\.path .*tiny-base is": {"teacher.path": BASE},
            r"teacher\.fingerprint is 0{32}": {"teacher.path": "", "teacher.fingerprint": "0" * 32},
            r"computes in float32 .* teacher\.dtype bfloat16": {"teacher.dtype": "bfloat16"},
            r"reads no files: start it with --root": {"teacher.send": "reference"},
        }
        for message, changes in wrong.items():
            with pytest.raises(UserError, match=message):
                train(recipe(data, tmp_path / "run", **{"teacher.urls": (url,), **changes}))


def test_a_server_without_distributions_is_refused_before_a_pool_is_scored(
    data: Path, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.scorer.roots = []
    monkeypatch.setattr(service.scorer, "facts", replace(service.scorer.facts, engine="vllm"))
    monkeypatch.setattr(components, "load_student", no_models)
    monkeypatch.setattr(rounds, "score_pool", no_models)
    with cases.serving(service.app()) as url:
        asked = {"teacher.urls": (url,), "rounds.count": 2, "tvdf.k": 2}
        for run in (train, run_rounds):
            with pytest.raises(UserError, match="gives no whole distributions"):
                run(recipe(data, tmp_path / run.__name__, **asked))
        sampled = {"loss.estimator": "sampled", "teacher.distributions": False, "run.analytic_kl": False}
        with pytest.raises(AssertionError, match="before the servers are asked"):
            run_rounds(recipe(data, tmp_path / "sampled", **asked, **sampled))


def test_a_response_whose_distributions_no_reply_holds_is_refused_before_the_student_is_loaded(
    data: Path, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = Vocabulary.of(service.scorer.model, service.scorer.processor).size
    at_20_tokens = Limits(reply_bytes=20 * limits.token_bytes(vocabulary, full=True))
    monkeypatch.setattr(service.scorer, "limits", at_20_tokens)
    monkeypatch.setattr(limits, "HIDDEN", 64)
    monkeypatch.setattr(components, "load_student", no_models)
    sampled: dict[str, Any] = {"loss.estimator": "sampled"}
    short: dict[str, Any] = {"sampling.max_new_tokens": 20}
    evaluated: dict[str, Any] = {**short, "evaluate.data": (str(data),), "evaluate.max_new_tokens": 21}
    hidden, analytic, most = (
        "teacher.receive to hidden",
        "run.analytic_kl to false",
        "max_new_tokens to at most 20",
    )
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, rf"sampling.max_new_tokens is 21, .* set {hidden}, or sampling.{most}"),
        (sampled, rf"sampling.max_new_tokens is 21, .* set {hidden}, or {analytic}, or sampling.{most}"),
        (evaluated, rf"evaluate.max_new_tokens is 21, .* set {hidden}, or {analytic}, or evaluate.{most}"),
    ]
    taken = [short, {"teacher.receive": "hidden"}, {**sampled, "run.analytic_kl": False}]
    taken.append({**evaluated, "run.analytic_kl": False})
    with cases.serving(service.app()) as url:
        asked = {"teacher.urls": (url,), "sampling.max_new_tokens": 21}
        for changes, message in refused:
            with pytest.raises(UserError, match=message):
                train(recipe(data, tmp_path / "run", **{**asked, **changes}))
        for changes in taken:
            with pytest.raises(AssertionError, match="a model is loaded"):
                train(recipe(data, tmp_path / "run", **{**asked, **changes}))


def test_a_fingerprint_stands_for_a_folder_that_is_not_here(
    data: Path, service: Service, local: Weights, tmp_path: Path
) -> None:
    named = {"teacher.path": "", "teacher.fingerprint": model_fingerprint(TEACHER)}
    with cases.serving(service.app()) as url:
        found = train(recipe(data, tmp_path / "run", **{"teacher.urls": (url,), **named}))
    assert_same(found.model, local)


def test_a_recipe_for_another_method_may_keep_what_asks_no_server(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe(Path("d"), Path("r"))))
    other = ["--method", "grpo", "--loss.estimator", "sampled", "--sampling.rollouts", "8"]
    assert load_recipe(path, other).method == "grpo"
    served = load_recipe(path, [*other, "--teacher.urls", "[http://a]"])  # for the scores of its rounds
    assert served.teacher.named and not served.asks_servers
    with pytest.raises(UserError, match=r"teacher\.overlap means nothing to method grpo"):
        load_recipe(path, [*other, "--teacher.overlap", "false"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.urls": ("localhost:8400",)}, "an address begins with http:// or https://"),
        ({"teacher.fingerprint": "0" * 32}, "fingerprint belongs to urls"),
        ({"teacher.urls": ("http://a",), "teacher.path": ""}, "or its fingerprint in teacher.fingerprint"),
        ({"teacher.urls": ("http://a",), "teacher.placement": "cpu"}, "the servers of urls hold the teacher"),
        ({"teacher.urls": ("http://a",), "teacher.by_source": {"x": "y"}}, "by_source names folders"),
        ({"teacher.wait_s": 0}, "teacher.wait_s must be above 0"),
    ],
)
def test_settings_that_cannot_be_followed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(Path("d"), Path("r"), **changes)
