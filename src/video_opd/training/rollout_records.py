"""The rollouts that ``rollouts.jsonl`` shows, in plain numbers; ``docs/metrics.md`` describes a row."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from video_opd.models.alternatives import Alternatives, likeliest
from video_opd.temporal import best_iou, parse_answer
from video_opd.training.loss_batch import ScoredBatch
from video_opd.training.step_metrics import TokenValues


@dataclass(frozen=True, kw_only=True)
class RolloutRecord:
    """One rollout in plain numbers, so that it travels between processes.

    ``position`` is its prompt's place in the global batch, ``index`` its own place among the rollouts of that
    prompt; ``row`` is what ``rollouts.jsonl`` says of it but for the step and the tokens' texts, and ``top``
    the likeliest tokens of the student and of the teacher, None where there are no whole distributions.
    """

    position: int
    index: int
    token_ids: tuple[int, ...]
    row: dict[str, Any]
    top: dict[str, Alternatives | None]


def make_records(
    scored: ScoredBatch, values: TokenValues, thinking: bool, shown: Collection[int]
) -> list[RolloutRecord]:
    """The rollouts of the prompts whose positions are ``shown``."""
    records: list[RolloutRecord] = []
    teacher = scored.trajectories.teacher
    distributions = {
        "student_top": scored.trajectories.old_full_BTV,
        "teacher_top": None if teacher is None else teacher.full_BTV,
    }
    b = -1  # the rollout's index in the micro-batch
    rewards = scored.signal.reward_B
    for row, group in zip(scored.rows, scored.groups, strict=True):
        for index, rollout in enumerate(group):
            b += 1
            if row.position not in shown:
                continue
            tokens = slice(len(rollout.token_ids))
            answer = parse_answer(rollout.text, thinking=thinking)
            spans = row.sample.spans
            facts = {
                "id": row.sample.id,
                "rollout": index,
                "video": str(row.sample.video),
                "query": row.sample.query,
                "response": rollout.text,
                "token_ids": rollout.token_ids,
                "r": values.reward[b, tokens].tolist(),
                "advantage": values.advantage[b, tokens].tolist(),
                "reward": None if rewards is None else rewards[b].item(),
                "student_logprobs": values.old[b, tokens].tolist(),
                "teacher_logprobs": values.teacher[b, tokens].tolist(),
                "reverse_kl": values.kl[b, tokens].tolist(),
                "span": answer.span,
                "rule": answer.rule,
                "spans": spans,
                "iou": best_iou(answer.span, spans) if spans else None,
                "truncated": rollout.truncated,
            }
            top = {
                name: None if full_BTV is None else likeliest(full_BTV[b, tokens])
                for name, full_BTV in distributions.items()
            }
            records.append(
                RolloutRecord(
                    position=row.position, index=index, token_ids=rollout.token_ids, row=facts, top=top
                )
            )
    return records


def rollout_row(step: int, record: RolloutRecord, decode: Callable[[int], str]) -> dict[str, Any]:
    """A row of ``rollouts.jsonl``; ``decode`` gives the text of a token."""
    facts = dict(record.row)
    head = {name: facts.pop(name) for name in ("id", "rollout", "video", "query", "response")}
    tops = {
        name: None if top is None else [[(decode(token), value) for token, value in here] for here in top]
        for name, top in record.top.items()
    }
    return {"step": step, **head, "tokens": [decode(token) for token in record.token_ids], **facts, **tops}
