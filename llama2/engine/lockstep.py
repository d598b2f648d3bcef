"""Owns that every rank does the same things in the same order: rank 0 leads, the others follow.

Knows no requests and no sampling. Rank 0 has all ranks call the same methods of `Runner`, such as the one that runs a
plan. Calls are numbered, and a rank that misses one raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch

from llama2.engine.runner import Runner
from llama2.parallel.collectives import Collectives
from llama2.parallel.process_group import LockstepError, gather_objects

P = ParamSpec("P")
T = TypeVar("T")


class _Message(NamedTuple):
    """Call this method of the runner; without a `method`, end `follow` and return the one argument."""

    step: int
    method: str | None
    arguments: tuple[Any, ...]


class Lockstep:
    """One rank's end of the group. `steps` is the number of the last call that it took part in."""

    def __init__(self, runner: Runner, collectives: Collectives) -> None:
        self.rank, self.world_size = collectives.rank, collectives.world_size
        self.steps = 0
        self._runner = runner
        self._collectives = collectives

    def call(self, method: Callable[Concatenate[Runner, P], T], *args: P.args, **_: P.kwargs) -> T:
        """Rank 0: call a method of the runner on every rank; returns what it returns on this one.

        All ranks do it, or none: in a method that can fail on one rank alone the ranks must agree (`agree`) before
        anything changes.
        """
        self.steps += 1
        self._collectives.broadcast_object(_Message(self.steps, method.__name__, args))
        return getattr(self._runner, method.__name__)(*args)

    def keep(self, places: list[int], ids_R: torch.Tensor) -> None:
        """Rank 0, alone: see `Runner.keep`."""
        self._runner.keep(places, ids_R)

    def release(self, result: Any = None) -> Any:
        """Rank 0: end `follow` on the other ranks, where it returns `result`."""
        self._collectives.broadcast_object(_Message(self.steps, None, (result,)))
        return result

    def close(self) -> None:
        """Free what this rank recorded of the process group."""
        self._runner.close()

    def follow(self) -> Any:
        """A rank other than 0: do what rank 0 has all ranks do until it releases the group; returns its result.

        Raises:
            LockstepError: this rank missed a call or got one twice.
        """
        while True:
            message: _Message = self._collectives.broadcast_object()
            if message.method is None:
                return message.arguments[0]
            if message.step != self.steps + 1:
                raise LockstepError(
                    f"rank {self.rank} is out of step: it ran step {self.steps} last, "
                    f"and rank 0 sends step {message.step}"
                )
            self.steps = message.step
            getattr(self._runner, message.method)(*message.arguments)


def agree(settings: object, count: Callable[[], int]) -> int:
    """The smallest number that `count` gives on any rank, once all ranks are known to have the same settings.

    Raises:
        LockstepError: they were not; the message names the first rank that differs, and both settings.
        ValueError: on every rank, if `count` raised one on some rank.
    """
    mine: int | ValueError
    try:
        mine = count()
    except ValueError as error:
        mine = error  # if this rank raised alone, the others would wait for it
    answers = gather_objects((settings, mine))
    for rank, (theirs, _) in enumerate(answers):
        if theirs != answers[0][0]:
            raise LockstepError(f"rank {rank} was started with {theirs}, but rank 0 with {answers[0][0]}")
    for rank, (_, number) in enumerate(answers):
        if isinstance(number, ValueError):
            raise ValueError(f"rank {rank}: {number}" if len(answers) > 1 else str(number))
    return min(number for _, number in answers)
