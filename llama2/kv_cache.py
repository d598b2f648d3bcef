"""Owns the paged keys and values of one rank: how many blocks fit, how positions are written and read, and what codes
of 8 bits stand for.

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
# By `kv_cache_dtype`: the dtype of codes; and the largest of them.
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SCALE_BYTES = 4


class KVCache:
    """Rotated keys and values of every layer, `(num_blocks + 1, block_size, n_kv_heads, head_dim)` each.

    Where these are codes of 8 bits, each token's of a head have an fp32 scale: `key_scales` and `value_scales`,
    `(num_blocks + 1, block_size, n_kv_heads)` each; else there are none. A scale follows from its token and head alone
    (`quantize`), so that codes do not depend on what else is computed, or on which ranks.

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
        """`n_kv_heads` is the number that this rank holds, `dtype` that of the keys and values (`cache_dtype`)."""
        shape = (num_blocks + 1, block_size, n_kv_heads, args.head_dim)
        self.num_blocks = num_blocks
        self.scratch_block = num_blocks
        self.block_size = block_size

        def one_per_layer(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
            return [zeros(math.prod(shape), dtype=dtype, device=device).view(shape) for _ in range(args.n_layers)]

        self.keys, self.values = one_per_layer(shape, dtype), one_per_layer(shape, dtype)
        self.key_scales: list[torch.Tensor] = []
        self.value_scales: list[torch.Tensor] = []
        if dtype in LARGEST_CODE:
            self.key_scales = one_per_layer(shape[:-1], torch.float32)
            self.value_scales = one_per_layer(shape[:-1], torch.float32)

    def scales(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Of the keys and of the values of a layer, where these are codes."""
        return (self.key_scales[layer], self.value_scales[layer]) if self.key_scales else (None, None)

    def write(self, layer: int, k_TKD: torch.Tensor, v_TKD: torch.Tensor, slot_mapping_T: torch.Tensor) -> None:
        """Store the keys and values of T tokens at `slot_mapping_T` (int64)."""
        caches, scales = (self.keys[layer], self.values[layer]), self.scales(layer)
        for x_TKD, cache, cached_scales in zip((k_TKD, v_TKD), caches, scales, strict=True):
            if cached_scales is None:
                cache.flatten(0, 1).index_copy_(0, slot_mapping_T, x_TKD)
                continue
            codes_TKD, scales_TK = quantize(x_TKD, cache.dtype)
            _as_bytes(cache).flatten(0, 1).index_copy_(0, slot_mapping_T, _as_bytes(codes_TKD))
            cached_scales.flatten(0, 1).index_copy_(0, slot_mapping_T, scales_TK)

    def copy(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy whole blocks, (from, to) each, one after the other."""
        for source, target in pairs:
            for cache in (*self.keys, *self.values, *self.key_scales, *self.value_scales):
                cache[target].copy_(cache[source])

    def read(self, layer: int, table_N: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` positions of the sequence whose block table is `table_N`, `(length, K, D)` each.

        In fp32 where they are codes: the values that these stand for.
        """
        blocks_N = table_N[: -(-length // self.block_size)]

        def rows(cache: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
            if scales is None:
                return cache.index_select(0, blocks_N).flatten(0, 1)[:length]
            codes_LKD = rows(_as_bytes(cache), None).view(cache.dtype)
            return codes_LKD.float() * rows(scales, None)[..., None]

        key_scales, value_scales = self.scales(layer)
        return rows(self.keys[layer], key_scales), rows(self.values[layer], value_scales)


def quantize(x_TKD: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (T, K, D) of `dtype` and fp32 scales (T, K): the largest of a token's values in a head is the largest code.

    The others are the nearest codes, of two the even one; a code times its scale is the value that it stands for.
    """
    x_TKD, largest = x_TKD.float(), LARGEST_CODE[dtype]
    scales_TK = x_TKD.abs().amax(-1) / largest
    x_TKD = (x_TKD / scales_TK.where(scales_TK > 0, 1.0)[..., None]).clamp(-largest, largest)
    return (x_TKD.round() if dtype == torch.int8 else x_TKD).to(dtype), scales_TK


def cache_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """Of the keys and values of a model of `dtype`."""
    return CODES.get(config.kv_cache_dtype, dtype)


def _as_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Codes as a dtype that every operator can move."""
    return codes.view(torch.uint8)


def bytes_per_block(args: ModelArgs, *, block_size: int, n_kv_heads: int, dtype: torch.dtype) -> int:
    """`dtype` is that of the keys and values (`cache_dtype`)."""
    head = args.head_dim * dtype.itemsize + (SCALE_BYTES if dtype in LARGEST_CODE else 0)
    return 2 * args.n_layers * block_size * n_kv_heads * head


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
    """How many blocks a rank takes that has `free` bytes of `device` beside its weights, which are of `dtype`."""
    left = max(0, free - sum(_reserved(args, config, dtype=dtype, device=device, degree=degree).values()))
    kept = cache_dtype(config, dtype)
    block = bytes_per_block(args, block_size=config.block_size, n_kv_heads=n_kv_heads, dtype=kept)
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
