"""Owns attention over the paged cache for sequences with several rows in the pass, as a Triton kernel.

Keys and values are read where they lie, through the block tables. The query heads that share a key head are rows of one
tile, so that each key is read once for all of them.

Shape suffixes in the kernels: M rows of a tile, L positions of a tile, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama2.kernels.cuda.attention_tile import LOG2_E, attend_tile, positions_per_tile
from llama2.kernels.cuda.launch import announce, await_earlier, cache_strides, cache_tensors, launch_options


def attend_prefill(
    q_THD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables_SN: torch.Tensor,
    seq_lens_S: torch.Tensor,
    query_starts_S1: torch.Tensor,
    first_row: int,
    out_THD: torch.Tensor,
    *,
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    wgmma: bool = False,
    pdl: bool = False,
    **launch: int,
) -> None:
    """Causal attention of those of S sequences that have several rows in the pass, into their rows of `out_THD`.

    No row before `first_row` is theirs. `launch` is for benchmarks: the parts of `prefill_tiles` to override.
    """
    tokens, heads, head_dim = q_THD.shape
    block_size, kv_heads = keys.shape[1:3]
    sequences, group = len(seq_lens_S), heads // kv_heads
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    shape = {**prefill_tiles(padded_dim, group, q_THD.dtype, wgmma), **launch}
    tile = shape["M"] // group
    _attend_prefill[((tokens - first_row) // tile + sequences, kv_heads)](
        q_THD,
        *cache_tensors(keys, values, scales),
        block_tables_SN,
        seq_lens_S,
        query_starts_S1,
        out_THD,
        head_dim**-0.5 * LOG2_E,
        block_tables_SN.stride(0),
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


def prefill_tiles(padded_dim: int, group: int, dtype: torch.dtype, wgmma: bool) -> dict[str, int]:
    """M rows by L positions. Two programs share a multiprocessor: one multiplies while the other takes exponentials.

    `wgmma` multiplies from shared memory; without it the operands take registers, which then suffice for 32 positions.
    """
    rows, positions = max(64, triton.next_power_of_2(group)), positions_per_tile(padded_dim, dtype)
    return {"M": rows, "L": positions if wgmma else min(32, positions), "num_warps": 4, "num_stages": 3}


@triton.jit(
    do_not_specialize=["table_stride", "first_row", "sequences"],
    do_not_specialize_on_alignment=["tables", "contexts", "query_starts"],
)
def _attend_prefill(
    q,
    keys,
    values,
    key_scales,
    value_scales,
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
    key_scales += head
    value_scales += head
    top_M = tl.full((M,), float("-inf"), tl.float32)
    weight_M = tl.zeros((M,), tl.float32)
    sum_MD = tl.zeros((M, PADDED_D), tl.float32)
    last_M = token_M + earlier
    for position in range(0, seen_by_all, L):
        sum_MD, weight_M, top_M = attend_tile(
            sum_MD, weight_M, top_M, q_MD, last_M, keys, values, key_scales, value_scales, table, position, end, scale,
            KV_HEADS, D, PADDED_D, BLOCK_SIZE, BLOCK_STRIDE, POSITION_STRIDE, L, False,
        )  # fmt: skip
    for position in range(seen_by_all, end, L):
        sum_MD, weight_M, top_M = attend_tile(
            sum_MD, weight_M, top_M, q_MD, last_M, keys, values, key_scales, value_scales, table, position, end, scale,
            KV_HEADS, D, PADDED_D, BLOCK_SIZE, BLOCK_STRIDE, POSITION_STRIDE, L, True,
        )  # fmt: skip
    tl.store(out + at_MD, (sum_MD / weight_M[:, None]).to(out.dtype.element_ty), mask=mask_MD)
