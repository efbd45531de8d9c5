"""Lets torchvision's CUDA build be imported beside a CPU build of torch.

Its library of operators cannot be loaded there, and what it registers for two of them needs their schemas.
``environment.sh`` puts this file into the environment, with a ``.pth`` that imports it in every process.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

KEPT: list[Any] = []  # the definitions live as long as what made them


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            KEPT.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
