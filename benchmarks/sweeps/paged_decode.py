"""Decoding attention over a paged cache with everything open that the engine's kernel has decided: for comparing only.

The kernel is that of llama2/kernels/triton_attention.py up to the sums of each piece of a context, which are a small
share of its time; there, one order of programs and one layout of the cache are left. Letters as there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLIT = 256
# The axes of the launch grid from the fastest on: s sequence, h key head, p piece of the context.
ORDERS = ("shp", "sph", "hsp", "hps", "psh", "phs")


def attend_pieces(
    q_SHD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables_SN: torch.Tensor,
    contexts_S: torch.Tensor,
    *,
    order: str,
    heads_first: bool,
    positions: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    """Sums of each piece (S, H, pieces, D), relative to its largest score, undivided; one program for each piece.

    Args:
        order: one of `ORDERS`.
        heads_first: blocks are (heads, positions, D), and not (positions, heads, D) as the engine's are.
        positions: of one tile.
    """
    sequences, heads, head_dim = q_SHD.shape
    block_size, kv_heads = (keys.shape[2], keys.shape[1]) if heads_first else keys.shape[1:3]
    pieces = triton.cdiv(tables_SN.shape[1] * block_size, SPLIT)
    sums = torch.zeros(sequences, heads, pieces, head_dim, dtype=torch.float32, device=q_SHD.device)
    sizes = {"s": sequences, "h": kv_heads, "p": pieces}
    group = heads // kv_heads
    _attend_pieces[tuple(sizes[axis] for axis in order)](
        q_SHD,
        keys,
        values,
        tables_SN,
        contexts_S,
        sums,
        head_dim**-0.5,
        tables_SN.stride(0),
        pieces,
        S_AXIS=order.index("s"),
        H_AXIS=order.index("h"),
        P_AXIS=order.index("p"),
        HEADS_FIRST=heads_first,
        KV_HEADS=kv_heads,
        GROUP=group,
        M=max(16, triton.next_power_of_2(group)),
        D=head_dim,
        PADDED_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_SIZE=block_size,
        SPLIT=SPLIT,
        L=positions,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return sums


@triton.jit(do_not_specialize=["table_stride", "pieces"], do_not_specialize_on_alignment=["tables", "contexts"])
def _attend_pieces(
    q,
    keys,
    values,
    tables,
    contexts,
    sums,
    scale,
    table_stride,
    pieces,
    S_AXIS: tl.constexpr,
    H_AXIS: tl.constexpr,
    P_AXIS: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    L: tl.constexpr,
):
    """Program (sequence, key head, piece), on whichever axis each is."""
    sequence = tl.program_id(S_AXIS).to(tl.int64)
    head = tl.program_id(H_AXIS)
    piece = tl.program_id(P_AXIS)
    context = tl.load(contexts + sequence)
    first = piece * SPLIT
    end = tl.minimum(first + SPLIT, context)
    if first >= end:
        return
    row_M = tl.arange(0, M)
    feature_D = tl.arange(0, PADDED_D)
    head_M = (sequence * KV_HEADS + head) * GROUP + row_M
    mask_MD = (row_M < GROUP)[:, None] & (feature_D < D)[None, :]
    q_MD = tl.load(q + head_M[:, None] * D + feature_D[None, :], mask=mask_MD, other=0.0)
    top_M = tl.full((M,), float("-inf"), tl.float32)
    sum_MD = tl.zeros((M, PADDED_D), tl.float32)
    for start in range(first, end, L):
        position_L = start + tl.arange(0, L)
        is_inside_L = position_L < end
        block_L = tl.load(tables + sequence * table_stride + position_L // BLOCK_SIZE, mask=is_inside_L, other=0).to(
            tl.int64
        )
        if HEADS_FIRST:
            row_L = (block_L * KV_HEADS + head) * BLOCK_SIZE + position_L % BLOCK_SIZE
        else:
            row_L = (block_L * BLOCK_SIZE + position_L % BLOCK_SIZE) * KV_HEADS + head
        at_LD = row_L[:, None] * D + feature_D[None, :]
        mask_LD = is_inside_L[:, None] & (feature_D < D)[None, :]
        k_LD = tl.load(keys + at_LD, mask=mask_LD, other=0.0)
        score_ML = tl.dot(q_MD, tl.trans(k_LD), input_precision="ieee") * (scale * 1.4426950408889634)
        score_ML = tl.where(is_inside_L[None, :], score_ML, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(score_ML, 1))
        p_ML = tl.exp2(score_ML - new_top_M[:, None])
        v_LD = tl.load(values + at_LD, mask=mask_LD, other=0.0)
        sum_MD = sum_MD * tl.exp2(top_M - new_top_M)[:, None] + tl.dot(
            p_ML.to(v_LD.dtype), v_LD, input_precision="ieee"
        )
        top_M = new_top_M
    at_M = head_M * pieces + piece
    tl.store(sums + at_M[:, None] * D + feature_D[None, :], sum_MD, mask=mask_MD)
