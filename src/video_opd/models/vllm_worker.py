"""What runs inside vLLM's workers. vLLM imports it by name (``worker_extension_cls``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

EXTENSION = "video_opd.models.vllm_worker.WriteableTokens"


class WriteableTokens:
    """Restricts a worker's model to the tokens that a policy can write, when it samples and when it scores.

    vLLM adds its methods to the worker, whose ``model_runner`` holds the model.
    """

    model_runner: Any

    def allow_tokens(self, size: int, forbidden_ids: Sequence[int], logit: float) -> None:
        """From now on, ids from ``size`` on and ``forbidden_ids`` have this logit."""
        model = self.model_runner.get_model()
        compute = getattr(model, "unrestricted_logits", model.compute_logits)
        forbidden = torch.tensor(list(forbidden_ids), dtype=torch.long)

        def restricted(*inputs: Any, **settings: Any) -> torch.Tensor | None:
            logits_NV = compute(*inputs, **settings)
            if logits_NV is None:  # another worker has them
                return None
            logits_NV = logits_NV.float()
            logits_NV[:, size:] = logit
            logits_NV[:, forbidden.to(logits_NV.device)] = logit
            return logits_NV

        model.unrestricted_logits, model.compute_logits = compute, restricted
