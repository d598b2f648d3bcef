"""The C++ operators on a KV cache of 8 bits: the codes that plain PyTorch writes, and attention to their values."""

from __future__ import annotations

import pytest
import torch

from llama2.batch import Batch
from llama2.kernels.cpu import library as cpu_library
from llama2.kernels.cpu.kernels import CpuKernels
from llama2.kernels.plain import PlainKernels
from llama2.kv_cache import KVCache
from tests.support.batches import ragged_batch, random_cache

PLAIN = PlainKernels()
CODES = pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Relative to values near 1: fp32 sums in another order, and the result rounded to bf16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


def kernels() -> CpuKernels:
    assert cpu_library.load_library(), "the tests need a C++ compiler"
    return CpuKernels(torch.bfloat16)


def held(cache: KVCache) -> list[torch.Tensor]:
    tensors = (*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales)
    return [one.view(torch.uint8).clone() for one in tensors]


def turned_by(angles: torch.Tensor) -> torch.Tensor:
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


@CODES
@DTYPES
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(1, 1, 64), (3, 3, 64), (2, 5, 24), (8, 1, 6)])
def test_what_is_stored_is_what_plain_pytorch_stores(
    codes: torch.dtype, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int
) -> None:
    """To the bit, where no angle rounds: zeros, tiny and huge values, and values halfway between two codes."""
    heads = kv_heads * group
    mine = random_cache(kv_heads=kv_heads, head_dim=head_dim, dtype=codes)
    steps = ragged_batch([(1, 1), (1, 30), (17, 40)], mine)
    qkv = torch.randn(19, heads + 2 * kv_heads, head_dim) * torch.logspace(-30, 30, 19)[:, None, None]
    qkv[0], qkv[1] = 0, 1e-44
    qkv[2] = torch.arange(head_dim) + 0.5
    qkv[2, :, 0] = 127 if codes == torch.int8 else 448
    qkv = qkv.flatten(1).to(dtype)
    rope = turned_by(torch.zeros(19, head_dim // 2))
    q = kernels().rotate_and_store(qkv, rope, steps, 0)
    actual = held(mine)
    assert torch.equal(q, PLAIN.rotate_and_store(qkv, rope, steps, 0))
    for one, other in zip(actual, held(mine), strict=True):
        assert torch.equal(one, other)


@CODES
@DTYPES
def test_keys_are_rotated_before_they_are_codes(codes: torch.dtype, dtype: torch.dtype) -> None:
    mine = random_cache(kv_heads=3, head_dim=64, dtype=codes)
    steps = ragged_batch([(1, 1), (20, 40)], mine)
    qkv, rope = torch.randn(21, 15 * 64).to(dtype), turned_by(torch.randn(21, 32))
    table, length = steps.block_tables_SN[1], 40
    kernels().rotate_and_store(qkv, rope, steps, 0)
    actual, _ = mine.read(0, table, length)
    PLAIN.rotate_and_store(qkv, rope, steps, 0)
    expected, _ = mine.read(0, table, length)
    # A last digit that is rounded otherwise may make another code, and another scale.
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.13)
    assert (actual - expected).square().mean().sqrt() < 0.005


def contexts(codes: torch.dtype, kv_heads: int, head_dim: int, spans: list[tuple[int, int]]) -> Batch:
    return ragged_batch(spans, random_cache(kv_heads=kv_heads, head_dim=head_dim, dtype=codes))


@CODES
@DTYPES
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"), [(3, 3, 64), (1, 7, 64), (1, 15, 40), (2, 4, 128), (2, 1, 24), (8, 8, 6)]
)
@pytest.mark.parametrize("spans", [[(1, 1), (1, 33), (1, 256), (1, 257)], [(1, 600)], [(1, 20), (5, 5), (30, 300)]])
def test_attention_is_that_to_the_values_that_codes_stand_for(
    codes: torch.dtype, dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, spans: list[tuple[int, int]]
) -> None:
    steps = contexts(codes, kv_heads, head_dim, spans)
    q = torch.randn(len(steps.positions_T), kv_heads * group, head_dim).to(dtype)
    actual = kernels().attend(q, steps, 0)
    assert actual.dtype == dtype
    expected, tolerance = PLAIN.attend(q.float(), steps, 0), TOLERANCE[dtype]
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("codes", "most"), [(torch.int8, 0.01), (torch.float8_e4m3fn, 0.05)], ids=["int8", "fp8"])
def test_the_error_is_that_of_the_codes(codes: torch.dtype, most: float) -> None:
    """Root mean squares of attention to normal values, against attention to the values themselves."""
    q, found = torch.randn(2, 6, 64), []
    for dtype in (torch.float32, codes):
        torch.manual_seed(3)
        found.append(kernels().attend(q, contexts(dtype, 2, 64, [(1, 300), (1, 40)]), 0))
    exact, actual = found
    error = ((actual - exact).square().mean() / exact.square().mean()).sqrt().item()
    assert most / 5 < error < most


@CODES
def test_a_row_has_the_same_bits_in_any_company_and_a_head_on_any_rank(codes: torch.dtype) -> None:
    steps = contexts(codes, 2, 64, [(1, 5), (1, 300), (400, 400)])
    cache, operator = steps.cache, torch.ops.llama2_cpu.paged_attention
    q = torch.randn(402, 6, 64).bfloat16()
    together = kernels().attend(q, steps, 0)
    for row, sequence, context in [(0, 0, 5), (1, 1, 300), (2, 2, 1), (200, 2, 199), (289, 2, 288), (401, 2, 400)]:
        for head in (0, 1):
            alone = operator(
                q[row : row + 1, 3 * head : 3 * head + 3].contiguous(),
                *(one[0][:, :, head : head + 1].contiguous() for one in (cache.keys, cache.values)),
                steps.block_tables_SN[sequence : sequence + 1].contiguous(),
                torch.tensor([0, 1], dtype=torch.int32),
                torch.tensor([context], dtype=torch.int32),
                *(one[0][:, :, head : head + 1].contiguous() for one in (cache.key_scales, cache.value_scales)),
            )
            assert torch.equal(alone[0], together[row, 3 * head : 3 * head + 3]), (row, head)


@CODES
def test_a_token_is_stored_with_the_same_bits_in_any_company_and_on_any_rank(codes: torch.dtype) -> None:
    whole = random_cache(kv_heads=2, head_dim=64, dtype=codes)
    steps = ragged_batch([(30, 40)], whole)
    qkv, rope = torch.randn(30, 10, 64).bfloat16(), turned_by(torch.randn(30, 32))
    kernels().rotate_and_store(qkv.flatten(1), rope, steps, 0)
    for head in (0, 1):
        part = random_cache(kv_heads=1, head_dim=64, dtype=codes)
        mine = torch.cat((qkv[:, 3 * head : 3 * head + 3], qkv[:, 6 + head : 9 + head : 2]), dim=1)
        for row in (0, 17, 29):
            one = slice(row, row + 1)
            slots, scales = steps.slot_mapping_T[one], part.scales(0)
            torch.ops.llama2_cpu.rotate_and_store(
                mine[one].flatten(1), rope[one], slots, part.keys[0], part.values[0], *scales
            )
            for ours, theirs in zip(held(part), held(whole), strict=True):
                theirs = (
                    theirs.unflatten(2, (2, -1))[:, :, head] if theirs.dim() == 3 else theirs[:, :, head : head + 1]
                )
                ours, theirs = (each.flatten(0, 1)[slots].flatten() for each in (ours, theirs))
                assert torch.equal(ours, theirs), (head, row)


@CODES
def test_what_does_not_belong_to_a_cache_of_codes_is_refused(codes: torch.dtype) -> None:
    steps = contexts(codes, 2, 64, [(1, 5)])
    keys, values, (key_scales, value_scales) = steps.cache.keys[0], steps.cache.values[0], steps.cache.scales(0)
    assert key_scales is not None
    assert value_scales is not None
    batch = (steps.block_tables_SN, steps.query_starts_S1, steps.seq_lens_S)
    operator, q = torch.ops.llama2_cpu.paged_attention, torch.randn(1, 2, 64)
    with pytest.raises(RuntimeError, match="codes have scales"):
        operator(q, keys, values, *batch)
    with pytest.raises(RuntimeError, match="a scale for each token and head"):
        operator(q, keys, values, *batch, key_scales[1:], value_scales)
    with pytest.raises(RuntimeError, match="does not belong to this model"):
        operator(q, keys.to(torch.float16), values, *batch, key_scales, value_scales)
