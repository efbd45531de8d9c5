"""``python -m video_opd`` is ``video-opd``."""

import sys

from video_opd.cli import main

if __name__ == "__main__":
    sys.exit(main())
