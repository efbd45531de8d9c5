"""Does sampling by CUDA graphs write what sampling token by token writes, and how much sooner?

On the shipped tiny model in float32 both have to write the same tokens. On a student of the paper's shape the
log-prob of each token is held to that of the update's forward, which is another computation.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from parity import BASE, apart, without_tf32
from real_shape import GIB, REAL, TINY, free
from section import Report, run
from where_time_goes import Student, timed

from video_opd.bench.engine import LOGPROB_TOLERANCE
from video_opd.bench.work import prompts_of, seeds_of
from video_opd.models import kv_cache
from video_opd.models.loading import load_model
from video_opd.models.policy import HFPolicy
from video_opd.world.shipped import shipped

TOKENS, ROOM = 20, 5  # of the tiny model's responses, and of its cache: responses outgrow it
REPEATS = 3
MORE_BYTES = 2**26  # that a second round of recordings may take


def compare_all(report: Report, tiny: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    without_tf32()
    report.note(summary="nothing compared yet")
    usual, kv_cache.CACHE_ROOM = kv_cache.CACHE_ROOM, ROOM
    for rollouts in (1, 4):
        report.attempt("the tiny model", lambda: compare_tokens(report, device, rollouts))  # noqa: B023
    kv_cache.CACHE_ROOM = usual
    student = Student(TINY if tiny else REAL, device)
    for rollouts in (1, student.plan.rollouts):
        report.attempt("the paper's shape", lambda: compare_seconds(report, student, device, rollouts))  # noqa: B023
    report.attempt("memory", lambda: watch_memory(report, student, device))
    used = student.policy.passes.capture or device.type == "cpu"
    report.add("recordings", "all succeeded" if used else "one failed: see device.log", used)


def compare_tokens(report: Report, device: torch.device, rollouts: int) -> None:
    policy = HFPolicy(*load_model(shipped(BASE), dtype="float32", device=device))
    prompts = prompts_of(policy.processor, 200, queries=2, videos=2)
    found = {}
    for capture in (False, True):
        policy.passes.capture = capture
        groups = policy.sample(
            prompts, n=rollouts, max_new_tokens=TOKENS, temperature=1.5, seeds=seeds_of(prompts, rollouts)
        )
        found[capture] = [rollout for group in groups for rollout in group]
    same = [a.token_ids == b.token_ids for a, b in zip(found[True], found[False], strict=True)]
    longest = max(len(rollout.token_ids) for rollout in found[False])
    report.add(
        f"tiny, {len(same)} responses of at most {longest} tokens, float32",
        f"{sum(same)} are the same",
        all(same) and policy.passes.capture,
    )
    if all(same):
        both = [torch.tensor([p for r in found[capture] for p in r.recorded]) for capture in (True, False)]
        report.compare(f"tiny, log-probs, {rollouts} rollouts", apart(*both), LOGPROB_TOLERANCE["float32"])


def compare_seconds(report: Report, student: Student, device: torch.device, rollouts: int) -> None:
    student.prefill()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    off: dict[bool, float] = {}
    for repeat in range(REPEATS + 1):
        for capture in (False, True):
            took_s = timed(sampling(student, rollouts, capture), device)
            if repeat:  # the first round warms up
                seconds[capture].append(took_s)
            else:
                off[capture] = off_by(student)
    alone, by_graph = (statistics.median(seconds[capture]) for capture in (False, True))
    report.add(
        f"{rollouts} rollouts of {student.plan.response} tokens",
        f"{alone:.3f} s token by token, {by_graph:.3f} s by a graph: {alone / by_graph:.2f} times",
        True,
        seconds=seconds[False],
        seconds_by_graph=seconds[True],
        ratio=alone / by_graph,
    )
    report.note(summary=f"{rollouts} rollouts: {alone / by_graph:.2f} times as fast by a graph")
    for capture, difference in off.items():
        how = "by a graph" if capture else "token by token"
        name = f"{rollouts} rollouts {how}: log-probs against the update's forward"
        report.compare(name, difference, LOGPROB_TOLERANCE["bfloat16"])


def sampling(student: Student, rollouts: int, capture: bool) -> Callable[[], None]:
    def work() -> None:
        student.policy.passes.capture = capture
        student.sample(rollouts)

    return work


def off_by(student: Student) -> float:
    """The largest difference between the log-probs that sampling recorded and those of the same tokens."""
    with torch.no_grad():
        scored = student.policy.logprobs(student.prefix, student.responses)
    recorded = torch.zeros_like(scored.logprobs_BT)
    recorded[scored.mask_BT] = torch.tensor(student.recorded, device=recorded.device)
    return apart(recorded, scored.logprobs_BT)


def watch_memory(report: Report, student: Student, device: torch.device) -> None:
    """Recordings leave their memory to the next one."""
    if device.type != "cuda":
        report.add("memory that recordings keep", "needs a GPU")
        return
    work = sampling(student, 1, True)
    reserved = []
    for _ in range(2):
        for _ in range(REPEATS):
            work()
        reserved.append(torch.cuda.memory_reserved(device))
    more = reserved[1] - reserved[0]
    report.add(
        f"memory that {REPEATS} further recordings keep",
        f"{more / GIB:.3f} GiB",
        more <= MORE_BYTES,
        more_bytes=more,
        reserved_bytes=reserved[1],
    )
    free()


if __name__ == "__main__":
    sys.exit(run(compare_all, __doc__))
