"""The limits are those known for Llama 2 on a GPU of 4.3 TB/s and 790 TFLOP/s."""

from __future__ import annotations

import pytest
import torch

from benchmarks.engines import read_sizes
from benchmarks.limits import (
    Rates,
    decode_seconds,
    layer_parameters,
    prefill_seconds,
    read_parameters,
)
from benchmarks.shapes import SHAPES, find_shape
from llama2.config import EngineConfig

H200 = Rates(bytes_per_second=4.3e12, flops_per_second=790e12)
BF16 = 2
# 4 bits, with a scale and a zero of 16 bits for each group of 128; the head stays in bf16.
INT4_BITS = 4 + 2 * 16 / 128


def weight_bytes(name: str) -> int:
    args = SHAPES[name]
    if name != "70b":
        return read_parameters(args) * BF16
    return int(layer_parameters(args) * INT4_BITS / 8) + args.vocab_size * args.dim * BF16


@pytest.mark.parametrize(("dtype", "kib"), [("auto", 512), ("int8", 264), ("fp8", 264)])
def test_a_cache_of_codes_is_read_with_a_scale_for_each_head(dtype: str, kib: int) -> None:
    sizes = read_sizes(SHAPES["7b"], EngineConfig(kv_cache_dtype=dtype), torch.bfloat16)
    assert sizes.kv_per_token == kib * 1024


@pytest.mark.parametrize(
    ("name", "gigabytes", "kv_kib", "alone", "at_4096", "batch_64", "prefill_ms"),
    [
        ("7b", 13.2, 512, 325, 280, 5785, 35),
        ("13b", 25.7, 800, 167, 148, 3466, 68),
        ("70b", 36.9, 320, 117, 112, 4715, 362),
    ],
)
def test_llama_2_on_one_gpu(
    name: str, gigabytes: float, kv_kib: int, alone: int, at_4096: int, batch_64: int, prefill_ms: int
) -> None:
    args, weights = SHAPES[name], weight_bytes(name)
    sizes = read_sizes(args, EngineConfig(), torch.bfloat16, weight_bytes=weights)

    def rate(batch: int, context: int) -> float:
        step = decode_seconds(args, H200, sizes, batch=batch, context=context)
        return batch / step

    assert weights / 1e9 == pytest.approx(gigabytes, abs=0.06)
    assert sizes.kv_per_token == kv_kib * 1024
    assert rate(1, 0) == pytest.approx(alone, abs=0.6)
    assert rate(1, 4096) == pytest.approx(at_4096, abs=0.6)
    assert rate(64, 1024) == pytest.approx(batch_64, rel=0.001)
    prefill = prefill_seconds(args, H200, sizes, batch=1, context=2048)
    assert prefill * 1e3 == pytest.approx(prefill_ms, abs=0.5)


def test_a_large_batch_waits_for_operations_and_a_small_one_for_bytes() -> None:
    args = SHAPES["7b"]
    slow_bytes = Rates(bytes_per_second=1e9, flops_per_second=1e18)
    slow_operations = Rates(bytes_per_second=1e18, flops_per_second=1e9)
    sizes = read_sizes(args, EngineConfig(), torch.bfloat16)
    assert decode_seconds(args, slow_bytes, sizes, batch=1, context=100) == pytest.approx(
        (read_parameters(args) * BF16 + 100 * 512 * 1024) / 1e9
    )
    assert decode_seconds(args, slow_operations, sizes, batch=8, context=100) == pytest.approx(
        8 * (2 * read_parameters(args) + 4 * 32 * 100 * 4096) / 1e9
    )


def test_a_short_prompt_waits_for_the_weights_and_n_prompts_take_n_times_as_long() -> None:
    args = SHAPES["7b"]
    sizes = read_sizes(args, EngineConfig(), torch.bfloat16)
    one_token = prefill_seconds(args, H200, sizes, batch=1, context=1)
    assert one_token == pytest.approx(read_parameters(args) * BF16 / 4.3e12)
    one, eight = (prefill_seconds(args, H200, sizes, batch=batch, context=2048) for batch in (1, 8))
    assert eight == pytest.approx(8 * one)


def test_the_embedding_lookup_is_free_and_the_head_is_not() -> None:
    args = SHAPES["135m"]
    assert read_parameters(args) - layer_parameters(args) == args.vocab_size * args.dim + args.dim


def test_an_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"shape must be one of 7b, 13b, .*, got '8b'"):
        find_shape("8b")
