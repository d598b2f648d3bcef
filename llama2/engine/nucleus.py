"""Owns top_k and top_p: the floor below which a row's weights become 0. Knows no tokens and no requests.

Axes: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama2.kernels.cpu.library import load_library


def nucleus_floor(weights_NV: Tensor, top_k_N: Tensor, top_p_N: Tensor) -> Tensor:
    """The least weight that stays in each row, (N,): of the top_k largest, the fewest that reach top_p of their sum.

    So equal weights are kept or dropped together. The floor of a row of NaN is meaningless. On a GPU nothing waits.

    Args:
        weights_NV: fp32, none below 0.
        top_k_N: int64, from 1; the vocabulary's size keeps everything.
        top_p_N: fp64, above 0; 1 keeps everything.
    """
    if weights_NV.is_cuda:
        from llama2.kernels.cuda import sampling

        return sampling.nucleus_floor(weights_NV, top_k_N, top_p_N)
    if load_library():
        return torch.ops.llama2_cpu.nucleus_floor(weights_NV.contiguous(), top_k_N, top_p_N)
    return plain_nucleus_floor(weights_NV, top_k_N, top_p_N)


def plain_nucleus_floor(weights_NV: Tensor, top_k_N: Tensor, top_p_N: Tensor) -> Tensor:
    """`nucleus_floor` by sorting whole rows: the reference, and the fallback without a compiler."""
    sorted_NV = weights_NV.sort(dim=-1, descending=True).values
    k_floor_N1 = sorted_NV.gather(-1, top_k_N[:, None] - 1) * (top_k_N < weights_NV.shape[-1])[:, None]
    kept_NV = sorted_NV.masked_fill(sorted_NV < k_floor_N1, 0)
    cumulative_NV = kept_NV.cumsum(dim=-1, dtype=torch.float64)
    # A weight stays if those before it do not reach the mass yet. In a row of NaN none does.
    stays_NV = cumulative_NV - kept_NV < top_p_N[:, None] * cumulative_NV[:, -1:]
    p_floor_N1 = sorted_NV.gather(-1, stays_NV.sum(dim=-1, keepdim=True).clamp_(min=1) - 1)
    return torch.where(top_p_N[:, None] < 1, torch.maximum(k_floor_N1, p_floor_N1), k_floor_N1)[:, 0]
