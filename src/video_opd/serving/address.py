"""Where a server listens, and who can reach it there. No torch."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from video_opd.errors import need


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server listens. ``port`` 0 is one that is free."""

    host: str = "127.0.0.1"
    port: int = 8400
    certificate: Path | None = None  # of TLS, with its chain
    key: Path | None = None

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def check_address(address: Address, token: str | None) -> None:
    """Raises :class:`UserError` for half of TLS, and for an address that others reach without a token."""
    need(
        (address.certificate is None) == (address.key is None),
        "TLS needs both --tls-certificate and --tls-key",
    )
    for path in (address.certificate, address.key):
        need(path is None or path.is_file(), f"{path}: no such file")
    need(0 <= address.port < 1 << 16, f"--port is {address.port}; it must be from 0 to 65535")
    need(
        bool(token) or address.is_loopback,
        f"{address.host} is not this machine alone: set a token in VIDEO_OPD_TOKEN, or --token-file",
    )
