"""The places of the project's own files, and of real videos if there are any (VIDEO_OPD_REAL)."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
TOOLS = ROOT / "tools"
REAL = Path(os.environ.get("VIDEO_OPD_REAL") or ROOT / "../shared/real")
