"""Starts commands as forks of one process that has imported everything, which takes seconds.

It reads requests from stdin, a line each. ``{"words": […], "folder": …, "pause": [stage, mark, times]}``
starts a command in ``folder``, which writes to ``folder/log``, and is answered with its process id.
``{"wait": pid}`` is answered with the exit code. The command is the leader of a session of its own.

``stage`` is "before selection", "after selection" or anything else: there the selection of rounds waits for
its end, the first ``times`` times, and the file ``mark`` gains a byte each time.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fork_commands import fork, import_everything, redirect


def pause_in_selection(stage: str, mark: str, times: int) -> None:
    from video_opd.training import rounds

    select_file = rounds.select_file

    def pause(at: str) -> None:
        file = Path(mark)
        waits = file.stat().st_size if file.exists() else 0
        if at == stage and waits < times:
            file.write_bytes(b"." * (waits + 1))
            time.sleep(600)

    def select(*arguments: Any, **options: Any) -> Any:
        pause("before selection")
        result = select_file(*arguments, **options)
        pause("after selection")
        return result

    rounds.select_file = select


def run(words: list[str], folder: Path, pause: list[Any]) -> int:
    """In a fork: its own session, working folder and streams, then the command."""
    from video_opd.cli import main

    os.setsid()
    os.chdir(folder)
    redirect(os.devnull, "log", "log")
    pause_in_selection(*pause)
    sys.argv = ["video-opd", *words]
    return main(words)


if __name__ == "__main__":
    import_everything()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            command = functools.partial(run, request["words"], Path(request["folder"]), request["pause"])
            answer = fork(command)
        print(answer, flush=True)
