"""The interfaces through which training, curriculum and evaluation use a model, whatever engine runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar, runtime_checkable

from video_opd.types import EncodedPrompt, Rollout, TokenLogprobs

T = TypeVar("T")

Responses = Sequence[Sequence[Sequence[int]]]
"""For each prompt its responses, for each response its token ids. Results are flattened prompt-major:
``[[a, b], [c]]`` gives the rows a, b, c."""


@runtime_checkable
class Sampler(Protocol):
    """What samples responses: a policy, or another engine in its place."""

    def sample(
        self,
        prompts: Sequence[EncodedPrompt] | Any,
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seeds: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Rollout]]:
        """``n`` rollouts for each prompt.

        Rollout j of prompt i depends on the non-negative ``seeds[i][j]`` and on no other seed, so rollouts do
        not change with micro-batches, processes or resumes. Greedy sampling (``temperature=0``) needs no
        seeds.
        The recorded log-probabilities are those of the distribution that was sampled, filters included; for
        greedy rollouts they are the model's at temperature 1.
        """
        ...


@runtime_checkable
class Policy(Sampler, Protocol):
    """A model that samples responses and gives the log-probability of each of their tokens."""

    def prefill(self, prompts: Sequence[EncodedPrompt], *, grad: bool = False) -> Any:
        """Prefill the prompts once; :meth:`sample` and :meth:`logprobs` take the result in their place.

        The result can be used any number of times until the weights change. Its method ``select(rows)`` gives
        the prefix of some of the prompts. ``grad``: one :meth:`logprobs` with ``grad`` may follow, and the
        result has a method ``cut()``, which divides its backward in two.
        """
        ...

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt] | Any,
        responses: Responses,
        *,
        grad: bool = False,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """Log-probabilities of ``responses[i]``, the responses to prompt i, flattened prompt-major.

        ``full`` adds ``full_BTV``, in which tokens that cannot be written hold a large negative number (not
        -inf). ``temperature`` must be the one that was sampled at. ``grad`` takes prompts, or a prefix that
        was prefilled with ``grad``.
        """
        ...


@runtime_checkable
class ChunkedPolicy(Policy, Protocol):
    """A policy that can prefill more prompts on one video than memory holds at a time."""

    def prefill_chunks(self, prompts: Sequence[EncodedPrompt], size: int) -> Iterator[Any]:
        """Yields the prefix of ``size`` prompts at a time. A video that prompts share is prefilled once."""
        ...


@runtime_checkable
class CollectivePolicy(Policy, Protocol):
    """A policy that processes hold together: its other methods are called inside of :meth:`together` only."""

    def together(self, work: Callable[[], T]) -> T:
        """The result of ``work``, in which a process uses the policy as often as it likes, or not at all.

        All processes call it together, and it returns when the work of all has ended.
        """
        ...


@runtime_checkable
class Teacher(Protocol):
    """A frozen model that scores responses that the student wrote."""

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt],
        responses: Responses,
        *,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """As :meth:`Policy.logprobs`, without gradients. Values are finite wherever ``mask_BT`` is True."""
        ...


@runtime_checkable
class CollectiveTeacher(Teacher, Protocol):
    """A teacher that all processes call equally often, because they hold it together."""

    def attend(self) -> None:
        """Takes part in a call of the other processes' :meth:`logprobs`, without prompts of its own."""
        ...


@runtime_checkable
class DistantTeacher(Teacher, Protocol):
    """A teacher that works elsewhere, while this process does something else."""

    def ask(
        self,
        prompts: Sequence[EncodedPrompt],
        responses: Responses,
        *,
        full: bool = False,
        temperature: float = 1.0,
    ) -> Callable[[], TokenLogprobs]:
        """Begins what :meth:`logprobs` does, and returns at once; the result waits for the scores."""
        ...


@runtime_checkable
class VisitingTeacher(Teacher, Protocol):
    """A teacher that takes up memory of the device only during its turn. Turns of several ones overlap."""

    def turn(self) -> AbstractContextManager[None]:
        """A context in which several calls of :meth:`logprobs` are one turn."""
        ...
