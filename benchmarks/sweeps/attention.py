"""Tries attention: of rows that decode, by the order of programs, tiles and the cache's layout; of prompts, by tiles.

Decoding moves keys and values once; prompts are counted by their operations, half of T² each as they are causal.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
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
# What `attend_decode` is given in place of its own choice. With heads_apart the cache is (block, head, position, D).
DECODING_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"pdl": False},
    {"axes": "shl"},
    {"axes": "hls"},
    {"axes": "lsh"},
    {"heads_apart": True},
    {"heads_apart": True, "axes": "lhs"},
    {"num_stages": 3},
    {"num_stages": 2},
    {"L": 32},
    {"L": 128, "num_stages": 3},
    {"L": 16},
    {"num_warps": 2},
    {"num_warps": 8},
    {"heads_apart": True, "num_stages": 3},
)
# What `attend_prefill` is given: M rows (queries times heads of a group) and L positions of a tile, and how it is run.
PROMPT_VARIANTS: tuple[dict[str, Any], ...] = (
    {"M": 64, "L": 64, "num_warps": 4, "num_stages": 3},
    {"M": 64, "L": 64, "num_warps": 4, "num_stages": 2},
    {"M": 64, "L": 32, "num_warps": 4, "num_stages": 3},
    {"M": 128, "L": 64, "num_warps": 8, "num_stages": 3},
    {"M": 128, "L": 64, "num_warps": 8, "num_stages": 2},
    {"M": 128, "L": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128},
    {"M": 128, "L": 32, "num_warps": 8, "num_stages": 4},
    {"M": 128, "L": 64, "num_warps": 4, "num_stages": 3},
)


def measure(bench: Bench, args: ModelArgs) -> None:
    """The engine's attention, and PyTorch's own."""
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
    for settings in DECODING_VARIANTS:
        for sequences, context in VARIED_DECODING:
            prepare = partial(_decode, bench, args, sequences, context, settings)
            nbytes = _kv_bytes(bench, args, sequences, context)
            bench.row(f"decode, {sequences} of {context}, tried", prepare, nbytes=nbytes, **settings)


def sweep_prompts(bench: Bench, args: ModelArgs) -> None:
    for settings in PROMPT_VARIANTS:
        for sequences, length in VARIED_PROMPTS:
            prepare = partial(_prompts, bench, args, sequences, length, settings)
            flop = _flop(args, sequences, length)
            bench.row(f"prompts, {sequences} of {length}, tried", prepare, flop=flop, **settings)


def _decode(
    bench: Bench, args: ModelArgs, sequences: int, context: int, settings: Mapping[str, Any] = MappingProxyType({})
) -> Calls:
    from llama2.kernels import is_hopper
    from llama2.kernels.cuda import decode_attention

    options = {"pdl": is_hopper(bench.device), **settings}
    heads_apart = options.pop("heads_apart", False)
    q = bench.random(sequences, args.n_heads, args.head_dim)
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=bench.device)
    arrived = torch.zeros(sequences * args.n_kv_heads, dtype=torch.int32, device=bench.device)
    return [
        partial(
            decode_attention.attend_decode,
            q,
            keys,
            values,
            *_places(bench, sequences, context),
            starts,
            arrived,
            torch.empty_like(q),
            **options,
        )
        for keys, values in _caches(bench, args, sequences, context, heads_apart=heads_apart)
    ]


def _prompts(
    bench: Bench, args: ModelArgs, sequences: int, length: int, settings: Mapping[str, Any] = MappingProxyType({})
) -> Calls:
    from llama2.kernels import is_hopper
    from llama2.kernels.cuda import prefill_attention

    hopper = is_hopper(bench.device)
    q = bench.random(sequences * length, args.n_heads, args.head_dim)
    starts = torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32, device=bench.device)
    return [
        partial(
            prefill_attention.attend_prefill,
            q,
            keys,
            values,
            *_places(bench, sequences, length),
            starts,
            0,
            torch.empty_like(q),
            wgmma=hopper,
            pdl=hopper,
            **settings,
        )
        for keys, values in _caches(bench, args, sequences, length)
    ]


def _sdpa(bench: Bench, args: ModelArgs, sequences: int, length: int) -> Calls:
    """On contiguous keys and values: the difference is what a paged cache costs."""
    q = bench.random(sequences, args.n_heads, length, args.head_dim)
    k, v = (bench.random(sequences, args.n_kv_heads, length, args.head_dim) for _ in range(2))
    return [partial(functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=k.shape != q.shape)]


def _kv_bytes(bench: Bench, args: ModelArgs, sequences: int, context: int) -> int:
    return 2 * sequences * context * args.n_kv_heads * args.head_dim * bench.dtype.itemsize


def _flop(args: ModelArgs, sequences: int, length: int) -> int:
    return 2 * sequences * length * length * args.n_heads * args.head_dim


def _caches(
    bench: Bench, args: ModelArgs, sequences: int, context: int, *, heads_apart: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of enough layers to exceed a GPU's cache, as (blocks, positions, heads, D)."""
    blocks = sequences * -(-context // BLOCK_SIZE)
    shape = (blocks, args.n_kv_heads, BLOCK_SIZE) if heads_apart else (blocks, BLOCK_SIZE, args.n_kv_heads)

    def cache() -> torch.Tensor:
        values = bench.random(*shape, args.head_dim)
        return values.transpose(1, 2) if heads_apart else values

    return [(cache(), cache()) for _ in range(bench.copies(_kv_bytes(bench, args, sequences, context)))]


def _places(bench: Bench, sequences: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block tables in random order, and contexts."""
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(sequences * blocks, device=bench.device).int().view(sequences, blocks)
    return tables, torch.full((sequences,), context, dtype=torch.int32, device=bench.device)
