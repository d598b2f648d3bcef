"""Measures the GPU's kernels one by one: bytes per second, or FLOP per second, of each, at the shapes of Llama 2 7B.

    python -m benchmarks.gpu_kernels

What a decoding step costs is the sum of these and of its launches: it says which kernel to work on, and which rows
belong into `STREAMED_ROWS` of llama2/kernels/cuda.py. The caches are emptied before each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional

from benchmarks.results import RESULTS, save
from benchmarks.shapes import SHAPES
from scripts.flags import run

ARGS = SHAPES["7b"]
DECODING = ((1, 128), (1, 1024), (1, 4096), (8, 1024), (64, 1024))
PROMPTS = ((1, 512), (1, 2048), (4, 512))
BLOCK_SIZE = 16


def benchmark(*, out: str = str(RESULTS / "gpu-kernels.json")) -> None:
    """Measure, print, and write a JSON file.

    Args:
        out: the JSON file to write.
    """
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA GPU")
    rows = []
    with torch.inference_mode():
        for row in (*_products(), *_steps(), *_attention()):
            print(f"{row['kernel']:32s} {row['microseconds']:9.1f} µs  {row['rate']:8.1f} {row['unit']}", flush=True)
            rows.append(row)
    print(save(out, "gpu-kernels", {"shape": "7b", "dtype": "bf16"}, rows))


def _products() -> Iterator[dict[str, Any]]:
    from llama2.kernels import triton_layers

    qkv = (ARGS.n_heads + 2 * ARGS.n_kv_heads) * ARGS.head_dim
    shapes = {
        "wqkv": (qkv, ARGS.dim),
        "wo": (ARGS.dim, ARGS.dim),
        "w13": (2 * ARGS.hidden_dim, ARGS.dim),
        "w2": (ARGS.dim, ARGS.hidden_dim),
        "output": (ARGS.vocab_size, ARGS.dim),
    }
    for name, shape in shapes.items():
        weight = _random(*shape)
        for rows in (1, 2, 4, 8, 64):
            x = _random(rows, shape[1])
            yield _row(f"{name} cuBLAS, {rows} rows", partial(functional.linear, x, weight), weight.nbytes)
            if rows <= 4:
                yield _row(f"{name} Triton, {rows} rows", partial(triton_layers.linear, x, weight), weight.nbytes)


def _steps() -> Iterator[dict[str, Any]]:
    from llama2.kernels import triton_layers

    rope = torch.rand(64, ARGS.head_dim // 2, 2, device="cuda")
    keys, values = _cache(64)
    for rows in (1, 64):
        x, branch, weight = _random(rows, ARGS.dim), _random(rows, ARGS.dim), _random(ARGS.dim)
        gate_up = _random(rows, 2 * ARGS.hidden_dim)
        qkv = _random(rows, (ARGS.n_heads + 2 * ARGS.n_kv_heads) * ARGS.head_dim)
        slots = torch.arange(rows, device="cuda")
        yield _row(
            f"add_rms_norm, {rows} rows",
            partial(triton_layers.add_rms_norm, x, branch, weight, 1e-5),
            4 * x.nbytes,
        )
        yield _row(
            f"rotate_and_store, {rows} rows",
            partial(triton_layers.rotate_and_store, qkv, rope[:rows], slots, keys, values),
            2 * qkv.nbytes,
        )
        yield _row(f"silu_mul, {rows} rows", partial(triton_layers.silu_mul, gate_up), gate_up.nbytes * 3 // 2)


def _attention() -> Iterator[dict[str, Any]]:
    from llama2.kernels import triton_attention

    for sequences, context in DECODING:
        blocks = -(-context // BLOCK_SIZE)
        keys, values = _cache(sequences * blocks)
        tables = _tables(sequences, blocks)
        contexts = torch.full((sequences,), context, dtype=torch.int32, device="cuda")
        q = _random(sequences, ARGS.n_heads, ARGS.head_dim)
        yield _row(
            f"decode, {sequences} of {context}",
            partial(triton_attention.attend_single, q, keys, values, tables, contexts),
            keys.nbytes + values.nbytes,
        )
    for sequences, length in PROMPTS:
        blocks = -(-length // BLOCK_SIZE)
        keys, values = _cache(sequences * blocks)
        tables = _tables(sequences, blocks)
        contexts = torch.full((sequences,), length, dtype=torch.int32, device="cuda")
        starts = torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32, device="cuda")
        q = _random(sequences * length, ARGS.n_heads, ARGS.head_dim)
        out = torch.empty_like(q)
        yield _row(
            f"prompts, {sequences} of {length}",
            partial(triton_attention.attend_ragged, q, keys, values, tables, contexts, starts, 0, out),
            2 * sequences * length * length * ARGS.n_heads * ARGS.head_dim,
            unit="TFLOP/s",
        )


def _row(kernel: str, run: Callable[[], Any], work: int, unit: str = "GB/s") -> dict[str, Any]:
    from triton.testing import do_bench

    milliseconds = do_bench(run, warmup=20, rep=60, return_mode="median")
    scale = {"GB/s": 1e6, "TFLOP/s": 1e9}[unit]
    return {"kernel": kernel, "microseconds": 1e3 * milliseconds, "rate": work / milliseconds / scale, "unit": unit}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _cache(blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (blocks, BLOCK_SIZE, ARGS.n_kv_heads, ARGS.head_dim)
    return _random(*shape), _random(*shape)


def _tables(sequences: int, blocks: int) -> torch.Tensor:
    return torch.randperm(sequences * blocks, device="cuda").int().view(sequences, blocks)


if __name__ == "__main__":
    run(benchmark)
