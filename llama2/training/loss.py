"""Owns the loss: cross entropy of the tokens that count, with its gradient, without all their logits at once.

Knows no data. Logits are those of each rank's share of the vocabulary; a few rows' are computed, turned into their
gradient and forgotten, since the head is frozen.

Shape suffixes: R rows whose next token counts, C = dim, V the rank's share of the vocabulary, W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch.autograd.function import once_differentiable

from llama2.model import Transformer
from llama2.training.kernels import values_of

# fp32 logits that are there at once.
LOGITS_BYTES = 64 << 20


def cross_entropy(model: Transformer, x_RC: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
    """-ln p of each target (R,) int64, in nats, fp32, from what `Transformer.features` returns."""
    return _CrossEntropy.apply(x_RC, targets_R, model)


def rows_at_once(vocab_size: int) -> int:
    """Of a rank that has so many of the vocabulary."""
    return max(1, LOGITS_BYTES // (4 * vocab_size))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RC: torch.Tensor, targets_R: torch.Tensor, model: Transformer) -> torch.Tensor:
        collectives, sizes = model.collectives, model.vocab_sizes
        size, first = sizes[collectives.rank], sum(sizes[: collectives.rank])
        weight_VC = values_of(model.output, x_RC.shape[1], x_RC.dtype)
        losses_R = torch.empty(len(x_RC), device=x_RC.device)
        needs_gradient = ctx.needs_input_grad[0]
        d_RC = torch.empty_like(x_RC) if needs_gradient else None
        for start in range(0, len(x_RC), rows := rows_at_once(size)):
            own = slice(start, start + rows)
            local_R1 = targets_R[own, None] - first
            elsewhere_R1 = (local_R1 < 0) | (local_R1 >= size)
            local_R1 = local_R1.masked_fill(elsewhere_R1, 0)
            logits_RV = functional.linear(x_RC[own], weight_VC).float()
            total_R = logits_RV.logsumexp(1)
            target_R = logits_RV.gather(1, local_R1).masked_fill(elsewhere_R1, 0.0)[:, 0]
            if collectives.world_size > 1:
                parts_WR = logits_RV.new_zeros(collectives.world_size + 1, len(total_R))
                parts_WR[collectives.rank], parts_WR[-1] = total_R, target_R
                parts_WR = collectives.all_reduce(parts_WR)
                total_R, target_R = parts_WR[:-1].logsumexp(0), parts_WR[-1]
            losses_R[own] = total_R - target_R
            if d_RC is not None:
                d_RV = logits_RV.sub_(total_R[:, None]).exp_()
                d_RV.scatter_add_(1, local_R1, elsewhere_R1.float() - 1)
                torch.mm(d_RV.to(x_RC.dtype), weight_VC, out=d_RC[own])
        if d_RC is not None:
            ctx.save_for_backward(d_RC)
        return losses_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_R: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (d_RC,) = ctx.saved_tensors
        return d_RC * d_R[:, None].to(d_RC.dtype), None, None
