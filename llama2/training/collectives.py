"""Owns the sums over parallel ranks on the way back: what gradients need, beside what results need.

What a branch adds to the residual stream is summed by the model, and its gradient is the same on all ranks. What all
products of a layer take as input is the same on all ranks, and its gradient is summed here (arXiv:1909.08053, f and g).
Knows no model.
"""

from __future__ import annotations

from typing import Any

import torch

from llama2.parallel.collectives import Collectives
from llama2.parallel.shared_memory import Shared


class TrainingCollectives:
    """`Collectives` whose sums have gradients."""

    shared: Shared | None = None

    def __init__(self, inner: Collectives) -> None:
        self._inner = inner
        self.rank, self.world_size = inner.rank, inner.world_size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.world_size == 1 else _Sum.apply(x, self._inner)

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        return self._inner.gather(x, sizes)

    def broadcast_object(self, message: Any = None) -> Any:
        return self._inner.broadcast_object(message)


def sum_gradients(x: torch.Tensor, collectives: Collectives) -> torch.Tensor:
    """`x`, whose gradient is the sum of all ranks'."""
    return x if collectives.world_size == 1 else _SumGradients.apply(x, collectives)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, collectives: Collectives) -> torch.Tensor:
        return collectives.all_reduce(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, collectives: Collectives) -> torch.Tensor:
        ctx.collectives = collectives
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.collectives.all_reduce(dy.clone(memory_format=torch.contiguous_format)), None
