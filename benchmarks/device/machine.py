"""The card, the versions, and whether everything can be imported: before anything is measured."""

from __future__ import annotations

import importlib
import os
import platform
import sys

from section import Report, add_torchao, run

PACKAGES = (
    *("torch", "torchvision", "transformers", "accelerate", "peft", "tokenizers", "numpy", "av", "pydantic"),
    *("jinja2", "rich", "yaml", "psutil", "safetensors", "tensorboard", "video_opd"),
)
OPTIONAL = ("flash_attn", "torchao")


def describe(report: Report, tiny: bool) -> None:
    add_torchao()
    for name in (*PACKAGES, *OPTIONAL):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            report.add(name, f"not there ({error})", None if name in OPTIONAL else False)
        else:
            report.add(name, str(getattr(module, "__version__", "there")), True)
    import torch

    gpu = torch.cuda.is_available()
    card = "no GPU"
    if gpu:
        properties = torch.cuda.get_device_properties(0)
        card = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        torch.ones(8, 8, device="cuda").sum().item()  # a driver that does not fit fails here
    report.note(
        gpu=gpu,
        card=card,
        cpus=os.cpu_count(),
        python=platform.python_version(),
        platform=platform.platform(),
        summary=f"{card}; {os.cpu_count()} CPUs; Python {platform.python_version()}, "
        f"torch {torch.__version__}" + (f"; missing: {', '.join(report.failed)}" if report.failed else ""),
    )


if __name__ == "__main__":
    sys.exit(run(describe, __doc__))
