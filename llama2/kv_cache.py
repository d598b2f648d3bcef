"""Owns the paged keys and values of one rank: how many blocks fit, and how positions are written and read.

Knows no sequences and no scheduling: the caller says which slots and which blocks.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from llama2.config import EngineConfig, ModelArgs
from llama2.machine.memory import free_memory, zeros
from llama2.machine.memory_plan import describe, reserve

logger = logging.getLogger(__name__)

# By type of device, where none is given: the share of the memory that is left, and the most sequences at once.
KV_FRACTION = {"cuda": 0.9, "cpu": 0.25}
MAX_BATCH_SIZE = {"cuda": 256, "cpu": 32}


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

        def one() -> torch.Tensor:
            return zeros(math.prod(shape), dtype=dtype, device=device).view(shape)

        self.keys = [one() for _ in range(args.n_layers)]
        self.values = [one() for _ in range(args.n_layers)]

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


def choose_batch_size(
    args: ModelArgs,
    config: EngineConfig,
    *,
    n_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    degree: int = 1,
    free: int | None = None,
) -> int:
    """A `max_batch_size` for this rank's memory: as many sequences as have a quarter of max_seq_len each, on average,
    and at most MAX_BATCH_SIZE, by halves.

    `free` are the bytes of `device` beside the weights; None: as many as are free now.
    """
    free = _free_after_loading(device) if free is None else free
    size = min(MAX_BATCH_SIZE[device.type], config.max_step_tokens)
    while size > 1:
        tried = replace(config, max_batch_size=size)
        blocks = fitting_blocks(
            args, tried, free=free, n_kv_heads=n_kv_heads, dtype=dtype, device=device, degree=degree
        )
        if 4 * blocks >= size * config.blocks_per_sequence:
            break
        size //= 2
    return size


def fitting_blocks(
    args: ModelArgs,
    config: EngineConfig,
    *,
    free: int,
    n_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    degree: int = 1,
) -> int:
    """How many blocks a rank takes that has `free` bytes of `device` beside its weights."""
    left = max(0, free - sum(_reserved(args, config, dtype=dtype, device=device, degree=degree).values()))
    block = bytes_per_block(args, block_size=config.block_size, n_kv_heads=n_kv_heads, dtype=dtype)
    # One more is the scratch block.
    count = max(0, int(left // block * _fraction(config, device)) - 1)
    if device.type != "cuda" and config.kv_memory_fraction is None:
        return min(count, config.max_batch_size * config.blocks_per_sequence)
    return count


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
    """How many blocks this rank holds: those of its share of the memory that is free now.

    On a GPU that is what the steps do not need (`reserve`), which rank 0 logs. The ranks on the CPUs of one host share
    its memory evenly. Others use it, too: where no share is given, it is for no more than max_batch_size sequences of
    max_seq_len.

    Raises:
        ValueError: not even one sequence of max_seq_len fits.
    """
    free = _free_after_loading(device)
    reserved = _reserved(args, config, dtype=dtype, device=device, degree=degree)
    left = max(0, free - sum(reserved.values()))
    share_out = f"so much is free on the {device} for each rank"
    if device.type == "cuda":
        share_out = (
            f"of {free / 2**30:.1f} GiB free on {device} after loading, {sum(reserved.values()) / 2**30:.1f} GiB are "
            f"reserved for the steps ({describe(reserved)})"
        )
        if rank == 0:
            logger.info("%s", share_out)
    count = fitting_blocks(args, config, free=free, n_kv_heads=n_kv_heads, dtype=dtype, device=device, degree=degree)
    if count < config.blocks_per_sequence:
        raise ValueError(
            f"kv_memory_fraction={_fraction(config, device):g} of {left / 2**30:.1f} GiB holds {count} blocks of "
            f"{config.block_size} tokens, but one sequence of max_seq_len={config.max_seq_len} needs "
            f"{config.blocks_per_sequence}: {share_out}; raise the fraction, lower max_seq_len, max_batch_size or "
            "max_step_tokens, or raise the tensor-parallel degree"
        )
    return count


def _free_after_loading(device: torch.device) -> int:
    if device.type == "cuda":
        # What loading has given back is torch's until now.
        torch.cuda.empty_cache()
    return free_memory(device)


def _reserved(
    args: ModelArgs, config: EngineConfig, *, dtype: torch.dtype, device: torch.device, degree: int
) -> dict[str, int]:
    """The bytes that the steps need, by name: nothing on a CPU, of which the KV cache takes a small share."""
    return reserve(args, config, dtype=dtype, degree=degree) if device.type == "cuda" else {}


def _fraction(config: EngineConfig, device: torch.device) -> float:
    return config.kv_memory_fraction or KV_FRACTION[device.type]
