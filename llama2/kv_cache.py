"""Owns the paged keys and values of one rank: how many blocks fit, and how positions are written and read.

Knows no sequences and no scheduling: the caller says which slots and which blocks.
"""

from __future__ import annotations

import logging
import math

import torch

from llama2.config import EngineConfig, ModelArgs
from llama2.machine.memory import empty, free_memory
from llama2.machine.memory_plan import describe, reserve

logger = logging.getLogger(__name__)


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

        def zeros() -> torch.Tensor:
            return empty(math.prod(shape), dtype=dtype, device=device).zero_().view(shape)

        self.keys = [zeros() for _ in range(args.n_layers)]
        self.values = [zeros() for _ in range(args.n_layers)]

    def write(self, layer: int, k_TKD: torch.Tensor, v_TKD: torch.Tensor, slot_mapping_T: torch.Tensor) -> None:
        """Store the keys and values of T tokens at `slot_mapping_T` (int64)."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slot_mapping_T, k_TKD)
        self.values[layer].flatten(0, 1).index_copy_(0, slot_mapping_T, v_TKD)

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
    rank: int = 0,
    degree: int = 1,
) -> int:
    """How many blocks this rank can hold: for max_batch_size × max_seq_len, or from the memory that is free now.

    On a GPU that is what the steps do not need (`reserve`), which rank 0 logs. Ranks on the CPUs of one host share its
    memory evenly.

    Raises:
        ValueError: not even one sequence of max_seq_len fits; or, on a GPU, not all that were asked for.
    """
    block = bytes_per_block(args, block_size=config.block_size, n_kv_heads=n_kv_heads, dtype=dtype)
    if device.type == "cuda":
        return _count_on_gpu(config, reserve(args, config, dtype=dtype, degree=degree), block, device, logs=rank == 0)
    if config.kv_memory_fraction is None:
        return config.max_batch_size * config.blocks_per_sequence
    free = free_memory(device)
    count = int(free * config.kv_memory_fraction) // block
    if count < config.blocks_per_sequence:
        raise ValueError(f"{_shortage(config, free, count)}: raise the fraction or lower max_seq_len")
    return count


def _count_on_gpu(
    config: EngineConfig, reserved: dict[str, int], block: int, device: torch.device, *, logs: bool
) -> int:
    # What loading has given back is torch's until now.
    torch.cuda.empty_cache()
    free = free_memory(device)
    left = max(0, free - sum(reserved.values()))
    share_out = (
        f"of {free / 2**30:.1f} GiB free on {device} after loading, {sum(reserved.values()) / 2**30:.1f} GiB are "
        f"reserved for the steps ({describe(reserved)})"
    )
    if logs:
        logger.info("%s", share_out)
    remedy = "max_seq_len, max_batch_size or max_step_tokens, or raise the tensor-parallel degree"
    if config.kv_memory_fraction is None:
        count = config.max_batch_size * config.blocks_per_sequence
        needed = (count + 1) * block  # one more is the scratch block
        if needed > left:
            raise ValueError(
                f"the KV cache for max_batch_size={config.max_batch_size} sequences of "
                f"max_seq_len={config.max_seq_len} needs {needed / 2**30:.1f} GiB, but {left / 2**30:.1f} GiB are "
                f"left: {share_out}; lower {remedy}, or set kv_memory_fraction to 0.9, by which they share the rest"
            )
        return count
    count = max(0, int(left * config.kv_memory_fraction) // block - 1)
    if count < config.blocks_per_sequence:
        raise ValueError(f"{_shortage(config, left, count)}: {share_out}; raise the fraction, lower {remedy}")
    return count


def _shortage(config: EngineConfig, free: int, count: int) -> str:
    return (
        f"kv_memory_fraction={config.kv_memory_fraction:g} of {free / 2**30:.1f} GiB holds {count} blocks of "
        f"{config.block_size} tokens, but one sequence of max_seq_len={config.max_seq_len} needs "
        f"{config.blocks_per_sequence}"
    )
