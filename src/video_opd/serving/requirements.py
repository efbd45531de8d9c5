"""What the server needs besides the package. No torch, and none of these packages."""

from __future__ import annotations

import importlib.util

from video_opd.errors import UserError

PACKAGES = ("starlette", "uvicorn", "prometheus_client")


def check_requirements() -> None:
    """Raises :class:`UserError` if a package of the extra ``server`` is not installed."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"serve-teacher needs {name}, which is not installed: pip install 'video-opd[server]'"
            )
