"""Owns top_k and top_p: the floor under which a row's weights are to become 0. Knows no tokens and no requests.

Axes: N rows, V vocabulary, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

# How many of the largest weights are looked at on a CPU before a row is sorted whole: a nucleus is nearly always small,
# and sorting a large vocabulary costs more than all the rest of a choice.
CANDIDATES = (64, 1024)


def nucleus_floor(weights_NV: Tensor, top_k_N: Tensor, top_p_N: Tensor) -> Tensor:
    """The least weight that stays in each row, (N,): of the top_k largest, the fewest that reach top_p of their sum.

    So equal weights stay or go together. A row of NaN has a floor without meaning. On a GPU nothing waits.

    Args:
        weights_NV: fp32, none below 0.
        top_k_N: int64, from 1; the vocabulary's size leaves everything.
        top_p_N: fp64, above 0; 1 leaves everything.
    """
    if weights_NV.is_cuda:
        from llama2.kernels.cuda import sampling

        return sampling.nucleus_floor(weights_NV, top_k_N, top_p_N)
    vocab_size = weights_NV.shape[-1]
    floor_N = weights_NV.new_zeros(len(weights_NV))
    open_M = ((top_k_N < vocab_size) | (top_p_N < 1)).nonzero()[:, 0]
    for size in (*(size for size in CANDIDATES if size < vocab_size), vocab_size):
        if not len(open_M):
            break
        of_these_MV = weights_NV if len(open_M) == len(weights_NV) else weights_NV.index_select(0, open_M)
        floor_M, is_open_M = _floor_of_largest(of_these_MV, top_k_N[open_M], top_p_N[open_M], size)
        floor_N[open_M] = floor_M
        open_M = open_M[is_open_M]
    return floor_N


def _floor_of_largest(weights_NV: Tensor, top_k_N: Tensor, top_p_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The floor as the `size` largest weights have it; the second result says where these do not prove it."""
    vocab_size = weights_NV.shape[-1]
    if size < vocab_size:
        candidates_NK = weights_NV.topk(size, dim=-1).values
    else:
        candidates_NK = weights_NV.sort(dim=-1, descending=True).values
    has_top_k_N, has_top_p_N = top_k_N < vocab_size, top_p_N < 1
    k_floor_N = candidates_NK.gather(-1, top_k_N.clamp(max=size)[:, None] - 1)[:, 0] * has_top_k_N
    kept_NV = torch.where(weights_NV < k_floor_N[:, None], 0, weights_NV) if has_top_k_N.any() else weights_NV
    mass_N = top_p_N * kept_NV.sum(dim=-1)
    cumulative_NK = candidates_NK.cumsum(dim=-1, dtype=torch.float64)
    # A candidate stays as long as those before it do not yet reach the mass. In a row of NaN none does.
    num_kept_N = (cumulative_NK - candidates_NK < mass_N[:, None]).sum(dim=-1).clamp_(min=1)
    p_floor_N = candidates_NK.gather(-1, num_kept_N[:, None] - 1)[:, 0] * has_top_p_N
    is_open_N = (has_top_k_N & (top_k_N > size)) | (has_top_p_N & (cumulative_NK[:, -1] < mass_N))
    return torch.maximum(k_floor_N, p_floor_N), is_open_N & (size < vocab_size)
