"""``lm_head`` at response positions: logits and log-probabilities in float32, or float64 for such weights.

Shapes: ``N`` response tokens of all rows together, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear

from video_opd.models.chunk_sizes import ROWS_A_CHUNK, TOKENS_A_CHUNK
from video_opd.models.vocabulary import Vocabulary


class ResponseHead:
    """``lm_head`` restricted to the tokens that a policy can write."""

    def __init__(self, lm_head: nn.Module, vocabulary: Vocabulary) -> None:
        self.lm_head = lm_head
        self.vocabulary = vocabulary
        self._bias_V: torch.Tensor | None = None

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """[N, V] in float32, or float64 for such weights. Tokens that cannot be written are close to −1e30.

        The product itself is computed in float32. In bfloat16, neighbouring numbers near 20 are 0.125 apart,
        so rounded logits would have an error as large as the signal that is computed from them.
        """
        head, size = self.lm_head, self.vocabulary.size
        with torch.autocast(hidden_ND.device.type, enabled=False):
            if type(head) is not nn.Linear:  # quantised or adapted: it has its own arithmetic
                logits_NV = head(hidden_ND)[:, :size].float()
            elif head.weight.dtype in (torch.float32, torch.float64):
                logits_NV = head(hidden_ND.to(head.weight.dtype))[:, :size]
            else:
                rows = head.weight[:size].split(ROWS_A_CHUNK)
                logits_NV = torch.cat([linear(hidden_ND.float(), w.float()) for w in rows], dim=1)
        if self._bias_V is None or self._bias_V.device != logits_NV.device:
            self._bias_V = self.vocabulary.logit_bias(logits_NV.device)
        return logits_NV + self._bias_V

    def likeliest(
        self, hidden_ND: torch.Tensor, k: int, *, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ``k`` likeliest tokens, [N, k] ids and log-probabilities, the likeliest first."""
        found = []
        for hidden in hidden_ND.split(TOKENS_A_CHUNK):
            found.append((self.logits(hidden) / temperature).log_softmax(-1).topk(k, dim=-1))
        return torch.cat([top.indices for top in found]), torch.cat([top.values for top in found])

    def score(
        self, hidden_ND: torch.Tensor, ids_N: torch.Tensor, *, temperature: float, full: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities of ``ids_N``, [N], and with ``full`` those of the whole vocabulary, [N, V]."""
        picked, whole = [], []
        for hidden, ids in zip(hidden_ND.split(TOKENS_A_CHUNK), ids_N.split(TOKENS_A_CHUNK), strict=True):
            logits = self.logits(hidden) / temperature
            normaliser = logits.logsumexp(-1, keepdim=True)
            picked.append((logits.gather(-1, ids[:, None]) - normaliser).squeeze(-1))
            if full:
                whole.append(logits - normaliser)
        return torch.cat(picked), torch.cat(whole) if full else None
