"""Owns products with few rows on a GPU, as a Triton kernel: their time is that of the weight's way through memory.

Each row is computed by itself: its bits do not depend on the others.

Shape suffixes in the kernels: N rows of a weight's tile, K its inputs, R rows of x, C all inputs, F features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama2.kernels.cuda.launch import announce, await_earlier, launch_options
from llama2.kernels.cuda.pointwise import silu


def linear(
    x_RC: torch.Tensor, weight_FC: torch.Tensor, *, gated: bool = False, pdl: bool = False, **tiles: int
) -> torch.Tensor:
    """x times the transposed weight, (R, F), at the rate of the weight's way through memory; for very few rows.

    With `gated` silu of the first half of the features times the second half, (R, F / 2). `tiles` are for benchmarks:
    the parts of `product_tiles` to override.
    """
    rows, inputs = x_RC.shape
    features = weight_FC.shape[0] // (2 if gated else 1)
    out_RF = x_RC.new_empty(rows, features)
    shape = {**product_tiles(inputs), **tiles}
    programs = triton.cdiv(weight_FC.shape[0], shape["N"])
    if rows:
        _linear[(programs,)](
            x_RC, weight_FC, out_RF, features, R=rows, C=inputs, GATED=gated, **shape, **launch_options(pdl)
        )
    return out_RF


def product_tiles(inputs: int) -> dict[str, int]:
    """N rows of the weight by K inputs at a time, the first EARLY inputs before the kernel waits for x."""
    warps = 4 if inputs <= 8192 else 8 if inputs <= 16384 else 16
    # 16 warps have half as many registers each.
    rows = 4 if warps < 16 else 2
    return {"N": rows, "K": 256 * warps, "EARLY": 1024 * warps, "num_warps": warps}


@triton.jit
def _linear(
    x,
    weight,
    out,
    features,
    R: tl.constexpr,
    C: tl.constexpr,
    GATED: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (tile of the weight): products are summed where they arise, and across the inputs only at the end.

    Each row of x has a sum of its own in two axes. A third axis would take the weights through shared memory, which
    Triton needs to change their layout. With GATED, rows of both halves alternate in a tile.
    """
    announce(PDL)
    row_N = tl.program_id(0) * N + tl.arange(0, N)
    feature_N = row_N // 2 if GATED else row_N
    is_feature_N = feature_N < features
    at_N = weight + (feature_N + (row_N % 2) * features if GATED else row_N).to(tl.int64) * C
    early = ()
    for start in tl.static_range(0, min(C, EARLY), K):
        early = early + (_tile(at_N, is_feature_N, start, C, K),)
    await_earlier(PDL)
    sums = ()
    for _ in tl.static_range(R):
        sums = sums + (tl.zeros((N, K), tl.float32),)
    # Unrolled, so that the loads of later inputs do not wait for earlier sums.
    for start in tl.static_range(0, C, K):
        input_K = start + tl.arange(0, K)
        w_NK = (early[start // K] if start < EARLY else _tile(at_N, is_feature_N, start, C, K)).to(tl.float32)
        longer = ()
        for row in tl.static_range(R):
            x_K = tl.load(x + row * C + input_K, mask=input_K < C, other=0.0).to(tl.float32)
            longer = longer + (sums[row] + x_K[None, :] * w_NK,)
        sums = longer
    for row in tl.static_range(R):
        sum_N = tl.sum(sums[row], 1)
        if GATED:
            gate_F, up_F = tl.split(tl.reshape(sum_N, (N // 2, 2)))
            feature_F = tl.program_id(0) * (N // 2) + tl.arange(0, N // 2)
            product_F = silu(gate_F) * up_F
            tl.store(out + row * features + feature_F, product_F.to(out.dtype.element_ty), mask=feature_F < features)
        else:
            tl.store(out + row * features + feature_N, sum_N.to(out.dtype.element_ty), mask=is_feature_N)


@triton.jit
def _tile(at_N, is_feature_N, start: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    input_K = start + tl.arange(0, K)
    return tl.load(at_N[:, None] + input_K[None, :], mask=is_feature_N[:, None] & (input_K < C)[None, :], other=0.0)
