"""A teacher behind HTTP scores as one in this process does, and refuses what it cannot see alike."""

from __future__ import annotations

import random
import socket
import threading
import urllib.error
import urllib.request
import zlib
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving_cases as cases
import torch
import urllib3
from places import ROOT

from video_opd.config import VideoConfig
from video_opd.data.video import load_clip
from video_opd.errors import Unavailable, UserError
from video_opd.serving import client
from video_opd.serving.app import ServiceSettings
from video_opd.serving.client import RemoteTeacher
from video_opd.serving.connect import lm_head_of
from video_opd.serving.limits import Limits, token_bytes
from video_opd.serving.messages import (
    HEALTH,
    METRICS,
    MODEL,
    SCORE,
    ScoreRequest,
    pack_request,
    unpack_score_reply,
)
from video_opd.serving.servers import Servers
from video_opd.types import Clip, EncodedPrompt
from video_opd.world.make import make_world


def assert_same(found, expected) -> None:
    assert torch.equal(found.mask_BT, expected.mask_BT)
    torch.testing.assert_close(found.logprobs_BT, expected.logprobs_BT, atol=1e-5, rtol=0)
    if expected.full_BTV is None:
        assert found.full_BTV is None
    else:
        known = expected.full_BTV > -1e20
        assert torch.equal(found.full_BTV > -1e20, known)
        torch.testing.assert_close(found.full_BTV[known], expected.full_BTV[known], atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("full", [False, True])
def test_servers_score_as_a_local_teacher_does(count: int, full: bool) -> None:
    asked = cases.prompts()
    expected = cases.local_teacher().logprobs(asked, cases.RESPONSES, full=full)
    app = cases.service().app()
    with cases.serving(app) as a, cases.serving(app) as b, cases.serving(app) as c:
        teacher = cases.remote_teacher([a, b, c][:count])
        assert_same(teacher.logprobs(asked, cases.RESPONSES, full=full), expected)
        hot = teacher.logprobs(asked, cases.RESPONSES, temperature=2.0)
    assert not torch.allclose(hot.logprobs_BT, expected.logprobs_BT)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"temperature": 1.3, "top_p": 0.8, "top_k": 9}]
)
def test_servers_sample_as_a_local_teacher_does(count: int, settings: dict[str, Any]) -> None:
    asked = cases.prompts()
    policy = cases.local_teacher().policy
    seeds = [[10 * i + j for j in range(3)] for i in range(4)]
    drawn: dict[str, Any] = {"n": 3, "max_new_tokens": 5, "seeds": seeds, **settings}
    expected = policy.sample(asked, **drawn)
    app = cases.service().app()
    with cases.serving(app) as a, cases.serving(app) as b, cases.serving(app) as c:
        teacher = cases.remote_teacher([a, b, c][:count])
        found = teacher.sample(teacher.prefill(asked), **drawn)
        some = teacher.sample(teacher.prefill(asked).select([2]), **{**drawn, "seeds": seeds[2:3]})
        with pytest.raises(ValueError, match="sampling needs seeds: 4 lists of 2"):
            teacher.sample(asked, n=2, max_new_tokens=3, seeds=seeds)
    for mine, theirs in zip([*found, *some], [*expected, expected[2]], strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert replace(one, logprobs=None) == replace(other, logprobs=None)
            assert one.recorded == pytest.approx(other.recorded, abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"n": 0, "seeds": [[]] * 4}, "n is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 10**6}, "a response of 1000000 tokens, above 32768"),
        ({"n": 300, "seeds": [[0] * 300] * 4}, "1200 rollouts, above 1024"),
        ({"seeds": [[-1, 2]] * 4}, "a seed is below 0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(wrong: dict[str, Any], message: str) -> None:
    drawn: dict[str, Any] = {"n": 2, "max_new_tokens": 3, "seeds": [[1, 2]] * 4, **wrong}
    with cases.serving(cases.service().app()) as url, pytest.raises(UserError, match=message):
        cases.remote_teacher([url]).sample(cases.prompts(), **drawn)


@pytest.mark.parametrize("half", [False, True])
def test_hidden_states_give_the_distributions_that_the_server_would(half: bool) -> None:
    """The run applies the teacher's head; in bfloat16 both come as they are held."""
    asked = cases.prompts()
    service = cases.service()
    if half:
        service.scorer.model.to(torch.bfloat16)
    with cases.serving(service.app()) as url:
        whole = cases.remote_teacher([url]).logprobs(asked, cases.RESPONSES, full=True)
        head = lm_head_of(Servers([url]), torch.device("cpu"))
        assert head.weight.dtype == (torch.bfloat16 if half else torch.float32)
        small = cases.remote_teacher([url], head=head)
        found = small.logprobs(asked, cases.RESPONSES, full=True)
        picked = small.logprobs(asked, cases.RESPONSES)
    assert_same(found, whole)
    assert picked.full_BTV is None and torch.allclose(picked.logprobs_BT, whole.logprobs_BT, atol=1e-5)


def test_the_likeliest_tokens_are_given_on_request() -> None:
    prompt = cases.prompts()[0]
    whole = cases.local_teacher().logprobs([prompt], [[(5, 9, 3), (7, 2)]], full=True)
    assert whole.full_BTV is not None
    expected = whole.full_BTV.topk(4, dim=-1)
    asked = sent_request(prompt, [(5, 9, 3), (7, 2)])
    with cases.serving(cases.service().app()) as url:
        request = replace(asked, top_k=4, hidden=True, full=True)
        reply = Servers([url]).ask(
            "POST", SCORE, pack_request(request), lambda body: unpack_score_reply(body, request)
        )
        too_many = replace(asked, top_k=10**6)
        with pytest.raises(UserError, match="top_k is 1000000"):
            Servers([url]).ask("POST", SCORE, pack_request(too_many), lambda body: body)
    there = whole.mask_BT.numpy()
    assert np.array_equal(reply.top_ids[there], expected.indices.numpy()[there])
    for name, wanted in (("top_logprobs", expected.values), ("logprobs", whole.logprobs_BT)):
        np.testing.assert_allclose(getattr(reply, name)[there], wanted.numpy()[there], atol=1e-5)
    known = whole.full_BTV > -1e20
    found = torch.from_numpy(reply.full)
    torch.testing.assert_close(found[known], whole.full_BTV[known], atol=1e-5, rtol=0)
    assert reply.hidden.shape[:2] == (2, 3) and not reply.top_logprobs[~there].any()


def sent_request(prompt: EncodedPrompt, group: list[tuple[int, ...]]) -> ScoreRequest:
    """What a client sends."""
    sent: list[ScoreRequest] = []
    with pytest.MonkeyPatch.context() as patch:
        pack = client.pack_request

        def note(request: ScoreRequest) -> bytes:
            sent.append(request)
            return pack(request)

        patch.setattr(client, "pack_request", note)
        with cases.serving(cases.service().app()) as url:
            cases.remote_teacher([url]).logprobs([prompt], [group])
    return sent[0]


def test_pieces_are_cut_by_the_bytes_of_their_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cases.prompts()  # on clips of 6 and 5 frames, 64 x 96 pixels: 110,592 and 92,160 bytes
    expected = cases.local_teacher().logprobs(asked, cases.RESPONSES)
    sizes = {1 << 30: [4], 210_000: [4], 200_000: [2, 1, 1], 1: [1] * 4}
    for most, pieces in sizes.items():
        monkeypatch.setattr(client, "BYTES_A_REQUEST", most)
        with cases.serving(cases.service().app()) as url:
            found, sent = noted(cases.remote_teacher([url]), asked)
        assert_same(found, expected)
        assert sorted(sent) == sorted(pieces)


def noted(teacher: RemoteTeacher, asked: list[EncodedPrompt], **settings: Any) -> tuple[Any, list[int]]:
    """(the scores of ``cases.RESPONSES``, the responses of each request that was sent)."""
    sent: list[int] = []
    pack = client.pack_request

    def note(request: ScoreRequest) -> bytes:
        sent.append(len(request.prompts))
        return pack(request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "pack_request", note)
        return teacher.logprobs(asked, cases.RESPONSES, **settings), sent


def test_a_body_is_no_larger_than_the_server_takes() -> None:
    asked = cases.prompts()  # together more than 200,000 bytes
    limits = Limits(body_bytes=200_000)
    with cases.serving(cases.service(limits=limits).app()) as url:
        served = cases.described(body_bytes=limits.body_bytes)
        found, sent = noted(cases.remote_teacher([url], served=served), asked)
    assert_same(found, cases.local_teacher().logprobs(asked, cases.RESPONSES))
    assert sent == [1] * 4


@pytest.mark.parametrize(
    ("cells", "pieces"), [(24, [4]), (23, [3, 1]), (9, [2, 1, 1]), (4, [1, 2, 1, 1, 1]), (3, None)]
)
def test_a_reply_is_no_larger_than_the_server_gives(cells: int, pieces: list[int] | None) -> None:
    """``cells`` are rows × tokens of the longest. One prompt's responses are divided only if they must be."""
    asked = cases.prompts()
    teacher = cases.local_teacher()
    limits = Limits(reply_bytes=cells * token_bytes(teacher.policy.vocabulary.size, full=True))
    with cases.serving(cases.service(limits=limits).app()) as url:
        remote = cases.remote_teacher([url], served=cases.described(reply_bytes=limits.reply_bytes))
        if pieces is None:  # a response of four tokens
            with pytest.raises(UserError, match=r"status 413.*a reply of .* or for hidden states"):
                remote.logprobs(asked, cases.RESPONSES, full=True)
            return
        found, sent = noted(remote, asked, full=True)
        assert noted(remote, asked)[1] == [4]  # log-probs alone
    assert_same(found, teacher.logprobs(asked, cases.RESPONSES, full=True))
    assert sorted(sent) == sorted(pieces)


def test_a_body_is_compressed_if_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = cases.prompts()[0]
    assert noise.clip is not None
    still = cases.drawn_prompt()
    encodings: list[str | None] = []
    small = client.compressed

    def note(body: bytes) -> tuple[bytes, str | None]:
        sent, encoding = small(body)
        encodings.append(encoding)
        assert encoding is None or len(sent) < len(body) / 2
        return sent, encoding

    monkeypatch.setattr(client, "compressed", note)
    expected = cases.local_teacher().logprobs([noise, still], [[(1, 2)], [(3,)]])
    with cases.serving(cases.service().app()) as url:
        teacher = cases.remote_teacher([url])
        found = [teacher.logprobs([noise], [[(1, 2)]]), teacher.logprobs([still], [[(3,)]])]
    assert encodings == [None, "deflate"]
    assert found[0].logprobs_BT[0].tolist() == pytest.approx(expected.logprobs_BT[0].tolist(), abs=1e-5)
    assert found[1].logprobs_BT[0, 0].item() == pytest.approx(expected.logprobs_BT[1, 0].item(), abs=1e-5)


def test_compressed_bodies_are_bounded_and_checked() -> None:
    service = cases.service(limits=Limits(body_bytes=1 << 20))
    bomb = zlib.compress(bytes(64 << 20))
    cases_of = [
        (bomb, "deflate", 413, "above 1 MiB when it is expanded"),
        (b"garbage", "deflate", 400, "not in deflate"),
        (zlib.compress(b"x" * 1000)[:-8], "deflate", 400, "ends before"),
        (b"x", "br", 400, "a body in 'br'"),
    ]
    with cases.serving(service.app()) as url:
        for body, encoding, status, text in cases_of:
            request = urllib.request.Request(url + SCORE, body, {"Content-Encoding": encoding})
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(request)
            assert error.value.code == status and text in error.value.read().decode()
    assert (service.held_bytes, service.in_flight) == (0, 0)


def test_both_forms_around_a_video_are_scored() -> None:
    asked = cases.prompts("release")
    with cases.serving(cases.service().app()) as url:
        found = cases.remote_teacher([url]).logprobs(asked, cases.RESPONSES)
    assert_same(found, cases.local_teacher().logprobs(asked, cases.RESPONSES))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_world(folder, videos={"short": 1}, workers=1)
    return folder / "videos"


BUDGET = VideoConfig(min_frame_tokens=4, max_frame_tokens=8)


def file_prompt(videos: Path):
    from model_cases import processor

    from video_opd.config import PromptConfig
    from video_opd.data.encode import PromptEncoder

    (path,) = videos.iterdir()
    encoder = PromptEncoder(processor(), PromptConfig(video_form="nested"), keep_clips=True)
    return encoder.encode(load_clip(path, BUDGET), "the red circle appears", "row")


def test_by_reference_the_server_reads_the_file_and_sees_the_same(videos: Path) -> None:
    asked = [file_prompt(videos)]
    expected = cases.local_teacher().logprobs(asked, [[(1, 2, 3)]])
    with cases.serving(cases.service(roots=[videos]).app()) as url:
        teacher = cases.remote_teacher([url], send="reference", video=BUDGET)
        assert_same(teacher.logprobs(asked, [[(1, 2, 3)]]), expected)
        other = cases.remote_teacher([url], send="reference", video=BUDGET.changed(fps=1.0))
        with pytest.raises(UserError, match=r"status 409.*other frames or times"):
            other.logprobs(asked, [[(1, 2, 3)]])


def test_files_outside_of_the_roots_are_not_read(videos: Path, tmp_path: Path) -> None:
    prompt, inside = file_prompt(videos), tmp_path / "inside"
    inside.mkdir()
    (inside / "link.mp4").symlink_to(next(videos.iterdir()))
    (inside / "folder").symlink_to(videos)
    name = next(videos.iterdir()).name
    paths = [
        next(videos.iterdir()), inside / "link.mp4", inside / "folder" / name, Path("/etc/passwd"),
        Path(f"{inside}/../../{videos.name}/{name}"), Path("/proc/self/environ"),
    ]  # fmt: skip
    with cases.serving(cases.service(roots=[inside]).app()) as url:
        teacher = cases.remote_teacher([url], send="reference", video=BUDGET)

        def ask(path: Path) -> None:
            clip = replace(prompt.clip, path=NotResolved(path))
            teacher.logprobs([replace(prompt, clip=clip)], [[(1,)]])

        for path in paths:
            with pytest.raises(UserError, match=r"status 403.*outside of the folders"):
                ask(path)
        with pytest.raises(UserError, match=r"status 404.*no such file"):
            ask(inside / "absent.mp4")
    with cases.serving(cases.service().app()) as url:
        teacher = cases.remote_teacher([url], send="reference", video=BUDGET)
        with pytest.raises(UserError, match=r"status 403.*reads no files"):
            ask(next(videos.iterdir()))


class NotResolved(type(Path())):  # type: ignore[misc]
    """A path that a client sends as it is."""

    def resolve(self, strict: bool = False) -> Path:
        return self


def test_wrong_prompts_are_refused() -> None:
    first = cases.prompts()[0]
    clip = first.clip
    assert clip is not None
    video_token = cases.cases.processor().video_token_id
    places = (first.input_ids[0] == video_token).nonzero().flatten()
    fewer = torch.cat([first.input_ids[:, : places[3]], first.input_ids[:, places[3] + 1 :]], dim=1)
    later = replace(clip, times_s=clip.times_s + 1.0)
    from video_opd.data.video import clip_digest

    later = replace(later, digest=clip_digest(later.frames, later.times_s))

    def with_frames(frames: np.ndarray) -> Clip:
        return replace(clip, frames=frames)

    wrong = {
        "pairs of 6 tokens, and the prompt has": replace(first, input_ids=fewer),
        "the times in the prompt are not those": replace(first, clip=later, clip_digest=later.digest),
        "other frames or times here": replace(first, clip=replace(clip, frames=clip.frames[::-1].copy())),
        "a prompt token is not from 0 to": replace(first, input_ids=first.input_ids + 10**6),
        "sides are multiples of 32": replace(first, clip=replace(clip, frames=clip.frames[:, :50])),
    }
    with cases.serving(cases.service().app()) as url:
        teacher = cases.remote_teacher([url])
        for message, prompt in wrong.items():
            with pytest.raises(UserError, match=message):
                teacher.logprobs([prompt], [[(1, 2)]])
        with pytest.raises(UserError, match="no response holds token"):
            teacher.logprobs([first], [[(1, video_token)]])
        with pytest.raises(UserError, match="no response holds token"):
            teacher.logprobs([first], [[(1, 10**6)]])
        teacher = cases.remote_teacher([url], served=cases.described(model="0" * 32))
        with pytest.raises(UserError, match=r"status 409.*holds the model"):
            teacher.logprobs([first], [[(1, 2)]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "bfloat16 with quantization none on engine hf"),
        ({"quantization": "int8"}, "float32 with quantization int8 on engine hf"),
        ({"engine": "vllm"}, "float32 with quantization none on engine vllm"),
    ],
)
def test_a_server_that_is_started_again_otherwise_refuses(changes: dict[str, Any], message: str) -> None:
    """Its scores would be mixed with those of the run's other servers."""
    asked, service = cases.prompts()[:1], cases.service()
    with cases.serving(service.app()) as url:
        teacher = cases.remote_teacher([url])
        teacher.logprobs(asked, [[(1, 2)]])
        service.scorer.facts = replace(service.scorer.facts, **changes)
        wanted = f"status 409.*computes in {message}, and the request expects float32 with quantization none"
        with pytest.raises(UserError, match=wanted):
            teacher.logprobs(asked, [[(1, 2)]])
        with pytest.raises(UserError, match=wanted):
            teacher.sample(asked, max_new_tokens=2, temperature=0.0)


def test_limits_of_tokens_and_bytes() -> None:
    asked = cases.prompts()[:1]
    limits = Limits(body_bytes=1 << 20, response_tokens=4)
    with cases.serving(cases.service(limits=limits).app()) as url:
        teacher = cases.remote_teacher([url])
        teacher.logprobs(asked, [[(1, 2, 3, 4)]])
        with pytest.raises(UserError, match=r"status 413.*a response of 5 tokens, above 4"):
            teacher.logprobs(asked, [[(1, 2, 3, 4, 5)]])
        for chunked in (False, True):
            body = iter([b"x" * (1 << 19)] * 5) if chunked else b"x" * (2 << 20)
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(urllib.request.Request(url + SCORE, data=body, method="POST"))
            assert error.value.code == 413 and b"above 1" in error.value.read()


def test_a_client_hears_that_its_request_is_too_large() -> None:
    with cases.serving(cases.service(limits=Limits(body_bytes=1000)).app()) as url:
        for _ in range(5):
            with pytest.raises(UserError, match=r"status 413.*above 0"):
                cases.remote_teacher([url]).logprobs(cases.prompts(), cases.RESPONSES)


def test_a_token_is_asked_for() -> None:
    asked = cases.prompts()[:1]
    with cases.serving(cases.service(settings=ServiceSettings(token="secret")).app()) as url:
        cases.remote_teacher([url], token="secret").logprobs(asked, [[(1,)]])
        for token in (None, "Secret", "ß"):
            with pytest.raises(UserError, match=r"status 401.*give this server's token"):
                cases.remote_teacher([url], token=token).logprobs(asked, [[(1,)]])
        for path, status in ((HEALTH, 200), (METRICS, 401), (MODEL, 401), ("/", 404), ("/v1/score", 405)):
            try:
                found = urllib.request.urlopen(url + path).status
            except urllib.error.HTTPError as error:
                found = error.code
            assert found == status, path


def test_metrics_count_what_was_scored() -> None:
    with cases.serving(cases.service().app()) as url:
        cases.remote_teacher([url]).logprobs(cases.prompts(), cases.RESPONSES)
        text = urllib.request.urlopen(url + METRICS).read().decode()
    assert 'video_opd_requests_total{status="200"} 2.0' in text  # it is asked for its limit, and for scores
    assert "video_opd_responses_total 6.0" in text
    assert f"video_opd_response_tokens_total {float(sum(len(r) for g in cases.RESPONSES for r in g))}" in text
    assert "video_opd_requests_in_flight 0.0" in text


def test_scores_that_are_not_finite_are_named() -> None:
    service = cases.service()
    with torch.no_grad():
        service.scorer.model.lm_head.weight[7] = float("nan")
    with cases.serving(service.app()) as url, pytest.raises(UserError, match=r"'row 0'.*is nan"):
        cases.remote_teacher([url]).logprobs(cases.prompts()[:1], [[(1, 2)]])


def test_a_clip_that_prompts_share_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[ScoreRequest] = []
    pack = client.pack_request

    def note(request: ScoreRequest) -> bytes:
        sent.append(request)
        return pack(request)

    monkeypatch.setattr(client, "pack_request", note)
    with cases.serving(cases.service().app()) as url:
        cases.remote_teacher([url]).logprobs(cases.prompts(), cases.RESPONSES)
    assert [len(request.clips) for request in sent] == [2] and [p.clip for p in sent[0].prompts] == [
        0,
        0,
        1,
        0,
    ]
    second = sent[0].clips[1].frames
    assert second is not None
    assert np.array_equal(second, cases.clip(1, frames=5, side=(96, 64)).frames)


def test_the_client_of_the_document_gets_the_scores() -> None:
    text = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    prompt, vocabulary = cases.prompts()[0], cases.local_teacher().policy.vocabulary
    assert prompt.clip is not None
    computation = asdict(cases.described().computation)
    with cases.serving(cases.service(settings=ServiceSettings(token="secret")).app()) as url:
        found = names["score"](
            url, cases.FINGERPRINT, computation, prompt.input_ids[0].tolist(), [5, 9, 3], prompt.clip.frames,
            prompt.clip.times_s, vocabulary.size, vocabulary.forbidden_ids, "secret",
        )  # fmt: skip
    expected = cases.local_teacher().logprobs([prompt], [[(5, 9, 3)]]).logprobs_BT[0]
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)


def test_two_thousand_malformed_requests_are_refused_with_one_line_each() -> None:
    """Over HTTP, one connection for all that leave it usable; then the server still scores."""
    rng = random.Random(0)
    sent: list[bytes] = []
    with cases.serving(cases.service().app()) as url:
        teacher = cases.remote_teacher([url])
        pack = client.pack_request

        def note(request: ScoreRequest) -> bytes:
            sent.append(pack(request))
            return sent[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client, "pack_request", note)
            expected = teacher.logprobs(cases.prompts()[:1], [[(1, 2)]])
        pool, statuses = urllib3.PoolManager(), Counter[int]()
        for number in range(2000):
            body = mutated(sent[0], rng)
            answer = pool.request("POST", url + SCORE, body=body, retries=False)
            statuses[answer.status] += 1
            if (
                answer.status != 200
            ):  # a change of frames, times or ids that is right by itself is not refused
                assert 400 <= answer.status < 500, (number, answer.data)
                assert len(answer.data.decode().splitlines()) == 1
        assert statuses[400] > 1000 and sum(statuses.values()) == 2000
        found = teacher.logprobs(cases.prompts()[:1], [[(1, 2)]])
        assert torch.equal(found.logprobs_BT, expected.logprobs_BT)


def mutated(body: bytes, rng: random.Random) -> bytes:
    """The body with a few changes: of bytes anywhere, of the header's text and numbers, and of its length."""
    changed = bytearray(body)
    header = 8 + int.from_bytes(body[:8], "little")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(header) if rng.random() < 0.8 else rng.randrange(len(changed))
        kind = rng.randrange(3)
        if kind == 0:
            changed[at] = rng.choice(b'0123456789-e"[]{},:' + bytes(range(256)))
        elif kind == 1:
            del changed[at : at + rng.randint(1, 40)]
        else:
            changed[at:at] = rng.randbytes(rng.randint(1, 20))
    return bytes(changed)


def test_requests_that_are_too_large_together_are_told_to_come_back() -> None:
    service = cases.service(limits=Limits(held_bytes=1000))
    refused = pytest.raises(Unavailable, match="too many large requests are in flight")
    with cases.serving(service.app()) as url, refused:
        cases.remote_teacher([url], 0.05).logprobs(cases.prompts()[:1], [[(1, 2)]])
    assert (service.held_bytes, service.in_flight) == (0, 0)


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    service = cases.service(settings=ServiceSettings(read_s=0.1))
    with cases.serving(service.app()) as url:
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        with socket.create_connection(address) as client_socket:
            head = f"POST {SCORE} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
            client_socket.sendall(head.encode() + b"x" * 10)
            client_socket.settimeout(20)
            answer = b""
            while b"did not come" not in answer:  # its head may come first
                part = client_socket.recv(4096)
                assert part, answer
                answer += part
        assert answer.startswith(b"HTTP/1.1 408") and b"did not come within 0.1 s" in answer
        with socket.create_connection(address) as client_socket:  # one that leaves in the middle
            client_socket.sendall(head.encode() + b"x" * 10)
        assert cases.remote_teacher([url]).logprobs(cases.prompts()[:1], [[(1, 2)]]).mask_BT.all()
    assert (service.held_bytes, service.in_flight) == (0, 0)


def test_scoring_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    service = cases.service(settings=ServiceSettings(score_s=1.0))
    release = threading.Event()
    answer = service.scorer.answer

    def slow(*given: Any) -> Any:
        release.wait(20)
        return answer(*given)

    monkeypatch.setattr(service.scorer, "answer", slow)
    with cases.serving(service.app()) as url:
        with pytest.raises(Unavailable, match=r"status 504: the model was still at work on this after 1 s"):
            cases.remote_teacher([url], 0.05).logprobs(cases.prompts()[:1], [[(1, 2)]])
        release.set()
        monkeypatch.undo()
        assert cases.remote_teacher([url]).logprobs(cases.prompts()[:1], [[(1, 2)]]).mask_BT.all()
