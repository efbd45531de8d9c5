"""Tries what a model folder says about its prompts, in a process that may be ended.

A chat template is a program. jinja's sandbox keeps it from files and other objects, but not from loops of
hours, powers of powers and texts of gigabytes; and a tokenizer's patterns may need a time that grows
exponentially with the text. So a fork renders and tokenizes one prompt first, with limits.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from video_opd.data.prompts import build_messages
from video_opd.errors import UserError
from video_opd.progress import log

CPU_S = 20  # a prompt takes milliseconds
MEMORY_BYTES = 2 << 30  # more than the process had before
MOST_CHARACTERS = 1 << 20
_FINE, _NO_MEMORY, _LONG = 0, 3, 4


def try_prompt(path: str | Path, processor: Any) -> None:
    """Raises :class:`UserError` if a prompt of this processor takes more time, memory or text than any does.

    Other errors of the template are left to those who render their own prompts with it.
    """
    try:
        with warnings.catch_warnings(), _tokenizers_told():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads: the fork needs none of them
            child = _forked()
    except OSError as error:  # a machine that promises no more memory than it has
        log(f"{path}: its chat template is not tried before it is used ({error.strerror})")
        return
    if child == 0:
        _be_tried(processor)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == _FINE:
        return
    reasons = {
        _NO_MEMORY: f"needs more than {MEMORY_BYTES >> 30} GiB",
        _LONG: f"is longer than {MOST_CHARACTERS:,} characters",
        -signal.SIGXCPU: f"takes more than {CPU_S} s",
        -signal.SIGKILL: f"takes more than {CPU_S} s or the memory of this machine",
    }
    reason = reasons.get(status, f"ends the process that makes it ({status})")
    raise UserError(
        f"{path}: a prompt by its chat template and tokenizer {reason}; copy chat_template.jinja and the "
        "tokenizer's files from the checkpoint that this one was made from"
    )


def _forked() -> int:
    """Forks; the child collects no garbage. A decoder that its parent let go of would wait there without end
    for threads that a fork does not have."""
    collects, child = gc.isenabled(), -1
    gc.disable()
    try:
        child = os.fork()
    finally:
        if child != 0 and collects:
            gc.enable()
    return child


def _be_tried(processor: Any) -> None:
    """Makes the prompt and ends this process, whatever happens."""
    status = _FINE
    try:
        for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):
            signal.signal(stop, signal.SIG_DFL)
        _limit()
        messages = build_messages("the cup falls", "paper", False)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if len(text) > MOST_CHARACTERS:
            status = _LONG
        else:
            processor.tokenizer(text, add_special_tokens=False)
    except MemoryError:
        status = _NO_MEMORY
    except BaseException:  # it is said where a prompt is needed
        status = _FINE
    finally:
        os._exit(status)


@contextlib.contextmanager
def _tokenizers_told() -> Iterator[None]:
    """Keeps the tokenizers library from printing that a fork uses one thread."""
    name = "TOKENIZERS_PARALLELISM"
    given = os.environ.get(name)
    os.environ[name] = given or "false"
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def _limit() -> None:
    with contextlib.suppress(OSError, ValueError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
    # What the parent has mapped counts, too, and with a GPU that is far more than there is memory.
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
