"""Owns the steps between the matrix products on a GPU, and products with few rows, as Triton kernels.

Each is one launch where PyTorch has several: at a small batch the time of a step is that of its launches and of the
weights' way through memory. Every row is computed by itself: its bits do not depend on the others.

Shape suffixes as in llama2/model.py; in the kernels N are features of a tile, K its inputs, R rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Heads that one program rotates.
HEADS = 8
# Output features, and inputs at a time, of one program of `linear`.
FEATURES, INPUTS = 4, 1024


def linear(x_RC: torch.Tensor, weight_FC: torch.Tensor) -> torch.Tensor:
    """x times the transposed weight, (R, F), at the rate of the weight's way through memory; for very few rows."""
    rows, inputs = x_RC.shape
    features = weight_FC.shape[0]
    out_RF = x_RC.new_empty(rows, features)
    _linear[(triton.cdiv(features, FEATURES),)](
        x_RC, weight_FC, out_RF, features, R=rows, C=inputs, N=FEATURES, K=INPUTS, num_warps=4
    )
    return out_RF


def add_rms_norm(
    x_TC: torch.Tensor, branch_TC: torch.Tensor | None, weight_C: torch.Tensor, eps: float
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
        )
    return out_TC


def rotate_and_store(
    qkv_TX: torch.Tensor, rope_TD2: torch.Tensor, slots_T: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Rotated queries (T, H, D); rotated keys, and values, go into their slots."""
    tokens, kv_heads, head_dim = len(qkv_TX), *keys.shape[2:]
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
        num_warps=4,
    )
    return q_THD


def silu_mul(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    tokens, width = gate_up_T2F.shape
    out_TF = gate_up_T2F.new_empty(tokens, width // 2)
    _silu_mul[(tokens, triton.cdiv(width // 2, 1024))](gate_up_T2F, out_TF, width // 2, F=1024, num_warps=4)
    return out_TF


@triton.jit
def _linear(x, weight, out, features, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Program (tile of features): products are summed where they arise, and across the inputs only at the end."""
    feature_N = tl.program_id(0) * N + tl.arange(0, N)
    row_R = tl.arange(0, R)
    sum_RNK = tl.zeros((R, N, K), tl.float32)
    # Unrolled, so that the loads of later inputs do not wait for earlier sums.
    for start in tl.static_range(0, C, K):
        input_K = start + tl.arange(0, K)
        mask_NK = (feature_N < features)[:, None] & (input_K < C)[None, :]
        w_NK = tl.load(weight + feature_N.to(tl.int64)[:, None] * C + input_K[None, :], mask=mask_NK, other=0.0)
        x_RK = tl.load(x + row_R[:, None] * C + input_K[None, :], mask=(input_K < C)[None, :], other=0.0)
        sum_RNK += x_RK.to(tl.float32)[:, None, :] * w_NK.to(tl.float32)[None, :, :]
    at_RN = out + row_R[:, None] * features + feature_N[None, :]
    tl.store(at_RN, tl.sum(sum_RNK, 2).to(out.dtype.element_ty), mask=(feature_N < features)[None, :])


@triton.jit
def _add_rms_norm(x, branch, weight, out, eps, HAS_BRANCH: tl.constexpr, C: tl.constexpr, PADDED_C: tl.constexpr):
    """Program (row). The sum is rounded to the dtype before it is normalized: it is what travels on."""
    column_C = tl.arange(0, PADDED_C)
    at_C = tl.program_id(0).to(tl.int64) * C + column_C
    mask_C = column_C < C
    x_C = tl.load(x + at_C, mask=mask_C, other=0.0)
    if HAS_BRANCH:
        branch_C = tl.load(branch + at_C, mask=mask_C, other=0.0)
        x_C = (x_C.to(tl.float32) + branch_C.to(tl.float32)).to(x_C.dtype)
        tl.store(x + at_C, x_C, mask=mask_C)
    x_C = x_C.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x_C * x_C, 0) / C + eps)
    weight_C = tl.load(weight + column_C, mask=mask_C, other=0.0).to(tl.float32)
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
):
    """Program (token, some of its heads): queries, then keys, then values, as they lie in a row of `qkv`."""
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
    key_H = head_H - QUERY_HEADS
    at_HD = keys + (slot * KV_HEADS + key_H[:, None]) * D + feature_D[None, :]
    is_key_H = (key_H >= 0) & (key_H < KV_HEADS)
    tl.store(at_HD, turned_HD, mask=is_key_H[:, None] & is_feature_D[None, :])
    value_H = key_H - KV_HEADS
    at_HD = values + (slot * KV_HEADS + value_H[:, None]) * D + feature_D[None, :]
    is_value_H = (value_H >= 0) & (value_H < KV_HEADS)
    tl.store(at_HD, x_HD, mask=is_value_H[:, None] & is_feature_D[None, :])


@triton.jit
def _silu_mul(gate_up, out, width, F: tl.constexpr):
    """Program (token, tile of features)."""
    token = tl.program_id(0).to(tl.int64)
    feature_F = tl.program_id(1) * F + tl.arange(0, F)
    mask_F = feature_F < width
    gate_F = tl.load(gate_up + token * 2 * width + feature_F, mask=mask_F, other=0.0).to(tl.float32)
    up_F = tl.load(gate_up + token * 2 * width + width + feature_F, mask=mask_F, other=0.0).to(tl.float32)
    product_F = gate_F / (1.0 + tl.exp(-gate_F)) * up_F
    tl.store(out + token * width + feature_F, product_F.to(out.dtype.element_ty), mask=mask_F)
