"""Times the steps between the products: norms, rotation, the feed-forward's middle. Each is one Triton kernel."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from benchmarks.sweeps.bench import Bench, Calls
from llama2.config import ModelArgs

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = (1, 64)


def measure(bench: Bench, args: ModelArgs) -> None:
    """Their data is small and stays in the cache, as in the engine, where the kernel before has just written it."""
    item = bench.dtype.itemsize
    qkv = (args.n_heads + 2 * args.n_kv_heads) * args.head_dim
    work: list[tuple[str, Callable[[Bench, ModelArgs, int], Calls], int]] = [
        ("add_rms_norm", _add_rms_norm, 4 * args.dim * item),
        ("rotate_and_store", _rotate_and_store, 2 * qkv * item),
        ("silu_mul", _silu_mul, 3 * args.hidden_dim * item),
    ]
    for name, prepare, nbytes in work:
        for rows in ROWS:
            bench.row(f"{name}, {rows} rows", partial(prepare, bench, args, rows), nbytes=rows * nbytes)


def _add_rms_norm(bench: Bench, args: ModelArgs, rows: int) -> Calls:
    from llama2.kernels import is_hopper
    from llama2.kernels.cuda import pointwise

    x, branch, weight = bench.random(rows, args.dim), bench.random(rows, args.dim), bench.random(args.dim)
    return [partial(pointwise.add_rms_norm, x, branch, weight, 1e-5, pdl=is_hopper(bench.device))]


def _rotate_and_store(bench: Bench, args: ModelArgs, rows: int) -> Calls:
    from llama2.kernels import is_hopper
    from llama2.kernels.cuda import pointwise

    qkv = bench.random(rows, (args.n_heads + 2 * args.n_kv_heads) * args.head_dim)
    rope = torch.rand(rows, args.head_dim // 2, 2, device=bench.device)
    slots = torch.arange(rows, device=bench.device)
    keys, values = (bench.random(-(-rows // 16), 16, args.n_kv_heads, args.head_dim) for _ in range(2))
    return [partial(pointwise.rotate_and_store, qkv, rope, slots, keys, values, pdl=is_hopper(bench.device))]


def _silu_mul(bench: Bench, args: ModelArgs, rows: int) -> Calls:
    from llama2.kernels import is_hopper
    from llama2.kernels.cuda import pointwise

    gate_up = bench.random(rows, 2 * args.hidden_dim)
    return [partial(pointwise.silu_mul, gate_up, pdl=is_hopper(bench.device))]
