"""Runs the command ``WORDS``, whose selection waits for its end, the first ``TIMES`` times::

    python pause_in_selection.py STAGE MARK TIMES WORDS…

``STAGE`` is "before selection", "after selection" or anything else, to wait nowhere. The file ``MARK`` gains
a byte at each wait.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from video_opd.cli import main
from video_opd.training import rounds

if __name__ == "__main__":
    stage, mark, times, *words = sys.argv[1:]
    select_file = rounds.select_file

    def pause(at: str) -> None:
        file = Path(mark)
        waits = file.stat().st_size if file.exists() else 0
        if at == stage and waits < int(times):
            file.write_bytes(b"." * (waits + 1))
            time.sleep(600)

    def select(*arguments: Any, **options: Any) -> Any:
        pause("before selection")
        result = select_file(*arguments, **options)
        pause("after selection")
        return result

    rounds.select_file = select
    sys.exit(main(words))
