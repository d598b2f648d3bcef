"""Tries the products of a decoding step: cuBLAS, the engine's own choice, and variants of its Triton kernel.

A product of few rows costs its weight's way through memory: each figure is that of the weight's bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional

from benchmarks.sweeps.bench import Bench, Calls
from llama2.config import ModelArgs

ROWS = (1, 2, 4, 8, 64)
# Triton's product keeps a sum for each row: beyond these it is no candidate.
STREAMED_ROWS = (1, 2, 4, 8)
# What `launch` is given: N features and K inputs of a tile, and options of Triton's. With launch_pdl a kernel may begin
# before the one before it has ended; how early is for the kernels to say.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"N": 4, "K": 1024, "num_warps": 4},
    {"N": 2, "K": 1024, "num_warps": 4},
    {"N": 1, "K": 1024, "num_warps": 4},
    {"N": 8, "K": 512, "num_warps": 4},
    {"N": 4, "K": 512, "num_warps": 2},
    {"N": 1, "K": 2048, "num_warps": 2},
    {"N": 8, "K": 1024, "num_warps": 8},
    {"N": 4, "K": 1024, "num_warps": 4, "launch_pdl": True},
)
# The variants are tried on these: one of many features, one of many inputs.
VARIED, VARIED_ROWS = ("w13", "w2"), (1, 4)


def weight_shapes(args: ModelArgs) -> dict[str, tuple[int, int]]:
    """Features and inputs of each product."""
    return {
        "wqkv": ((args.n_heads + 2 * args.n_kv_heads) * args.head_dim, args.dim),
        "wo": (args.dim, args.n_heads * args.head_dim),
        "w13": (2 * args.hidden_dim, args.dim),
        "w2": (args.dim, args.hidden_dim),
        "output": (args.vocab_size, args.dim),
    }


def measure(bench: Bench, args: ModelArgs) -> None:
    """What there is, of every weight and number of rows."""
    for name, shape in weight_shapes(args).items():
        nbytes = shape[0] * shape[1] * bench.dtype.itemsize
        for rows in ROWS:
            bench.row(
                f"{name}, {rows} rows, torch", partial(_calls, bench, shape, rows, functional.linear), nbytes=nbytes
            )
        for rows in STREAMED_ROWS:
            bench.row(f"{name}, {rows} rows, Triton", partial(_calls, bench, shape, rows, _triton), nbytes=nbytes)


def sweep(bench: Bench, args: ModelArgs) -> None:
    for settings in VARIANTS:
        for name in VARIED:
            shape = weight_shapes(args)[name]
            for rows in VARIED_ROWS:
                prepare = partial(_calls, bench, shape, rows, partial(launch, **settings))
                nbytes = shape[0] * shape[1] * bench.dtype.itemsize
                bench.row(f"{name}, {rows} rows", prepare, nbytes=nbytes, **settings)


def launch(x_RC: torch.Tensor, weight_FC: torch.Tensor, *, N: int, K: int, **options: Any) -> torch.Tensor:
    """`triton_layers.linear` with other numbers than its own."""
    from llama2.kernels import triton_layers

    (rows, inputs), features = x_RC.shape, len(weight_FC)
    out_RF = x_RC.new_empty(rows, features)
    triton_layers._linear[(-(-features // N),)](
        x_RC, weight_FC, out_RF, features, R=rows, C=inputs, N=N, K=K, **options
    )
    return out_RF


def _triton(x_RC: torch.Tensor, weight_FC: torch.Tensor) -> torch.Tensor:
    from llama2.kernels import triton_layers

    return triton_layers.linear(x_RC, weight_FC)


def _calls(bench: Bench, shape: tuple[int, int], rows: int, product: Any) -> Calls:
    x = bench.random(rows, shape[1])
    weights = [bench.random(*shape) for _ in range(bench.copies(shape[0] * shape[1] * bench.dtype.itemsize))]
    return [partial(product, x, weight) for weight in weights]
