"""Ragged batches on a cache of random contents, for the tests of kernels."""

from __future__ import annotations

import torch

from llama2.batch import Batch, Span
from llama2.config import ModelArgs
from llama2.kv_cache import LARGEST_CODE, KVCache

NUM_BLOCKS, BLOCK_SIZE = 80, 16
CPU = torch.device("cpu")


def random_cache(*, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device = CPU) -> KVCache:
    """Of one layer, drawn by torch's generator on the CPU so that devices can be compared. `dtype` may be codes'."""
    args = ModelArgs(
        dim=8, n_layers=1, n_heads=kv_heads, n_kv_heads=kv_heads, head_dim=head_dim, hidden_dim=8, vocab_size=8
    )
    cache = KVCache(args, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, n_kv_heads=kv_heads, dtype=dtype, device=device)
    drawn = torch.float32 if dtype in LARGEST_CODE else dtype
    keys, values = (torch.randn(cache.keys[0].shape).flatten(0, 1).to(device, drawn) for _ in range(2))
    cache.write(0, keys, values, torch.arange(len(keys), device=device))
    return cache


def ragged_batch(spans: list[tuple[int, int]], cache: KVCache) -> Batch:
    """Sequences of (length, context), each on its own blocks in shuffled order."""
    device = cache.keys[0].device
    free = iter(torch.randperm(NUM_BLOCKS).tolist())
    tables = [[next(free) for _ in range(-(-context // BLOCK_SIZE))] for _, context in spans]
    width = max(map(len, tables))
    starts = [sum(length for length, _ in spans[:index]) for index in range(len(spans) + 1)]
    placed = [
        (position, table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
        for (length, context), table in zip(spans, tables, strict=True)
        for position in range(context - length, context)
    ]
    padded = [table + [0] * (width - len(table)) for table in tables]
    return Batch(
        positions_T=torch.tensor([position for position, _ in placed], device=device),
        slot_mapping_T=torch.tensor([slot for _, slot in placed], device=device),
        query_starts_S1=torch.tensor(starts, dtype=torch.int32, device=device),
        seq_lens_S=torch.tensor([context for _, context in spans], dtype=torch.int32, device=device),
        block_tables_SN=torch.tensor(padded, dtype=torch.int32, device=device),
        spans=tuple(
            Span(row=row, length=length, seq_len=seq_len) for row, (length, seq_len) in zip(starts, spans, strict=False)
        ),
        num_single=sum(length == 1 for length, _ in spans),
        cache=cache,
    )
