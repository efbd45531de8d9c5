"""torchao for the tests that need it. It is installed beside the other packages (the Makefile says why)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

PLACE = Path(sys.prefix) / "torchao"


@pytest.fixture(scope="session")
def torchao() -> None:
    """Makes torchao importable for the rest of the process. transformers has been imported without it."""
    import transformers.quantizers.auto  # noqa: F401

    if importlib.util.find_spec("torchao") is None:
        if not PLACE.is_dir():
            pytest.skip("torchao is not installed")
        sys.path.append(str(PLACE))
