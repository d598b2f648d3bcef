"""Owns that every rank runs the same plans in the same order: rank 0 leads, the others follow.

Knows no requests and no sampling. A plan is complete by itself, so all that a rank can get wrong is which one comes
next; it counts them, and says so when the count does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from llama2.engine.runner import Runner
from llama2.engine.scheduler import Plan
from llama2.parallel.collectives import Collectives, LockstepError


@dataclass(frozen=True, slots=True)
class _Release:
    """The message that ends `follow` on the other ranks and hands them a result."""

    result: Any


class Lockstep:
    """One rank's end of the group. `steps` is the number of the last plan that it ran."""

    def __init__(self, runner: Runner, collectives: Collectives) -> None:
        self.rank = collectives.rank
        self.steps = 0
        self._runner = runner
        self._collectives = collectives

    def lead(self, plan: Plan) -> torch.Tensor:
        """Rank 0: run `plan` on every rank; returns the logits (R, V) that it asks for."""
        self._collectives.broadcast_object(plan)
        self.steps = plan.step
        logits_RV = self._runner.run(plan)
        assert logits_RV is not None
        return logits_RV

    def feed(self, ids_R: torch.Tensor) -> None:
        """Rank 0: what the next plan's unread tokens are, by row: ids (R,) int64 on the device."""
        self._runner.feed(ids_R)

    def release(self, result: Any = None) -> Any:
        """Rank 0: end `follow` on the other ranks, where it returns `result`."""
        self._collectives.broadcast_object(_Release(result))
        return result

    def close(self) -> None:
        """Give up what this rank holds of the process group."""
        self._runner.close()

    def follow(self) -> Any:
        """A rank other than 0: run what rank 0 leads until it releases the group; returns what it sent along.

        Raises:
            LockstepError: this rank missed a plan or got one twice.
        """
        while True:
            message = self._collectives.broadcast_object()
            if isinstance(message, _Release):
                return message.result
            if message.step != self.steps + 1:
                raise LockstepError(
                    f"rank {self.rank} is out of step: it ran step {self.steps} last, "
                    f"and rank 0 sends step {message.step}"
                )
            self.steps = message.step
            self._runner.run(message)


def agree(settings: object, count: Callable[[], int]) -> int:
    """The smallest number that `count` gives on any rank, once it is sure that all were given the same settings.

    Raises:
        LockstepError: they were not; the message names the first rank that differs, and both settings.
        ValueError: on every rank, if `count` raised one on some rank.
    """
    mine: int | ValueError
    try:
        mine = count()
    except ValueError as error:
        mine = error  # alone this rank would leave, and the others wait for it
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (settings, mine))
    for rank, (theirs, _) in enumerate(answers):
        if theirs != answers[0][0]:
            raise LockstepError(f"rank {rank} was started with {theirs}, but rank 0 with {answers[0][0]}")
    for rank, (_, number) in enumerate(answers):
        if isinstance(number, ValueError):
            raise ValueError(f"rank {rank}: {number}" if len(answers) > 1 else str(number))
    return min(number for _, number in answers)
