"""Owns attention over the paged cache for sequences with one row in the pass, as a Triton kernel.

Keys and values are read where they lie, through the block tables. The query heads that share a key head are rows of one
tile, so that each key is read once for all of them.

A context is cut into pieces of SPLIT positions, always at the same places (FlashDecoding with pieces of fixed length):
a row's bits depend on its own sequence alone, not on its batch.

Shape suffixes in the kernels: M rows of a tile, L positions of a tile, D features, P pieces of a context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama2.kernels.cuda.attention_tile import LOG2_E, attend_tile, positions_per_tile
from llama2.kernels.cuda.launch import announce, await_earlier, cache_strides, cache_tensors, launch_options

# Positions of one piece. Short enough that one sequence alone keeps every multiprocessor busy.
SPLIT = 256
# The least number of programs of a launch, where there are as many pieces: several per multiprocessor.
MIN_PROGRAMS = 1024
# Pieces that are joined at a time.
PIECES = 16


def attend_decode(
    q_THD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables_SN: torch.Tensor,
    seq_lens_S: torch.Tensor,
    query_starts_S1: torch.Tensor,
    arrived: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    pdl: bool = False,
    axes: str = "hsl",
    **launch: int,
) -> None:
    """Attention of those of S sequences that have one row in the pass, into that row. Asks the host for no number.

    `arrived` are at least S * K zeros, int32, which count the programs that are done and are zeros again afterwards.
    `axes` are those of the grid from the fastest on: key heads, sequences, and lanes, which share the pieces of one of
    each. Heads first: programs that run at the same time read neighbouring heads, and so whole rows, of the cache.
    `launch` is for benchmarks: L positions of a tile, num_stages, num_warps.
    """
    heads, head_dim = q_THD.shape[1:]
    block_size, kv_heads = keys.shape[1:3]
    sequences, group = len(seq_lens_S), heads // kv_heads
    pieces = triton.cdiv(block_tables_SN.shape[1] * block_size, SPLIT)
    sums = torch.empty(sequences, heads, pieces, head_dim, dtype=torch.float32, device=q_THD.device)
    shares = torch.empty(sequences, heads, pieces, 2, dtype=torch.float32, device=q_THD.device)
    assert arrived.numel() >= sequences * kv_heads
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    sizes = {"h": kv_heads, "s": sequences, "l": min(pieces, triton.cdiv(MIN_PROGRAMS, sequences * kv_heads))}
    _attend_pieces[tuple(sizes[axis] for axis in axes)](
        q_THD,
        *cache_tensors(keys, values, scales),
        block_tables_SN,
        seq_lens_S,
        query_starts_S1,
        sums,
        shares,
        arrived,
        out_THD,
        head_dim**-0.5 * LOG2_E,
        block_tables_SN.stride(0),
        pieces,
        KV_HEADS=kv_heads,
        GROUP=group,
        M=max(16, triton.next_power_of_2(group)),
        D=head_dim,
        PADDED_D=padded_dim,
        BLOCK_SIZE=block_size,
        **cache_strides(keys, values),
        SPLIT=SPLIT,
        P=PIECES,
        H_AXIS=axes.index("h"),
        S_AXIS=axes.index("s"),
        L_AXIS=axes.index("l"),
        **{"L": positions_per_tile(padded_dim, q_THD.dtype), "num_warps": 4, "num_stages": 5, **launch},
        **launch_options(pdl),
    )


@triton.jit(
    do_not_specialize=["table_stride", "pieces"],
    do_not_specialize_on_alignment=["tables", "contexts", "query_starts"],
)
def _attend_pieces(
    q,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    contexts,
    query_starts,
    sums,
    shares,
    arrived,
    out,
    scale,
    table_stride,
    pieces,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    SPLIT: tl.constexpr,
    P: tl.constexpr,
    H_AXIS: tl.constexpr,
    S_AXIS: tl.constexpr,
    L_AXIS: tl.constexpr,
    L: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (key head, sequence, lane): every so-and-so-many-th piece of the context, each by itself.

    The last program of a sequence and key head to be done puts the pieces together, always in the same order.
    """
    tl.static_assert(SPLIT % L == 0)  # no tile reaches into the next piece
    announce(PDL)
    head = tl.program_id(H_AXIS)
    sequence = tl.program_id(S_AXIS).to(tl.int64)
    lane, lanes = tl.program_id(L_AXIS), tl.num_programs(L_AXIS)
    token = tl.load(query_starts + sequence).to(tl.int64)
    rows = tl.load(query_starts + sequence + 1) - token
    context = tl.load(contexts + sequence)
    count = tl.cdiv(context, SPLIT)
    await_earlier(PDL)
    if (rows != 1) | (lane >= count):
        return
    row_M = tl.arange(0, M)
    feature_D = tl.arange(0, PADDED_D)
    first_head = head * GROUP
    all_heads = KV_HEADS * GROUP
    mask_MD = (row_M < GROUP)[:, None] & (feature_D < D)[None, :]
    at_MD = (token * all_heads + first_head + row_M)[:, None] * D + feature_D[None, :]
    q_MD = tl.load(q + at_MD, mask=mask_MD, other=0.0)
    last_M = tl.full((M,), 0, tl.int32) + context - 1
    partial_M = (sequence * all_heads + first_head + row_M) * pieces
    keys += head * HEAD_STRIDE
    values += head * HEAD_STRIDE
    key_scales += head
    value_scales += head
    table = tables + sequence * table_stride
    for piece in range(lane, count, lanes):
        top_M = tl.full((M,), float("-inf"), tl.float32)
        weight_M = tl.zeros((M,), tl.float32)
        sum_MD = tl.zeros((M, PADDED_D), tl.float32)
        end = tl.minimum(piece * SPLIT + SPLIT, context)
        for start in range(piece * SPLIT, end, L):
            sum_MD, weight_M, top_M = attend_tile(
                sum_MD, weight_M, top_M, q_MD, last_M, keys, values, key_scales, value_scales, table, start, end, scale,
                KV_HEADS, D, PADDED_D, BLOCK_SIZE, BLOCK_STRIDE, POSITION_STRIDE, L, True,
            )  # fmt: skip
        if count == 1:
            tl.store(out + at_MD, (sum_MD / weight_M[:, None]).to(out.dtype.element_ty), mask=mask_MD)
        else:
            at_M = partial_M + piece
            tl.store(sums + at_M[:, None] * D + feature_D[None, :], sum_MD, mask=mask_MD)
            tl.store(shares + 2 * at_M, weight_M, mask=row_M < GROUP)
            tl.store(shares + 2 * at_M + 1, top_M, mask=row_M < GROUP)
    if count > 1:
        counter = arrived + sequence * KV_HEADS + head
        tl.debug_barrier()  # all threads' stores come before the one thread's count
        if tl.atomic_add(counter, 1, sem="acq_rel") == tl.minimum(count, lanes) - 1:
            tl.store(counter, 0)
            for member in tl.static_range(GROUP):
                row = (sequence * all_heads + first_head + member) * pieces
                joined_D = _join(sums + row * D, shares + 2 * row, count, D, PADDED_D, P)
                at_D = (token * all_heads + first_head + member) * D + feature_D
                tl.store(out + at_D, joined_D.to(out.dtype.element_ty), mask=feature_D < D)


@triton.jit
def _join(sums, shares, count, D: tl.constexpr, PADDED_D: tl.constexpr, P: tl.constexpr):
    """One head's pieces, weighted by their shares of the whole softmax. Read past the first-level cache, which need not
    see what other multiprocessors wrote."""
    feature_D = tl.arange(0, PADDED_D)
    top = float("-inf")
    weight = 0.0
    sum_D = tl.zeros((PADDED_D,), tl.float32)
    for first in range(0, count, P):
        piece_P = first + tl.arange(0, P)
        is_piece_P = piece_P < count
        weight_P = tl.load(shares + 2 * piece_P, mask=is_piece_P, other=0.0, cache_modifier=".cg")
        top_P = tl.load(shares + 2 * piece_P + 1, mask=is_piece_P, other=float("-inf"), cache_modifier=".cg")
        mask_PD = is_piece_P[:, None] & (feature_D < D)[None, :]
        at_PD = piece_P[:, None] * D + feature_D[None, :]
        sum_PD = tl.load(sums + at_PD, mask=mask_PD, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(top_P, 0))
        share_P = tl.exp2(top_P - new_top)
        decay = tl.exp2(top - new_top)
        weight = weight * decay + tl.sum(weight_P * share_P, 0)
        sum_D = sum_D * decay + tl.sum(sum_PD * share_P[:, None], 0)
        top = new_top
    return sum_D / weight
