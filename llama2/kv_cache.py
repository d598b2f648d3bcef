"""Owns the paged keys and values of one rank: how many blocks fit, and how positions are written and read.

Knows no sequences and no scheduling: whoever calls says which slots and which blocks.
"""

from __future__ import annotations

import os

import psutil
import torch

from llama2.config import EngineConfig, ModelArgs


class KVCache:
    """Rotated keys and values of every layer, `(num_blocks + 1, block_size, n_kv_heads, head_dim)` each.

    Position p of a sequence lives in slot `block_table[p // block_size] * block_size + p % block_size`. One block more,
    `scratch_block`, belongs to no sequence: rows that only fill up a batch write there.
    """

    def __init__(
        self,
        args: ModelArgs,
        *,
        num_blocks: int,
        block_size: int,
        n_kv_heads: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`n_kv_heads` is the number that this rank holds."""
        shape = (num_blocks + 1, block_size, n_kv_heads, args.head_dim)
        self.num_blocks = num_blocks
        self.scratch_block = num_blocks
        self.block_size = block_size
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(args.n_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(args.n_layers)]

    def write(self, layer: int, k_TKD: torch.Tensor, v_TKD: torch.Tensor, slots_T: torch.Tensor) -> None:
        """Store the keys and values of T tokens at `slots_T` (int64)."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots_T, k_TKD)
        self.values[layer].flatten(0, 1).index_copy_(0, slots_T, v_TKD)

    def copy(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy whole blocks, (from, to) each, one after the other."""
        for source, target in pairs:
            for cache in (*self.keys, *self.values):
                cache[target].copy_(cache[source])

    def read(self, layer: int, table_N: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` positions of the sequence whose block table is `table_N`, `(length, K, D)` each."""
        blocks_N = table_N[: -(-length // self.block_size)]
        keys = self.keys[layer].index_select(0, blocks_N).flatten(0, 1)[:length]
        values = self.values[layer].index_select(0, blocks_N).flatten(0, 1)[:length]
        return keys, values


def bytes_per_block(args: ModelArgs, *, block_size: int, n_kv_heads: int, dtype: torch.dtype) -> int:
    return 2 * args.n_layers * block_size * n_kv_heads * args.head_dim * dtype.itemsize


def count_blocks(
    args: ModelArgs,
    config: EngineConfig,
    *,
    n_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """How many blocks this rank can hold: for max_batch_size × max_seq_len, or from the memory that is free now.

    Ranks on the CPUs of one host share its memory evenly.

    Raises:
        ValueError: not even one sequence of max_seq_len fits.
    """
    if config.kv_memory_fraction is None:
        return config.max_batch_size * config.blocks_per_sequence
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    block = bytes_per_block(args, block_size=config.block_size, n_kv_heads=n_kv_heads, dtype=dtype)
    count = int(free * config.kv_memory_fraction) // block
    if count < config.blocks_per_sequence:
        raise ValueError(
            f"kv_memory_fraction={config.kv_memory_fraction:g} of {free / 2**30:.1f} GiB holds {count} blocks of "
            f"{config.block_size} tokens, but one sequence of max_seq_len={config.max_seq_len} needs "
            f"{config.blocks_per_sequence}: raise the fraction or lower max_seq_len"
        )
    return count
