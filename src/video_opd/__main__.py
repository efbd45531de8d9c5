"""``python -m video_opd`` is ``video-opd``."""

import sys

from video_opd.cli import command

if __name__ == "__main__":
    sys.exit(command())
