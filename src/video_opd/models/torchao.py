"""Finds torchao, the optional library behind weights and moments in 8 bits, or says why it cannot be used."""

from __future__ import annotations

import importlib.util
import logging

from video_opd.errors import UserError

# torch 2.15 logs a warning for two enumerations that torchao 0.18 registers when it is imported, which
# transformers and peft do by themselves wherever it is installed.
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: "is an Enum subclass" not in record.getMessage()
)


def check_torchao(setting: str) -> None:
    """Imports torchao. Raises :class:`UserError` that names ``setting`` if it is missing or broken."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"{setting} needs torchao, which is not installed: pip install torchao, or leave it out"
        )
    try:
        import torchao  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError) as error:
        raise UserError(
            f"{setting} needs torchao, which cannot be imported ({str(error).splitlines()[0]}); install the "
            "torchao that was made for this torch, or leave the setting out"
        ) from error
