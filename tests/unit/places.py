"""Where the project's own files lie, and real videos where somebody has them (VIDEO_OPD_REAL)."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
TOOLS = ROOT / "tools"
REAL = Path(os.environ.get("VIDEO_OPD_REAL") or ROOT / "../shared/real")
