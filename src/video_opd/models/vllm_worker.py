"""What runs inside vLLM's workers. vLLM imports it by name (``worker_extension_cls``)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

LOOK_EVERY_S = 1.0
EXTENSION = "video_opd.models.vllm_worker.RestrictedWorker"


class RestrictedWorker:
    """Restricts a worker's model to the tokens that a policy can write, when it samples and when it scores.

    vLLM adds its methods to the worker, whose ``model_runner`` holds the model.
    """

    model_runner: Any

    def allow_tokens(self, size: int, forbidden_ids: Sequence[int], logit: float, owner: int) -> None:
        """From now on, ids from ``size`` on and ``forbidden_ids`` have this logit. ``owner`` is the process
        that asks: a worker in another one ends with it, however that ends."""
        if os.getpid() != owner and not getattr(self, "follows", False):
            self.follows = True
            threading.Thread(target=end_with, args=(owner,), daemon=True).start()
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


def end_with(owner: int) -> None:
    """Ends this process when the process ``owner`` is gone. vLLM's engine would stay, with its GPU."""
    while True:
        try:
            os.kill(owner, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(LOOK_EVERY_S)
