"""Tries attention: of rows that decode, by the order of programs, tiles and the cache's layout; of prompts, by tiles.

Decoding moves keys and values once; prompts are counted by their operations, half of T² each as they are causal.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional

from benchmarks.sweeps.bench import Bench, Calls
from llama2.config import ModelArgs

BLOCK_SIZE = 16
# Sequences and their context.
DECODING = ((1, 128), (1, 1024), (1, 4096), (8, 1024), (64, 1024))
PROMPTS = ((1, 512), (1, 2048), (4, 512))
# The variants are tried on these.
VARIED_DECODING, VARIED_PROMPTS = ((1, 4096), (8, 1024), (64, 1024)), ((1, 2048),)
DECODING_BASE: dict[str, Any] = {
    "order": "shp", "heads_first": False, "positions": 64, "num_warps": 4, "num_stages": 5
}  # fmt: skip
# What `attend_pieces` is given in place of the base.
DECODING_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"order": "hsp"},
    {"order": "hps"},
    {"order": "psh"},
    {"heads_first": True},
    {"heads_first": True, "order": "phs"},
    {"num_stages": 3},
    {"num_stages": 2},
    {"positions": 32},
    {"positions": 128, "num_stages": 3},
    {"positions": 16},
    {"num_warps": 2},
    {"num_warps": 8},
    {"heads_first": True, "num_stages": 3},
)
# Rows (queries times heads of a group) and positions of a tile, and how it is run.
PROMPT_VARIANTS: tuple[dict[str, Any], ...] = (
    {"rows": 128, "positions": 64, "num_warps": 8, "num_stages": 3},
    {"rows": 128, "positions": 64, "num_warps": 8, "num_stages": 2},
    {"rows": 128, "positions": 128, "num_warps": 8, "num_stages": 2},
    {"rows": 128, "positions": 64, "num_warps": 4, "num_stages": 3},
    {"rows": 64, "positions": 64, "num_warps": 4, "num_stages": 3},
    {"rows": 128, "positions": 32, "num_warps": 4, "num_stages": 4},
    {"rows": 64, "positions": 128, "num_warps": 4, "num_stages": 2},
)


def measure(bench: Bench, args: ModelArgs) -> None:
    """What the engine does, and PyTorch's own attention beside it."""
    for sequences, context in DECODING:
        nbytes = _kv_bytes(bench, args, sequences, context)
        prepare = partial(_decode, bench, args, sequences, context)
        bench.row(f"decode, {sequences} of {context}, Triton", prepare, nbytes=nbytes)
    for sequences, length in PROMPTS:
        flop = _flop(args, sequences, length)
        bench.row(
            f"prompts, {sequences} of {length}, Triton", partial(_prompts, bench, args, sequences, length), flop=flop
        )
        bench.row(
            f"prompts, {sequences} of {length}, torch SDPA", partial(_sdpa, bench, args, sequences, length), flop=flop
        )


def sweep_decoding(bench: Bench, args: ModelArgs) -> None:
    for variant in DECODING_VARIANTS:
        settings = {**DECODING_BASE, **variant}
        for sequences, context in VARIED_DECODING:
            prepare = partial(_decode_pieces, bench, args, sequences, context, settings)
            nbytes = _kv_bytes(bench, args, sequences, context)
            bench.row(f"decode, {sequences} of {context}", prepare, nbytes=nbytes, **settings)


def sweep_prompts(bench: Bench, args: ModelArgs) -> None:
    for settings in PROMPT_VARIANTS:
        for sequences, length in VARIED_PROMPTS:
            prepare = partial(_prompts, bench, args, sequences, length, settings)
            bench.row(f"prompts, {sequences} of {length}", prepare, flop=_flop(args, sequences, length), **settings)


def _decode(bench: Bench, args: ModelArgs, sequences: int, context: int) -> Calls:
    from llama2.kernels import triton_attention

    q = bench.random(sequences, args.n_heads, args.head_dim)
    return [
        partial(triton_attention.attend_single, q, keys, values, *_places(bench, sequences, context))
        for keys, values in _caches(bench, args, sequences, context)
    ]


def _decode_pieces(bench: Bench, args: ModelArgs, sequences: int, context: int, settings: dict[str, Any]) -> Calls:
    from benchmarks.sweeps.paged_decode import attend_pieces

    q = bench.random(sequences, args.n_heads, args.head_dim)
    return [
        partial(attend_pieces, q, keys, values, *_places(bench, sequences, context), **settings)
        for keys, values in _caches(bench, args, sequences, context, heads_first=settings["heads_first"])
    ]


def _prompts(
    bench: Bench, args: ModelArgs, sequences: int, length: int, settings: dict[str, Any] | None = None
) -> Calls:
    from llama2.kernels import triton_attention

    attend = partial(_attend_prompts, **settings) if settings else triton_attention.attend_ragged
    q = bench.random(sequences * length, args.n_heads, args.head_dim)
    starts = torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32, device=bench.device)
    return [
        partial(attend, q, keys, values, *_places(bench, sequences, length), starts, 0, torch.empty_like(q))
        for keys, values in _caches(bench, args, sequences, length)
    ]


def _attend_prompts(
    q_THD: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables_SN: torch.Tensor,
    contexts_S: torch.Tensor,
    query_starts_S1: torch.Tensor,
    first_row: int,
    out_THD: torch.Tensor,
    *,
    rows: int,
    positions: int,
    **options: Any,
) -> None:
    """`triton_attention.attend_ragged` with other numbers than its own."""
    from llama2.kernels import triton_attention

    (tokens, heads, head_dim), (block_size, kv_heads) = q_THD.shape, keys.shape[1:3]
    sequences, group = len(contexts_S), heads // kv_heads
    tile = rows // group
    triton_attention._attend_prompts[((tokens - first_row) // tile + sequences, kv_heads)](
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
        PADDED_D=max(16, 1 << (head_dim - 1).bit_length()),
        BLOCK_SIZE=block_size,
        L=positions,
        **options,
    )


def _sdpa(bench: Bench, args: ModelArgs, sequences: int, length: int) -> Calls:
    """On keys and values that lie in one piece: what a paged cache costs is in the difference."""
    q = bench.random(sequences, args.n_heads, length, args.head_dim)
    k, v = (bench.random(sequences, args.n_kv_heads, length, args.head_dim) for _ in range(2))
    return [partial(functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=k.shape != q.shape)]


def _kv_bytes(bench: Bench, args: ModelArgs, sequences: int, context: int) -> int:
    return 2 * sequences * context * args.n_kv_heads * args.head_dim * bench.dtype.itemsize


def _flop(args: ModelArgs, sequences: int, length: int) -> int:
    return 2 * sequences * length * length * args.n_heads * args.head_dim


def _caches(
    bench: Bench, args: ModelArgs, sequences: int, context: int, *, heads_first: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of layers enough to be larger than a GPU's cache."""
    blocks = sequences * -(-context // BLOCK_SIZE)
    inner = (args.n_kv_heads, BLOCK_SIZE) if heads_first else (BLOCK_SIZE, args.n_kv_heads)
    layers = bench.copies(_kv_bytes(bench, args, sequences, context))
    return [
        (bench.random(blocks, *inner, args.head_dim), bench.random(blocks, *inner, args.head_dim))
        for _ in range(layers)
    ]


def _places(bench: Bench, sequences: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block tables in random order, and contexts."""
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(sequences * blocks, device=bench.device).int().view(sequences, blocks)
    return tables, torch.full((sequences,), context, dtype=torch.int32, device=bench.device)
