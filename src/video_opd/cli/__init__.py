"""The ``video-opd`` command.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 the work failed, 2 the arguments or
input files are wrong, 130 interrupted. An error is one line; ``--debug`` adds the traceback.

Each command is a module of this folder, which holds its arguments and its call; :mod:`video_opd.cli.commands`
lists them. They import what is heavy when they run, so ``video-opd --help`` answers at once, without torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from video_opd.cli.commands import parse_words
from video_opd.errors import UserError
from video_opd.processes import follow_launcher

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. For ``--help``, argparse raises SystemExit."""
    # Threads that spin while they wait slow each other tenfold when several processes share few cores. torch
    # reads this when it starts its threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    follow_launcher()  # first of all, because importing torch takes seconds
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        arguments = parse_words(words)
        code = arguments.command.run(arguments)
        sys.stdout.flush()  # raises here, inside the try, if the reader has left
        return DONE if code is None else int(code)
    except UserError as error:
        return _fail(str(error), WRONG_INPUT, debug)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues where it stopped", INTERRUPTED, False)
    except BrokenPipeError:
        # The reader of stdout has left (video-opd ... | head). Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return _fail(f"{what} (add --debug for the traceback)", FAILED, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("video-opd: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code
