"""The product of few rows as it was at first, with its sums in three axes: the baseline for the engine's.

Triton changes the layout of the weights for the third axis, through shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def linear(x_RC: torch.Tensor, weight_FC: torch.Tensor) -> torch.Tensor:
    """x (R, C) times the transposed weight (F, C): (R, F). R is a power of 2."""
    (rows, inputs), features = x_RC.shape, len(weight_FC)
    out_RF = x_RC.new_empty(rows, features)
    _linear[(triton.cdiv(features, 4),)](x_RC, weight_FC, out_RF, features, R=rows, C=inputs, N=4, K=1024, num_warps=4)
    return out_RF


@triton.jit
def _linear(x, weight, out, features, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    feature_N = tl.program_id(0) * N + tl.arange(0, N)
    row_R = tl.arange(0, R)
    sum_RNK = tl.zeros((R, N, K), tl.float32)
    for start in tl.static_range(0, C, K):
        input_K = start + tl.arange(0, K)
        mask_NK = (feature_N < features)[:, None] & (input_K < C)[None, :]
        w_NK = tl.load(weight + feature_N.to(tl.int64)[:, None] * C + input_K[None, :], mask=mask_NK, other=0.0)
        x_RK = tl.load(x + row_R[:, None] * C + input_K[None, :], mask=(input_K < C)[None, :], other=0.0)
        sum_RNK += x_RK.to(tl.float32)[:, None, :] * w_NK.to(tl.float32)[None, :, :]
    at_RN = out + row_R[:, None] * features + feature_N[None, :]
    tl.store(at_RN, tl.sum(sum_RNK, 2).to(out.dtype.element_ty), mask=(feature_N < features)[None, :])
