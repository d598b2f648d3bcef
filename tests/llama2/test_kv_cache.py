"""Codes of 8 bits stand for the values that were written, as nearly as they can, whatever lies beside them."""

from __future__ import annotations

import pytest
import torch

from llama2.config import EngineConfig
from llama2.kv_cache import CODES, LARGEST_CODE, KVCache, bytes_per_block, cache_dtype, quantize
from tests.support.batches import BLOCK_SIZE, CPU, NUM_BLOCKS, random_cache
from tests.support.weights import tiny_args

BOTH = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])


def values(*shape: int) -> torch.Tensor:
    """Of very different sizes: a row is all zero, one is tiny, one has an outlier."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 1e-6, 3e4])[:, None, None]
    x[0, 0] = 0
    x[1, 0] = 1e-44
    x[2, 0, 0] = 1e7
    return x


@BOTH
def test_a_code_is_the_nearest_to_its_value(dtype: torch.dtype) -> None:
    x = values(3, 4, 64)
    codes, scales = quantize(x, dtype)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[every.isfinite() & (every.abs() <= LARGEST_CODE[dtype])]
    error = (codes.double() * scales.double()[..., None] - x).abs()
    least = (every.double() * scales.double()[..., None, None] - x[..., None]).abs().amin(-1)
    # The quotient by the scale is rounded, and a denormal scale is rounded itself.
    assert (error <= least + 1e-6 * x.abs() + 1e-45).all()
    assert not codes[0, 0].float().any()


@BOTH
def test_the_largest_value_is_the_largest_code(dtype: torch.dtype) -> None:
    x = values(3, 4, 64)[:, 1:]
    codes, scales = quantize(x, dtype)
    assert (codes.float().abs().amax(-1) == LARGEST_CODE[dtype]).all()
    torch.testing.assert_close(scales * LARGEST_CODE[dtype], x.abs().amax(-1), rtol=1e-6, atol=0)


@BOTH
def test_what_is_read_are_the_codes_times_their_scales_and_neighbours_do_not_matter(dtype: torch.dtype) -> None:
    x = values(3, 4, 64)
    slots, table = torch.tensor([5, 40, 18]), torch.tensor([0, 1, 2], dtype=torch.int32)
    whole = random_cache(kv_heads=4, head_dim=64, dtype=dtype)
    whole.write(0, x, -x, slots)
    codes, scales = quantize(x, dtype)
    keys, negatives = whole.read(0, table, 41)
    assert torch.equal(keys[slots], codes.float() * scales[..., None])
    assert torch.equal(negatives[slots], -keys[slots])
    # A rank that holds two of the heads, and a pass that has one of the tokens.
    half = random_cache(kv_heads=2, head_dim=64, dtype=dtype)
    half.write(0, x[1:2, 2:], -x[1:2, 2:], slots[1:2])
    assert torch.equal(half.read(0, table, 41)[0][40], keys[40, 2:])


@BOTH
def test_a_copied_block_has_its_scales(dtype: torch.dtype) -> None:
    cache = random_cache(kv_heads=2, head_dim=16, dtype=dtype)
    cache.copy(((3, 7), (7, 9)))
    three, seven, nine = (cache.read(0, torch.tensor([block]), BLOCK_SIZE) for block in (3, 7, 9))
    for one, *others in zip(three, seven, nine, strict=True):
        assert one.any()
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize(("name", "head_bytes"), [("auto", 128), ("int8", 68), ("fp8", 68)])
def test_a_block_has_the_bytes_that_are_allocated_for_it(name: str, head_bytes: int) -> None:
    args = tiny_args(dim=256, n_heads=4, n_kv_heads=2)
    dtype = cache_dtype(EngineConfig(kv_cache_dtype=name), torch.bfloat16)
    cache = KVCache(args, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, n_kv_heads=2, dtype=dtype, device=CPU)
    block = bytes_per_block(args, block_size=BLOCK_SIZE, n_kv_heads=2, dtype=dtype)
    held = (*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales)
    assert block * (NUM_BLOCKS + 1) == sum(one.nbytes for one in held)
    assert block == 2 * args.n_layers * BLOCK_SIZE * 2 * head_bytes


def test_every_name_but_auto_has_codes() -> None:
    assert {cache_dtype(EngineConfig(kv_cache_dtype=name), torch.float32) for name in ("auto", *CODES)} == {
        torch.float32,
        *LARGEST_CODE,
    }
