"""Owns one tile of attention over the paged cache on a GPU: what decoding and prompts have in common.

Shape suffixes in the kernels: M rows of a tile, L positions of a tile, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama2.kernels.cuda.cache_codes import decode

LOG2_E = 1.4426950408889634


def positions_per_tile(padded_dim: int, dtype: torch.dtype) -> int:
    """As many as leave two tiles of keys and of values, and one of queries, room in 99 KB of shared memory."""
    return 64 if padded_dim * dtype.itemsize <= 256 else 16 if padded_dim * dtype.itemsize > 512 else 32


@triton.jit
def attend_tile(
    sum_MD,
    weight_M,
    top_M,
    q_MD,
    last_M,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    start,
    end,
    scale,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    L: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Softmax goes on over positions [start, start + L), below `end`, of which row m sees those up to last_M[m].

    Returns (weighted values, their weight, the largest score), the first two relative to the third. Scores are powers
    of 2: `scale` says so. Without MASKED every row sees all of them. Scales are read where the cache holds codes.
    """
    feature_D = tl.arange(0, PADDED_D)
    position_L = start + tl.arange(0, L)
    is_inside_L = position_L < end
    if MASKED:
        block_L = tl.load(table + position_L // BLOCK_SIZE, mask=is_inside_L, other=0)
    else:
        block_L = tl.load(table + position_L // BLOCK_SIZE)
    at_L = block_L.to(tl.int64) * BLOCK_STRIDE + (position_L % BLOCK_SIZE) * POSITION_STRIDE
    at_LD = at_L[:, None] + feature_D[None, :]
    if MASKED:
        mask_LD = is_inside_L[:, None] & (feature_D < D)[None, :]
        k_LD = tl.load(keys + at_LD, mask=mask_LD, other=0.0)
        v_LD = tl.load(values + at_LD, mask=mask_LD, other=0.0)
    elif D < PADDED_D:
        k_LD = tl.load(keys + at_LD, mask=(feature_D < D)[None, :], other=0.0)
        v_LD = tl.load(values + at_LD, mask=(feature_D < D)[None, :], other=0.0)
    else:
        k_LD = tl.load(keys + at_LD)
        v_LD = tl.load(values + at_LD)
    score_ML = tl.dot(q_MD, tl.trans(decode(k_LD, q_MD.dtype)), input_precision="ieee")
    HAS_SCALES: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth == 8
    if HAS_SCALES:
        scale_at_L = (block_L.to(tl.int64) * BLOCK_SIZE + position_L % BLOCK_SIZE) * KV_HEADS
        score_ML *= tl.load(key_scales + scale_at_L, mask=is_inside_L, other=0.0)[None, :]
    if MASKED:
        score_ML = tl.where(position_L[None, :] <= last_M[:, None], score_ML, float("-inf"))
    new_top_M = tl.maximum(top_M, tl.max(score_ML, 1) * scale)
    base_M = new_top_M
    if MASKED:  # a row that has seen nothing yet: -inf less -inf would be NaN
        base_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
    p_ML = tl.exp2(score_ML * scale - base_M[:, None])
    decay_M = tl.exp2(top_M - base_M)
    weight_M = weight_M * decay_M + tl.sum(p_ML, 1)
    if HAS_SCALES:
        p_ML *= tl.load(value_scales + scale_at_L, mask=is_inside_L, other=0.0)[None, :]
    v_LD = decode(v_LD, q_MD.dtype)
    sum_MD = sum_MD * decay_M[:, None] + tl.dot(p_ML.to(v_LD.dtype), v_LD, input_precision="ieee")
    return sum_MD, weight_M, new_top_M
