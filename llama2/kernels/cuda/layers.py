"""Owns the steps between the matrix products on a GPU, and products with few rows, as Triton kernels.

Each is one launch where PyTorch has several: at a small batch the time of a step is that of its launches and of the
weights' way through memory. Every row is computed by itself: its bits do not depend on the others.

With `pdl` a kernel is launched while the one before still runs (programmatic dependent launch, compute capability 9.0).
Until it waits for that one it may read weights, and nothing that any kernel of the same pass writes.

Shape suffixes as in llama2/model.py; in the kernels N are rows of a weight's tile, K its inputs, R rows of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama2.kernels.cuda.launch import announce, await_earlier, cache_strides, launch_options

# Heads that one program rotates.
HEADS = 8


def linear(
    x_RC: torch.Tensor, weight_FC: torch.Tensor, *, gated: bool = False, pdl: bool = False, **tiles: int
) -> torch.Tensor:
    """x times the transposed weight, (R, F), at the rate of the weight's way through memory; for very few rows.

    With `gated` silu of the first half of the features times the second half, (R, F / 2). `tiles` are for benchmarks:
    the parts of `product_tiles` that shall differ.
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


def add_rms_norm(
    x_TC: torch.Tensor, branch_TC: torch.Tensor | None, weight_C: torch.Tensor, eps: float, *, pdl: bool = False
) -> torch.Tensor:
    """Adds the branch to x, in place; returns its norm."""
    rows, width = x_TC.shape
    out_TC = torch.empty_like(x_TC)
    if rows:
        _add_rms_norm[(rows,)](
            x_TC,
            x_TC if branch_TC is None else branch_TC,
            weight_C,
            out_TC,
            eps,
            HAS_BRANCH=branch_TC is not None,
            C=width,
            PADDED_C=triton.next_power_of_2(width),
            num_warps=8 if width > 1024 else 4,
            **launch_options(pdl),
        )
    return out_TC


def rotate_and_store(
    qkv_TX: torch.Tensor,
    rope_TD2: torch.Tensor,
    slots_T: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """Rotated queries (T, H, D); rotated keys, and values, go into their slots."""
    tokens, (block_size, kv_heads, head_dim) = len(qkv_TX), keys.shape[1:]
    heads = qkv_TX.shape[1] // head_dim - 2 * kv_heads
    q_THD = qkv_TX.new_empty(tokens, heads, head_dim)
    _rotate_and_store[(tokens, triton.cdiv(heads + 2 * kv_heads, HEADS))](
        qkv_TX,
        rope_TD2,
        slots_T,
        keys,
        values,
        q_THD,
        QUERY_HEADS=heads,
        KV_HEADS=kv_heads,
        HEADS=HEADS,
        D=head_dim,
        PADDED_D=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        **cache_strides(keys, values),
        num_warps=4,
        **launch_options(pdl),
    )
    return q_THD


def silu_mul(gate_up_T2F: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    tokens, width = gate_up_T2F.shape
    out_TF = gate_up_T2F.new_empty(tokens, width // 2)
    grid = (tokens, triton.cdiv(width // 2, 1024))
    _silu_mul[grid](gate_up_T2F, out_TF, width // 2, F=1024, num_warps=4, **launch_options(pdl))
    return out_TF


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
            product_F = _silu(gate_F) * up_F
            tl.store(out + row * features + feature_F, product_F.to(out.dtype.element_ty), mask=feature_F < features)
        else:
            tl.store(out + row * features + feature_N, sum_N.to(out.dtype.element_ty), mask=is_feature_N)


@triton.jit
def _tile(at_N, is_feature_N, start: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    input_K = start + tl.arange(0, K)
    return tl.load(at_N[:, None] + input_K[None, :], mask=is_feature_N[:, None] & (input_K < C)[None, :], other=0.0)


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _add_rms_norm(
    x,
    branch,
    weight,
    out,
    eps,
    HAS_BRANCH: tl.constexpr,
    C: tl.constexpr,
    PADDED_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row). The sum is rounded to the dtype before it is normalized: it is what travels on."""
    announce(PDL)
    column_C = tl.arange(0, PADDED_C)
    at_C = tl.program_id(0).to(tl.int64) * C + column_C
    mask_C = column_C < C
    weight_C = tl.load(weight + column_C, mask=mask_C, other=0.0).to(tl.float32)
    await_earlier(PDL)
    x_C = tl.load(x + at_C, mask=mask_C, other=0.0)
    if HAS_BRANCH:
        branch_C = tl.load(branch + at_C, mask=mask_C, other=0.0)
        x_C = (x_C.to(tl.float32) + branch_C.to(tl.float32)).to(x_C.dtype)
        tl.store(x + at_C, x_C, mask=mask_C)
    x_C = x_C.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x_C * x_C, 0) / C + eps)
    tl.store(out + at_C, (x_C * inverse * weight_C).to(out.dtype.element_ty), mask=mask_C)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _rotate_and_store(
    qkv,
    rope,
    slots,
    keys,
    values,
    q,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, some of its heads): queries, then keys, then values, as they lie in a row of `qkv`."""
    announce(PDL)
    await_earlier(PDL)
    token = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    feature_D = tl.arange(0, PADDED_D)
    pair_I = tl.arange(0, PADDED_D // 2)
    all_heads: tl.constexpr = QUERY_HEADS + 2 * KV_HEADS
    is_feature_D = feature_D < D
    mask_HD = (head_H < all_heads)[:, None] & is_feature_D[None, :]
    x_HD = tl.load(qkv + (token * all_heads + head_H[:, None]) * D + feature_D[None, :], mask=mask_HD, other=0.0)
    cos_I = tl.load(rope + token * D + 2 * pair_I, mask=pair_I < D // 2, other=0.0)
    sin_I = tl.load(rope + token * D + 2 * pair_I + 1, mask=pair_I < D // 2, other=0.0)
    even_HI, odd_HI = tl.split(tl.reshape(x_HD.to(tl.float32), (HEADS, PADDED_D // 2, 2)))
    turned_HI2 = tl.join(
        even_HI * cos_I[None, :] - odd_HI * sin_I[None, :], even_HI * sin_I[None, :] + odd_HI * cos_I[None, :]
    )
    turned_HD = tl.reshape(turned_HI2, (HEADS, PADDED_D)).to(x_HD.dtype)
    at_HD = q + (token * QUERY_HEADS + head_H[:, None]) * D + feature_D[None, :]
    tl.store(at_HD, turned_HD, mask=(head_H < QUERY_HEADS)[:, None] & is_feature_D[None, :])
    slot = tl.load(slots + token)
    at_slot = (slot // BLOCK_SIZE) * BLOCK_STRIDE + (slot % BLOCK_SIZE) * POSITION_STRIDE
    key_H = head_H - QUERY_HEADS
    at_HD = keys + at_slot + (key_H * HEAD_STRIDE)[:, None] + feature_D[None, :]
    is_key_H = (key_H >= 0) & (key_H < KV_HEADS)
    tl.store(at_HD, turned_HD, mask=is_key_H[:, None] & is_feature_D[None, :])
    value_H = key_H - KV_HEADS
    at_HD = values + at_slot + (value_H * HEAD_STRIDE)[:, None] + feature_D[None, :]
    is_value_H = (value_H >= 0) & (value_H < KV_HEADS)
    tl.store(at_HD, x_HD, mask=is_value_H[:, None] & is_feature_D[None, :])


@triton.jit
def _silu_mul(gate_up, out, width, F: tl.constexpr, PDL: tl.constexpr):
    """Program (token, tile of features)."""
    announce(PDL)
    await_earlier(PDL)
    token = tl.program_id(0).to(tl.int64)
    feature_F = tl.program_id(1) * F + tl.arange(0, F)
    mask_F = feature_F < width
    gate_F = tl.load(gate_up + token * 2 * width + feature_F, mask=mask_F, other=0.0).to(tl.float32)
    up_F = tl.load(gate_up + token * 2 * width + width + feature_F, mask=mask_F, other=0.0).to(tl.float32)
    product_F = _silu(gate_F) * up_F
    tl.store(out + token * width + feature_F, product_F.to(out.dtype.element_ty), mask=mask_F)
