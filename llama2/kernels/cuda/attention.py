"""Owns attention over the paged cache on a GPU, as Triton kernels: one for rows that decode, one for rows of prompts.

Both read keys and values where they lie, through the block tables. The query heads that share a key head are rows of
one tile, so that a key is read once for all of them. Of the sequences they are given, one kernel takes those with one
row in the pass and the other those with more, so that a recorded pass can hand all to both.

A context is cut into pieces of SPLIT positions, always at the same places (FlashDecoding with pieces of fixed length):
a row's bits depend on its own sequence alone, whoever runs beside it.

Shape suffixes in the kernels: M rows of a tile, L positions of a tile, D features, P pieces of a context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama2.kernels.cuda.launch import announce, await_earlier, cache_strides, launch_options

# Positions of one piece. Short enough that one sequence alone keeps every multiprocessor busy.
SPLIT = 256
# Programs that the decoding kernel starts at least, where there are as many pieces: several per multiprocessor.
MIN_PROGRAMS = 1024
# Pieces that are put together at a time.
PIECES = 16
LOG2_E = 1.4426950408889634


def attend_single(
    q_THD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables_SN: torch.Tensor,
    contexts_S: torch.Tensor,
    query_starts_S1: torch.Tensor,
    arrived: torch.Tensor,
    out_THD: torch.Tensor,
    *,
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
    sequences, group = len(contexts_S), heads // kv_heads
    pieces = triton.cdiv(tables_SN.shape[1] * block_size, SPLIT)
    sums = torch.empty(sequences, heads, pieces, head_dim, dtype=torch.float32, device=q_THD.device)
    shares = torch.empty(sequences, heads, pieces, 2, dtype=torch.float32, device=q_THD.device)
    assert arrived.numel() >= sequences * kv_heads
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    sizes = {"h": kv_heads, "s": sequences, "l": min(pieces, triton.cdiv(MIN_PROGRAMS, sequences * kv_heads))}
    _attend_pieces[tuple(sizes[axis] for axis in axes)](
        q_THD,
        keys,
        values,
        tables_SN,
        contexts_S,
        query_starts_S1,
        sums,
        shares,
        arrived,
        out_THD,
        head_dim**-0.5 * LOG2_E,
        tables_SN.stride(0),
        pieces,
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
        **{"L": _positions_per_tile(padded_dim, keys.dtype), "num_warps": 4, "num_stages": 5, **launch},
        **launch_options(pdl),
    )


def attend_ragged(
    q_THD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables_SN: torch.Tensor,
    contexts_S: torch.Tensor,
    query_starts_S1: torch.Tensor,
    first_row: int,
    out_THD: torch.Tensor,
    *,
    wgmma: bool = False,
    pdl: bool = False,
    **launch: int,
) -> None:
    """Causal attention of those of S sequences that have several rows in the pass, into their rows of `out_THD`.

    No row before `first_row` is theirs. `launch` is for benchmarks: the parts of `prompt_tiles` that shall differ.
    """
    tokens, heads, head_dim = q_THD.shape
    block_size, kv_heads = keys.shape[1:3]
    sequences, group = len(contexts_S), heads // kv_heads
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    shape = {**prompt_tiles(padded_dim, group, keys.dtype, wgmma), **launch}
    tile = shape["M"] // group
    _attend_prompts[((tokens - first_row) // tile + sequences, kv_heads)](
        q_THD,
        keys,
        values,
        tables_SN,
        contexts_S,
        query_starts_S1,
        out_THD,
        head_dim**-0.5 * LOG2_E,
        tables_SN.stride(0),
        first_row,
        sequences,
        KV_HEADS=kv_heads,
        GROUP=group,
        TILE=tile,
        D=head_dim,
        PADDED_D=padded_dim,
        BLOCK_SIZE=block_size,
        **cache_strides(keys, values),
        **shape,
        **launch_options(pdl),
    )


def prompt_tiles(padded_dim: int, group: int, dtype: torch.dtype, wgmma: bool) -> dict[str, int]:
    """M rows by L positions. Two programs share a multiprocessor: one multiplies while the other takes exponentials.

    `wgmma` multiplies from shared memory; without it the operands take registers, which then suffice for 32 positions.
    """
    rows, positions = max(64, triton.next_power_of_2(group)), _positions_per_tile(padded_dim, dtype)
    return {"M": rows, "L": positions if wgmma else min(32, positions), "num_warps": 4, "num_stages": 3}


def _positions_per_tile(padded_dim: int, dtype: torch.dtype) -> int:
    """As many as leave two tiles of keys and of values, and one of queries, room in 99 KB of shared memory."""
    return 64 if padded_dim * dtype.itemsize <= 256 else 16 if padded_dim * dtype.itemsize > 512 else 32


@triton.jit
def _attend_tile(
    sum_MD,
    weight_M,
    top_M,
    q_MD,
    last_M,
    keys,
    values,
    table,
    start,
    end,
    scale,
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
    of 2: `scale` says so. Without MASKED every row sees all of them.
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
    score_ML = tl.dot(q_MD, tl.trans(k_LD), input_precision="ieee")
    if MASKED:
        score_ML = tl.where(position_L[None, :] <= last_M[:, None], score_ML, float("-inf"))
    new_top_M = tl.maximum(top_M, tl.max(score_ML, 1) * scale)
    base_M = new_top_M
    if MASKED:  # a row that has seen nothing yet: -inf less -inf would be NaN
        base_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
    p_ML = tl.exp2(score_ML * scale - base_M[:, None])
    decay_M = tl.exp2(top_M - base_M)
    weight_M = weight_M * decay_M + tl.sum(p_ML, 1)
    sum_MD = sum_MD * decay_M[:, None] + tl.dot(p_ML.to(v_LD.dtype), v_LD, input_precision="ieee")
    return sum_MD, weight_M, new_top_M


@triton.jit(
    do_not_specialize=["table_stride", "pieces"],
    do_not_specialize_on_alignment=["tables", "contexts", "query_starts"],
)
def _attend_pieces(
    q,
    keys,
    values,
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
    head, kv_heads = tl.program_id(H_AXIS), tl.num_programs(H_AXIS)
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
    all_heads = kv_heads * GROUP
    mask_MD = (row_M < GROUP)[:, None] & (feature_D < D)[None, :]
    at_MD = (token * all_heads + first_head + row_M)[:, None] * D + feature_D[None, :]
    q_MD = tl.load(q + at_MD, mask=mask_MD, other=0.0)
    last_M = tl.full((M,), 0, tl.int32) + context - 1
    partial_M = (sequence * all_heads + first_head + row_M) * pieces
    keys += head * HEAD_STRIDE
    values += head * HEAD_STRIDE
    table = tables + sequence * table_stride
    for piece in range(lane, count, lanes):
        top_M = tl.full((M,), float("-inf"), tl.float32)
        weight_M = tl.zeros((M,), tl.float32)
        sum_MD = tl.zeros((M, PADDED_D), tl.float32)
        end = tl.minimum(piece * SPLIT + SPLIT, context)
        for start in range(piece * SPLIT, end, L):
            sum_MD, weight_M, top_M = _attend_tile(
                sum_MD, weight_M, top_M, q_MD, last_M, keys, values, table, start, end, scale,
                D, PADDED_D, BLOCK_SIZE, BLOCK_STRIDE, POSITION_STRIDE, L, True,
            )  # fmt: skip
        if count == 1:
            tl.store(out + at_MD, (sum_MD / weight_M[:, None]).to(out.dtype.element_ty), mask=mask_MD)
        else:
            at_M = partial_M + piece
            tl.store(sums + at_M[:, None] * D + feature_D[None, :], sum_MD, mask=mask_MD)
            tl.store(shares + 2 * at_M, weight_M, mask=row_M < GROUP)
            tl.store(shares + 2 * at_M + 1, top_M, mask=row_M < GROUP)
    if count > 1:
        counter = arrived + sequence * kv_heads + head
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
    BLOCK_STRIDE: tl.constexpr,
    POSITION_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    L: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (tile, key head): TILE neighbouring tokens of one sequence. Late tiles, which see most, start first.

    Sequence s has the tiles from (its first row - first_row) // TILE + s on: room for all, at most one idle for each.
    """
    announce(PDL)
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
    await_earlier(PDL)
    if (first_token >= stop) | (stop - start < 2):
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
    table = tables + tl.cast(sequence, tl.int64) * table_stride
    # All rows see the positions up to that of the first: only the tiles beyond need a mask.
    seen_by_all = (first_token + earlier + 1) // L * L
    end = tl.minimum(first_token + TILE, stop) + earlier
    keys += head * HEAD_STRIDE
    values += head * HEAD_STRIDE
    top_M = tl.full((M,), float("-inf"), tl.float32)
    weight_M = tl.zeros((M,), tl.float32)
    sum_MD = tl.zeros((M, PADDED_D), tl.float32)
    last_M = token_M + earlier
    for position in range(0, seen_by_all, L):
        sum_MD, weight_M, top_M = _attend_tile(
            sum_MD, weight_M, top_M, q_MD, last_M, keys, values, table, position, end, scale,
            D, PADDED_D, BLOCK_SIZE, BLOCK_STRIDE, POSITION_STRIDE, L, False,
        )  # fmt: skip
    for position in range(seen_by_all, end, L):
        sum_MD, weight_M, top_M = _attend_tile(
            sum_MD, weight_M, top_M, q_MD, last_M, keys, values, table, position, end, scale,
            D, PADDED_D, BLOCK_SIZE, BLOCK_STRIDE, POSITION_STRIDE, L, True,
        )  # fmt: skip
    tl.store(out + at_MD, (sum_MD / weight_M[:, None]).to(out.dtype.element_ty), mask=mask_MD)
