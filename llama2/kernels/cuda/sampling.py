"""Owns the search for the weight at which a nucleus ends, on a GPU, as one Triton kernel.

It replaces a sort of the whole vocabulary, and asks the host for nothing. Every row is computed by one program alone,
in an order that is always the same: its bits do not depend on the others.

Shape suffixes: N rows, V vocabulary, C the part of a row that is looked at together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Weights that are read at a time, and warps of a program, as many as there can be. A thread then has 64 registers: too
# few for a row, even of 32,000, or for larger chunks. So a row is read again whenever it is split, out of the caches,
# at a rate near that of turning it into fp64.
CHUNK, WARPS = 8192, 32


def nucleus_floor(weights_NV: torch.Tensor, top_k_N: torch.Tensor, top_p_N: torch.Tensor) -> torch.Tensor:
    """The least weight that stays in each row, (N,): of the top_k largest, the fewest that reach top_p of their sum.

    Equal weights stay or go together. A row of NaN has a floor without meaning.

    Args:
        weights_NV: fp32, none below 0.
        top_k_N: int64, at least 1; the vocabulary's size leaves everything.
        top_p_N: fp64, above 0; 1 leaves everything.
    """
    rows, vocab_size = weights_NV.shape
    floor_N = weights_NV.new_empty(rows)
    # Triton launches on the current device, which in a thread of its own need not be this one.
    with torch.cuda.device_of(weights_NV):
        _nucleus_floor[(rows,)](
            weights_NV.contiguous().view(torch.int32), top_k_N, top_p_N, floor_N, vocab_size, C=CHUNK, num_warps=WARPS
        )
    return floor_N


@triton.jit(do_not_specialize_on_alignment=["top_k", "top_p", "floor"])
def _nucleus_floor(weights, top_k, top_p, floor, vocab_size, C: tl.constexpr):
    """Program (row). A weight is known by its bits, whose order as integers is that of the numbers from 0 to inf."""
    row = tl.program_id(0)
    row_V = weights + row.to(tl.int64) * vocab_size
    k = tl.load(top_k + row)
    p = tl.load(top_p + row)
    found = tl.full((), 0, tl.int32)
    if k < vocab_size:
        found = _least(row_V, vocab_size, found, k.to(tl.float64), False, C)
    if p < 1:
        _, total, _, _ = _split(row_V, vocab_size, found - 1, True, C)
        # However little is asked for, the largest weight stays.
        found = _least(row_V, vocab_size, found, tl.maximum(p * total, tl.full((), 1e-300, tl.float64)), True, C)
    tl.store(floor + row, found.to(tl.float32, bitcast=True))


@triton.jit
def _least(row_V, vocab_size, first, limit, SUMS: tl.constexpr, C: tl.constexpr):
    """The least weight, from `first` on, with less than `limit` beyond it: weights, or their sum.

    By halving what is between two bounds. Both move on to a weight that is there, so it ends as soon as none is left
    between: after as many halvings as tell the weights apart, 31 at most.
    """
    last = tl.full((), 0x7F800000, tl.int32)  # inf
    while first < last:
        middle = first + (last - first) // 2
        number, total, below, above = _split(row_V, vocab_size, middle, SUMS, C)
        beyond = total if SUMS else number.to(tl.float64)
        if beyond < limit:
            last = below
        else:
            first = above
    return last


@triton.jit
def _split(row_V, vocab_size, middle, SUMS: tl.constexpr, C: tl.constexpr):
    """Of the weights beyond `middle` the number and the sum; the largest one up to it, and the least one beyond it."""
    column_C = tl.arange(0, C)
    number_C = tl.zeros((C,), tl.int32)
    total_C = tl.zeros((C,), tl.float64)
    below_C = tl.full((C,), -1, tl.int32)
    above_C = tl.full((C,), 0x7FFFFFFF, tl.int32)
    for start in range(0, vocab_size, C):
        bits_C = tl.load(row_V + start + column_C, mask=start + column_C < vocab_size, other=-1)
        is_beyond_C = bits_C > middle
        if SUMS:
            weight_C = bits_C.to(tl.float32, bitcast=True)
            total_C += tl.where(is_beyond_C, weight_C, 0.0).to(tl.float64)
        else:
            number_C += is_beyond_C.to(tl.int32)
        below_C = tl.maximum(below_C, tl.where(is_beyond_C, -1, bits_C))
        above_C = tl.minimum(above_C, tl.where(is_beyond_C, bits_C, 0x7FFFFFFF))
    return tl.sum(number_C, 0), tl.sum(total_C, 0), tl.max(below_C, 0), tl.min(above_C, 0)
