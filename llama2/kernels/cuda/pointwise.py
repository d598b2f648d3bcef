"""Owns the steps between the matrix products on a GPU, as Triton kernels.

Each is one launch where PyTorch has several: at a small batch the time of a step is that of its launches and of the
weights' way through memory. Each row is computed by itself: its bits do not depend on the others. Shape suffixes as in
llama2/model.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama2.kernels.cuda.cache_codes import encode
from llama2.kernels.cuda.launch import announce, await_earlier, cache_strides, cache_tensors, launch_options

# Heads that one program rotates.
HEADS = 8


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
    slot_mapping_T: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    pdl: bool = False,
) -> torch.Tensor:
    """Rotated queries (T, H, D); rotated keys, and values, go into their slots, as codes where these have scales."""
    tokens, (block_size, kv_heads, head_dim) = len(qkv_TX), keys.shape[1:]
    heads = qkv_TX.shape[1] // head_dim - 2 * kv_heads
    q_THD = qkv_TX.new_empty(tokens, heads, head_dim)
    _rotate_and_store[(tokens, triton.cdiv(heads + 2 * kv_heads, HEADS))](
        qkv_TX,
        rope_TD2,
        slot_mapping_T,
        *cache_tensors(keys, values, scales),
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
def silu(x):
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
    key_scales,
    value_scales,
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
    key_H = head_H - QUERY_HEADS
    _store(
        keys, key_scales, turned_HD, slot, key_H, KV_HEADS, D, PADDED_D, BLOCK_SIZE, BLOCK_STRIDE, POSITION_STRIDE,
        HEAD_STRIDE,
    )  # fmt: skip
    _store(
        values, value_scales, x_HD, slot, key_H - KV_HEADS, KV_HEADS, D, PADDED_D, BLOCK_SIZE, BLOCK_STRIDE,
        POSITION_STRIDE, HEAD_STRIDE,
    )  # fmt: skip


@triton.jit
def _store(
    cache,
    scales,
    x_HD,
    slot,
    head_H,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
):
    """Those of the heads that there are, into a slot."""
    feature_D = tl.arange(0, PADDED_D)
    is_head_H = (head_H >= 0) & (head_H < KV_HEADS)
    at_slot = (slot // BLOCK_SIZE) * BLOCK_STRIDE + (slot % BLOCK_SIZE) * POSITION_STRIDE
    at_HD = cache + at_slot + (head_H * HEAD_STRIDE)[:, None] + feature_D[None, :]
    if cache.dtype.element_ty.primitive_bitwidth == 8:
        x_HD, scale_H = encode(x_HD, cache.dtype.element_ty)
        tl.store(scales + slot * KV_HEADS + head_H, scale_H, mask=is_head_H)
    tl.store(at_HD, x_HD, mask=is_head_H[:, None] & (feature_D < D)[None, :])


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
    product_F = silu(gate_F) * up_F
    tl.store(out + token * width + feature_F, product_F.to(out.dtype.element_ty), mask=mask_F)
