"""The versions that requirements/base.txt pins for the machine with the card, with their hashes.

python benchmarks/device/pins.py av transformers
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

BASE = Path(__file__).resolve().parents[2] / "requirements" / "base.txt"
TARGET = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_system": "Linux",
    "sys_platform": "linux",
}


def pins(names: Sequence[str], text: str) -> list[str]:
    """``name==version --hash=...`` of each; raises ``ValueError`` for a package that is not pinned for the
    target."""
    found = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        requirement, *hashes = re.split(r"\s+(?=--hash)", line.strip())
        pinned = Requirement(requirement)
        if pinned.marker is None or pinned.marker.evaluate(TARGET):
            found[pinned.name] = " ".join([f"{pinned.name}{pinned.specifier}", *hashes])
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{BASE.name} pins no {', '.join(missing)} for Python {TARGET['python_version']}")
    return [found[name] for name in names]


if __name__ == "__main__":
    print("\n".join(pins(sys.argv[1:], BASE.read_text(encoding="utf-8"))))
