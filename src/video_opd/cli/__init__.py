"""The ``video-opd`` command.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 the work failed, 2 the arguments or
input files are wrong, 130 interrupted. An error is one line; ``--debug`` adds the traceback.

Each command is a module of this folder, which holds its arguments and its call; :mod:`video_opd.cli.commands`
lists them. They import what is heavy when they run, so ``video-opd --help`` answers at once, without torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from video_opd.cli.commands import parse_words
from video_opd.cli.output import locked_outputs, lost_output, prepare_streams
from video_opd.errors import ErrorOfFirst, Unavailable, UserError
from video_opd.processes import follow_launcher
from video_opd.terminal import visible

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
CLOSED = "stdout is closed: the result could not be printed"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. For ``--help``, argparse raises SystemExit."""
    # Threads that spin while they wait slow each other tenfold when several processes share few cores. torch
    # reads this when it starts its threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    follow_launcher()  # first of all, because importing torch takes seconds
    words = list(sys.argv[1:] if argv is None else argv)
    closed = prepare_streams()  # what stands in for a closed stdout
    debug = "--debug" in words
    try:
        arguments = parse_words(words)
        with locked_outputs(arguments.outputs):  # before anything heavy is imported
            code = arguments.command.run(arguments)
        sys.stdout.flush()  # raises here, inside the try, if the reader has left or the disk is full
        if closed is not None and closed.getvalue():
            return _fail(CLOSED, FAILED, debug)
        return DONE if code is None else int(code)
    except SystemExit:  # --help, --version
        if reason := lost_output():
            return _fail(f"stdout cannot be written ({reason})", FAILED, debug)
        if closed is not None and closed.getvalue():
            return _fail(CLOSED, FAILED, debug)
        raise
    except ErrorOfFirst as error:  # the first process prints it
        return WRONG_INPUT if error.wrong_input else FAILED
    except UserError as error:
        return _fail(str(error), WRONG_INPUT, debug)
    except Unavailable as error:
        return _fail(str(error), FAILED, debug)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues where it stopped", INTERRUPTED, False)
    except BrokenPipeError:
        # The reader of stdout has left (video-opd ... | head). Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if reason := lost_output():
            return _fail(f"stdout cannot be written ({reason})", FAILED, debug)
        if mistake := _path_mistake(error):
            return _fail(mistake, WRONG_INPUT, debug)
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return _fail(f"{what} (add --debug for the traceback)", FAILED, debug)


def _path_mistake(error: Exception) -> str | None:
    """What is wrong with a path that no file can have, or with the working folder; None for another error."""
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{error.filename}: {error.strerror}; check the path"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a path holds a zero byte, which no file name can; check the recipe and the arguments"
    if isinstance(error, FileNotFoundError):
        try:
            os.getcwd()
        except FileNotFoundError:
            return "the working folder was deleted; change to one that is there"
    return None


def _fail(message: str, code: int, debug: bool) -> int:
    with contextlib.suppress(OSError):  # the exit code says it if stderr cannot
        if debug:
            print(visible(traceback.format_exc(), keep="\n"), end="", file=sys.stderr)
        print("video-opd: " + visible(" ".join(message.split())), file=sys.stderr, flush=True)
    return code
