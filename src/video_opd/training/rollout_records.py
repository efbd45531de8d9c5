"""The rollouts that ``rollouts.jsonl`` shows, in plain numbers; ``docs/metrics.md`` describes a row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from video_opd.temporal import best_iou, parse_answer
from video_opd.training.loss_batch import ScoredBatch
from video_opd.training.step_metrics import TokenValues


@dataclass(frozen=True, kw_only=True)
class RolloutRecord:
    """One rollout in plain numbers, so that it travels between processes.

    ``position`` is its prompt's place in the global batch, ``index`` its own place among the rollouts of that
    prompt; ``row`` is what ``rollouts.jsonl`` says of it but for the step and the tokens' texts.
    """

    position: int
    index: int
    token_ids: tuple[int, ...]
    row: dict[str, Any]


def make_records(
    scored: ScoredBatch, values: TokenValues, thinking: bool, shown: Collection[int]
) -> list[RolloutRecord]:
    """The rollouts of the prompts whose positions are ``shown``."""
    records: list[RolloutRecord] = []
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
            records.append(
                RolloutRecord(position=row.position, index=index, token_ids=rollout.token_ids, row=facts)
            )
    return records


def rollout_row(step: int, record: RolloutRecord, tokens: Sequence[str]) -> dict[str, Any]:
    """A row of ``rollouts.jsonl``; ``tokens`` are the response's tokens as text."""
    facts = dict(record.row)
    head = {name: facts.pop(name) for name in ("id", "rollout", "video", "query", "response")}
    return {"step": step, **head, "tokens": list(tokens), **facts}
