"""Tries the products of a decoding step: cuBLAS, the engine's own choice, and variants of its Triton kernel.

A product of few rows costs the reading of its weight: each figure counts the weight's bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional

from benchmarks.sweeps.bench import Bench, Calls
from llama2.config import ModelArgs

ROWS = (1, 2, 4, 8, 64)
# Triton's product keeps a sum for each row: beyond this many it is not tried.
STREAMED_ROWS = (1, 2, 4)
# What `products.linear` is given in place of its own choice: N rows of the weight by K inputs are a tile, and
# EARLY inputs are fetched before the kernel before has ended, where it may (pdl).
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"pdl": False},
    {"N": 2},
    {"N": 8, "K": 512, "EARLY": 2048},
    {"N": 4, "K": 1024, "EARLY": 4096, "num_warps": 4},
    {"N": 4, "K": 2048, "EARLY": 4096, "num_warps": 8},
    {"N": 2, "K": 1024, "EARLY": 1024, "num_warps": 4},
    {"N": 1, "K": 2048, "EARLY": 4096, "num_warps": 4},
)
# The variants are tried on these: one of many features, one of many inputs.
VARIED, VARIED_ROWS = ("w13", "w2"), (1, 4, 8)
# Sums of a tile, rows of x times rows of the weight, for which registers may suffice.
MOST_SUMS = 16


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
    """The existing products, for every weight and number of rows."""
    for name, shape in weight_shapes(args).items():
        nbytes = shape[0] * shape[1] * bench.dtype.itemsize
        for rows in ROWS:
            bench.row(
                f"{name}, {rows} rows, torch", partial(_calls, bench, shape, rows, functional.linear), nbytes=nbytes
            )
        for rows in STREAMED_ROWS:
            bench.row(f"{name}, {rows} rows, Triton", partial(_calls, bench, shape, rows, _triton), nbytes=nbytes)
    shape = weight_shapes(args)["w13"]
    gated = partial(_triton, gated=True)
    for rows in STREAMED_ROWS[:2]:
        nbytes = shape[0] * shape[1] * bench.dtype.itemsize
        bench.row(f"w13 gated, {rows} rows, Triton", partial(_calls, bench, shape, rows, gated), nbytes=nbytes)


def sweep(bench: Bench, args: ModelArgs) -> None:
    for name in VARIED:
        shape = weight_shapes(args)[name]
        nbytes = shape[0] * shape[1] * bench.dtype.itemsize
        for rows in (1, 2):
            prepare = partial(_calls, bench, shape, rows, _in_three_axes)
            bench.row(f"{name}, {rows} rows, Triton in three axes", prepare, nbytes=nbytes)
    for settings in VARIANTS:
        for name in VARIED:
            shape = weight_shapes(args)[name]
            for rows in (rows for rows in VARIED_ROWS if rows * settings.get("N", 4) <= MOST_SUMS):
                prepare = partial(_calls, bench, shape, rows, partial(_triton, **settings))
                nbytes = shape[0] * shape[1] * bench.dtype.itemsize
                bench.row(f"{name}, {rows} rows, tried", prepare, nbytes=nbytes, **settings)


def _triton(x_RC: torch.Tensor, weight_FC: torch.Tensor, **settings: Any) -> torch.Tensor:
    from llama2.kernels import is_hopper
    from llama2.kernels.cuda import products

    return products.linear(x_RC, weight_FC, **{"pdl": is_hopper(x_RC.device), **settings})


def _in_three_axes(x_RC: torch.Tensor, weight_FC: torch.Tensor) -> torch.Tensor:
    from benchmarks.sweeps.former_product import linear

    return linear(x_RC, weight_FC)


def _calls(bench: Bench, shape: tuple[int, int], rows: int, product: Any) -> Calls:
    x = bench.random(rows, shape[1])
    weights = [bench.random(*shape) for _ in range(bench.copies(shape[0] * shape[1] * bench.dtype.itemsize))]
    return [partial(product, x, weight) for weight in weights]
