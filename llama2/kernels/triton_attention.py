"""Owns attention over the paged cache on a GPU, as Triton kernels: one for rows that decode, one for rows of prompts.

Both read keys and values where they lie, through the block tables. The query heads that share a key head are rows of
one tile, so that a key is read once for all of them.

A context is cut into pieces of SPLIT positions, always at the same places (FlashDecoding with pieces of fixed length):
a row's bits depend on its own sequence alone, whoever runs beside it.

Shape suffixes in the kernels: M rows of a tile, L positions of a tile, D features, P pieces of a context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Positions of one piece. Short enough that one sequence alone keeps every multiprocessor busy.
SPLIT = 256
# Programs that the decoding kernel starts at least, where there are as many pieces: several per multiprocessor.
MIN_PROGRAMS = 1024
# Pieces that are put together at a time.
PIECES = 16


def attend_single(
    q_SHD: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables_SN: torch.Tensor, contexts_S: torch.Tensor
) -> torch.Tensor:
    """Attention of the newest position of each of S sequences; returns (S, H, D). Asks the host for no number."""
    sequences, heads, head_dim = q_SHD.shape
    block_size, kv_heads = keys.shape[1:3]
    pieces = triton.cdiv(tables_SN.shape[1] * block_size, SPLIT)
    sums = torch.empty(sequences, heads, pieces, head_dim, dtype=torch.float32, device=q_SHD.device)
    shares = torch.empty(sequences, heads, pieces, 2, dtype=torch.float32, device=q_SHD.device)
    out_SHD = torch.empty_like(q_SHD)
    lanes = min(pieces, triton.cdiv(MIN_PROGRAMS, sequences * kv_heads))
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    group = heads // kv_heads
    _attend_pieces[(sequences, kv_heads, lanes)](
        q_SHD,
        keys,
        values,
        tables_SN,
        contexts_S,
        sums,
        shares,
        head_dim**-0.5,
        tables_SN.stride(0),
        pieces,
        KV_HEADS=kv_heads,
        GROUP=group,
        M=max(16, triton.next_power_of_2(group)),
        D=head_dim,
        PADDED_D=padded_dim,
        BLOCK_SIZE=block_size,
        SPLIT=SPLIT,
        L=_positions_per_tile(padded_dim, keys.dtype),
        num_warps=4,
        num_stages=5,
    )
    _join_pieces[(sequences, heads)](
        sums,
        shares,
        contexts_S,
        out_SHD,
        pieces,
        D=head_dim,
        PADDED_D=padded_dim,
        SPLIT=SPLIT,
        P=PIECES,
        num_warps=4,
    )
    return out_SHD


def attend_ragged(
    q_THD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables_SN: torch.Tensor,
    contexts_S: torch.Tensor,
    query_starts_S1: torch.Tensor,
    first_row: int,
    out_THD: torch.Tensor,
) -> None:
    """Causal attention of the rows from `first_row` on, which are those of the S sequences, into the same rows."""
    tokens, heads, head_dim = q_THD.shape
    block_size, kv_heads = keys.shape[1:3]
    sequences, group = len(contexts_S), heads // kv_heads
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    rows = max(128 if keys.dtype.itemsize == 2 else 64, triton.next_power_of_2(group))
    tile = rows // group
    _attend_prompts[((tokens - first_row) // tile + sequences, kv_heads)](
        q_THD,
        keys,
        values,
        tables_SN,
        contexts_S,
        query_starts_S1,
        out_THD,
        head_dim**-0.5,
        tables_SN.stride(0),
        first_row,
        sequences,
        KV_HEADS=kv_heads,
        GROUP=group,
        TILE=tile,
        M=rows,
        D=head_dim,
        PADDED_D=padded_dim,
        BLOCK_SIZE=block_size,
        L=_positions_per_tile(padded_dim, keys.dtype),
        num_warps=8,
        num_stages=3,
    )


def _positions_per_tile(padded_dim: int, dtype: torch.dtype) -> int:
    """As many as leave two tiles of keys and of values, and one of queries, room in 99 KB of shared memory."""
    return 64 if padded_dim * dtype.itemsize <= 256 else 16 if padded_dim * dtype.itemsize > 512 else 32


@triton.jit
def _attend(
    q_MD,
    last_M,
    keys,
    values,
    table,
    head,
    first,
    end,
    scale,
    KV_HEADS: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    L: tl.constexpr,
):
    """Softmax over positions [first, end), of which row m sees those up to last_M[m]: (weighted values, their weight,
    the largest score), the first two relative to the third, which is in powers of 2."""
    feature_D = tl.arange(0, PADDED_D)
    top_M = tl.full((M,), float("-inf"), tl.float32)
    weight_M = tl.zeros((M,), tl.float32)
    sum_MD = tl.zeros((M, PADDED_D), tl.float32)
    for start in range(first, end, L):
        position_L = start + tl.arange(0, L)
        is_inside_L = position_L < end
        block_L = tl.load(table + position_L // BLOCK_SIZE, mask=is_inside_L, other=0).to(tl.int64)
        slot_L = block_L * BLOCK_SIZE + position_L % BLOCK_SIZE
        at_LD = (slot_L[:, None] * KV_HEADS + head) * D + feature_D[None, :]
        mask_LD = is_inside_L[:, None] & (feature_D < D)[None, :]
        k_LD = tl.load(keys + at_LD, mask=mask_LD, other=0.0)
        score_ML = tl.dot(q_MD, tl.trans(k_LD), input_precision="ieee") * (scale * 1.4426950408889634)
        score_ML = tl.where(position_L[None, :] <= last_M[:, None], score_ML, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(score_ML, 1))
        # A row that has seen nothing yet: -inf less -inf would be NaN.
        base_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
        p_ML = tl.exp2(score_ML - base_M[:, None])
        decay_M = tl.exp2(top_M - base_M)
        weight_M = weight_M * decay_M + tl.sum(p_ML, 1)
        v_LD = tl.load(values + at_LD, mask=mask_LD, other=0.0)
        sum_MD = sum_MD * decay_M[:, None] + tl.dot(p_ML.to(v_LD.dtype), v_LD, input_precision="ieee")
        top_M = new_top_M
    return sum_MD, weight_M, top_M


@triton.jit(do_not_specialize=["table_stride", "pieces"], do_not_specialize_on_alignment=["tables", "contexts"])
def _attend_pieces(
    q,
    keys,
    values,
    tables,
    contexts,
    sums,
    shares,
    scale,
    table_stride,
    pieces,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    L: tl.constexpr,
):
    """Program (sequence, key head, lane): every so-and-so-many-th piece of the context, each by itself."""
    tl.static_assert(SPLIT % L == 0)  # no tile reaches into the next piece
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    context = tl.load(contexts + sequence)
    row_M = tl.arange(0, M)
    feature_D = tl.arange(0, PADDED_D)
    head_M = (sequence * KV_HEADS + head) * GROUP + row_M
    mask_MD = (row_M < GROUP)[:, None] & (feature_D < D)[None, :]
    q_MD = tl.load(q + head_M[:, None] * D + feature_D[None, :], mask=mask_MD, other=0.0)
    last_M = tl.full((M,), 0, tl.int32) + context - 1
    for piece in range(tl.program_id(2), tl.cdiv(context, SPLIT), tl.num_programs(2)):
        sum_MD, weight_M, top_M = _attend(
            q_MD,
            last_M,
            keys,
            values,
            tables + sequence * table_stride,
            head,
            piece * SPLIT,
            tl.minimum(piece * SPLIT + SPLIT, context),
            scale,
            KV_HEADS,
            M,
            D,
            PADDED_D,
            BLOCK_SIZE,
            L,
        )
        at_M = head_M * pieces + piece
        tl.store(sums + at_M[:, None] * D + feature_D[None, :], sum_MD, mask=mask_MD)
        tl.store(shares + 2 * at_M, weight_M, mask=row_M < GROUP)
        tl.store(shares + 2 * at_M + 1, top_M, mask=row_M < GROUP)


@triton.jit(do_not_specialize=["pieces"], do_not_specialize_on_alignment=["contexts"])
def _join_pieces(
    sums,
    shares,
    contexts,
    out,
    pieces,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    SPLIT: tl.constexpr,
    P: tl.constexpr,
):
    """Program (sequence, query head): the pieces' results, weighted by their shares of the whole softmax."""
    sequence = tl.program_id(0).to(tl.int64)
    row = sequence * tl.num_programs(1) + tl.program_id(1)
    count = tl.cdiv(tl.load(contexts + sequence), SPLIT)
    feature_D = tl.arange(0, PADDED_D)
    top = float("-inf")
    weight = 0.0
    sum_D = tl.zeros((PADDED_D,), tl.float32)
    for first in range(0, count, P):
        piece_P = first + tl.arange(0, P)
        at_P = row * pieces + piece_P
        weight_P = tl.load(shares + 2 * at_P, mask=piece_P < count, other=0.0)
        top_P = tl.load(shares + 2 * at_P + 1, mask=piece_P < count, other=float("-inf"))
        mask_PD = (piece_P < count)[:, None] & (feature_D < D)[None, :]
        sum_PD = tl.load(sums + at_P[:, None] * D + feature_D[None, :], mask=mask_PD, other=0.0)
        new_top = tl.maximum(top, tl.max(top_P, 0))
        share_P = tl.exp2(top_P - new_top)
        decay = tl.exp2(top - new_top)
        weight = weight * decay + tl.sum(weight_P * share_P, 0)
        sum_D = sum_D * decay + tl.sum(sum_PD * share_P[:, None], 0)
        top = new_top
    tl.store(out + row * D + feature_D, (sum_D / weight).to(out.dtype.element_ty), mask=feature_D < D)


@triton.jit(
    do_not_specialize=["table_stride", "first_row", "sequences"],
    do_not_specialize_on_alignment=["tables", "contexts", "query_starts"],
)
def _attend_prompts(
    q,
    keys,
    values,
    tables,
    contexts,
    query_starts,
    out,
    scale,
    table_stride,
    first_row,
    sequences,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    L: tl.constexpr,
):
    """Program (tile, key head): TILE neighbouring tokens of one sequence. Late tiles, which see most, start first.

    Sequence s has the tiles from (its first row - first_row) // TILE + s on: room for all, at most one idle for each.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence = 0
    beyond = sequences
    while beyond - sequence > 1:
        middle = (sequence + beyond) // 2
        is_mine = (tl.load(query_starts + middle) - first_row) // TILE + middle <= tile
        sequence = tl.where(is_mine, middle, sequence)
        beyond = tl.where(is_mine, beyond, middle)
    start = tl.load(query_starts + sequence)
    stop = tl.load(query_starts + sequence + 1)
    first_token = start + (tile - (start - first_row) // TILE - sequence) * TILE
    if first_token >= stop:
        return
    context = tl.load(contexts + sequence)
    row_M = tl.arange(0, M)
    feature_D = tl.arange(0, PADDED_D)
    token_M = first_token + row_M // GROUP
    is_row_M = (row_M < TILE * GROUP) & (token_M < stop)
    at_M = ((token_M.to(tl.int64) * KV_HEADS) + head) * GROUP + row_M % GROUP
    at_MD = at_M[:, None] * D + feature_D[None, :]
    mask_MD = is_row_M[:, None] & (feature_D < D)[None, :]
    q_MD = tl.load(q + at_MD, mask=mask_MD, other=0.0)
    earlier = context - stop
    sum_MD, weight_M, _ = _attend(
        q_MD,
        token_M + earlier,
        keys,
        values,
        tables + tl.cast(sequence, tl.int64) * table_stride,
        head,
        0,
        tl.minimum(first_token + TILE, stop) + earlier,
        scale,
        KV_HEADS,
        M,
        D,
        PADDED_D,
        BLOCK_SIZE,
        L,
    )
    tl.store(out + at_MD, (sum_MD / weight_M[:, None]).to(out.dtype.element_ty), mask=mask_MD)
